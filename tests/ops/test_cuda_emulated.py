"""The CUDA sources, compiled for the CPU against a stand-in for CUDA's headers, give what the reference gives.

This tests the kernels, the host code around them and the binding, not CUB, the compiler or a device: those are tested
by ``test_cuda_build.py`` and, on a machine with a GPU, ``test_cuda_ops_gpu.py``.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import support.cuda_cases as cuda_cases
import torch
from support.sparse import copies, same, several

from fastprune import ops
from fastprune.errors import ArgumentError, BackendError
from fastprune.ops import cuda, dispatch
from fastprune.ops.criteria import CRITERIA, FORMULAS, Criterion

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the emulation needs Linux and g++"
)


@pytest.fixture(autouse=True)
def _emulation(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors stand for device tensors; fresh memory holds junk."""

    @contextmanager
    def device_of(tensors):
        yield emulated, 0, 0

    def junk(count, like):
        return torch.full((count,), 0xA5, dtype=torch.uint8)

    monkeypatch.setattr(cuda, "_device_of", device_of)
    monkeypatch.setattr(cuda, "_bytes", junk)


@pytest.mark.parametrize("name", cuda_cases.CASES)
def test_top_scores(name: str) -> None:
    cuda_cases.check_case("cpu", name)


def test_an_extension_without_the_formula_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "trial", Criterion("trial", "grad_sum", "unbuilt_product"))
    with pytest.raises(BackendError, match=r"^backend 'cuda': .* 'unbuilt_product', got one without it"):
        cuda_cases.best_of(torch.ones(3, 5), torch.ones(3, 5), "trial", 1)


def test_the_extension_has_every_formula(emulated: ModuleType) -> None:
    assert set(emulated.formulas) == set(FORMULAS)


@pytest.mark.parametrize("order", ["reverse", "shuffled"])
def test_the_order_of_blocks_and_threads_leaves_no_trace(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_ORDER", order)
    for name in ("torch.bfloat16", "many ties, k in them", "too few reach the sampled cut"):
        cuda_cases.check_case("cpu", name)
    cuda_cases.check_nan("cpu", 4097, 3, torch.float32)
    cuda_cases.check_each("cpu")
    cuda_cases.check_all("cpu", 70)


@pytest.mark.parametrize(
    ("name", "launches"),
    [("torch.bfloat16", 4), ("wanda", 4), ("columns not a multiple of four", 4), ("k=8000", 4), ("all equal", 16)],
)
def test_one_pass_is_enough_unless_the_sample_misleads(
    name: str, launches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample, cut, collection, output; a search adds its start, a collection, and two for each of five digits."""
    monkeypatch.setenv("EMULATED_LAUNCHES", str(tmp_path / "launches"))
    cuda_cases.check_case("cpu", name)
    assert len((tmp_path / "launches").read_text()) == launches


@pytest.mark.parametrize(("index", "k"), [(0, 3), (4097, 0), (66_819, 70_000)])
def test_first_nan_is_named(index: int, k: int) -> None:
    cuda_cases.check_nan("cpu", index, k, torch.bfloat16)


@pytest.mark.parametrize("workspace", [160 << 20, 400_000, 1])
def test_top_scores_of_each(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_WORKSPACE", workspace)  # all in one launch, some, or each alone
    cuda_cases.check_each("cpu")


def test_launches_keep_to_the_workspace(emulated: ModuleType) -> None:
    large, small = torch.empty(1 << 25, device="meta"), torch.empty(1 << 20, device="meta")
    experts = {str(expert): (small, None) for expert in range(5000)}  # of a large mixture
    matrices = {"large": (large, None), **experts, "last": (large, None)}
    ks = {name: len(weight) // 60_000 for name, (weight, _) in matrices.items()} | {"large": len(large) // 10}
    runs = list(cuda._launches(matrices, ks))
    assert [name for run in runs for name in run] == list(matrices)
    assert runs[0] == ["large"] and len(runs) > 4
    for run in runs[1:]:
        sizes = [len(matrices[name][0]) for name in run]
        needed = emulated.top_scores_workspace(sizes, [1] * len(run), [ks[name] for name in run], 0)
        assert needed <= cuda._WORKSPACE


@pytest.mark.parametrize("k", [0, 1, 70, 80_000])
def test_top_scores_of_all(k: int) -> None:
    cuda_cases.check_all("cpu", k)


def test_first_nan_of_several_is_named() -> None:
    cuda_cases.check_nan_of_several("cpu")


@pytest.mark.parametrize(("a_size", "b_size"), [(0, 5), (5, 0), (1, 1), (300, 700), (5000, 4000)])
def test_difference(a_size: int, b_size: int) -> None:
    cuda_cases.check_difference("cpu", a_size, b_size, 6000)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1.0, 0.5, -1.7, 3e-5, 70_000.0, 1e-45])
def test_sparse_writes(scale: float) -> None:
    cuda_cases.check_sparse("cpu", scale)


def test_the_waist_writes_all_matrices_in_one_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bits of one by one, in a launch each way; windows and transposed matrices too, and a list of none."""
    monkeypatch.setattr(dispatch, "choose", lambda backend, operation, *tensors: "cuda")
    monkeypatch.setenv("EMULATED_LAUNCHES", str(tmp_path / "launches"))
    weights, indices = several()
    before, alone = copies(weights), copies(weights)
    expected = {name: ops.apply_sparse_(alone[name], indices[name], -0.7) for name in alone}
    (tmp_path / "launches").unlink()
    old = ops.apply_sparse_each_(weights, indices, -0.7)
    assert same(old, expected) and same(weights, alone) and not same(weights, before)
    ops.restore_sparse_each_(weights, indices, old)
    assert same(weights, before) and len((tmp_path / "launches").read_text()) == 2
    assert ops.apply_sparse_each_({}, {}) == {}


def test_a_workspace_that_is_too_small_is_refused(emulated: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes at a multiple of 16, got 8"):
        emulated.difference(0, 10, 0, 0, 0, 16, 8, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "groups", "ks", "message"),
    [
        ([1 << 32], [1], [1], "2\\^32 weights or more"),
        ([4], [2], [1], "group_sizes: "),
        ([4, 4], [1], [1], "group_sizes: "),
        ([4], [1], [5], "ks: expected 0 to the number"),
        ([4], [1], [1, 1], "ks: expected one per group"),
    ],
)
def test_sizes_that_cannot_be_served_are_refused(emulated: ModuleType, sizes, groups, ks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emulated.top_scores_workspace(sizes, groups, ks, 0)


def test_workspace_of_a_large_model_is_a_small_part_of_it(emulated: ModuleType) -> None:
    sizes = [4096 * 14336] * 96
    bytes_of_weights = 2 * sum(sizes)
    each = emulated.top_scores_workspace(sizes, [1] * 96, [n // 1000 for n in sizes], 0)
    assert each < bytes_of_weights / 12
    assert emulated.top_scores_workspace(sizes, [96], [sum(sizes) // 1000], 0) < bytes_of_weights / 12


def test_tensors_that_are_not_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises((ArgumentError, ImportError)):
        cuda_cases.best_of(torch.ones(2, 2), None, "magnitude", 1)
