"""The CUDA operations on a device: the bits of the reference, whatever the shape, the stream and the run."""

from __future__ import annotations

import pytest
import support.cuda_cases as cuda_cases
import torch

from fastprune import ops
from fastprune.ops import cuda, reference

pytestmark = pytest.mark.gpu

# Layers of Llama-3.1-8B: k_proj, q_proj, up_proj.
REAL_SHAPES = [(1024, 4096), (4096, 4096), (14_336, 4096)]


@pytest.mark.parametrize("name", cuda_cases.CASES)
def test_small_top_scores(name: str) -> None:
    cuda_cases.check_case("cuda", name)


@pytest.mark.parametrize(("index", "k"), [(0, 3), (4097, 0), (66_819, 70_000)])
@pytest.mark.parametrize("dtype", cuda_cases.DTYPES)
def test_small_first_nan_is_named(index: int, k: int, dtype: torch.dtype) -> None:
    cuda_cases.check_nan("cuda", index, k, dtype)


def test_small_top_scores_of_each() -> None:
    cuda_cases.check_each("cuda")


@pytest.mark.parametrize("k", [0, 1, 70, 80_000])
def test_small_top_scores_of_all(k: int) -> None:
    cuda_cases.check_all("cuda", k)


def test_small_first_nan_of_several_is_named() -> None:
    cuda_cases.check_nan_of_several("cuda")


@pytest.mark.parametrize(("a_size", "b_size"), [(0, 5), (5, 0), (1, 1), (300, 700), (5000, 4000)])
def test_small_difference(a_size: int, b_size: int) -> None:
    cuda_cases.check_difference("cuda", a_size, b_size, 6000)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1.0, 0.5, -1.7, 3e-5, 70_000.0, 1e-45])
def test_small_sparse_writes(scale: float) -> None:
    cuda_cases.check_sparse("cuda", scale)


def real(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a statistic that is larger in some rows and columns, as gradients are."""
    weight = (torch.randn(shape, device="cuda") * 0.02).to(dtype)
    rows, columns = (torch.randn(size, device="cuda").exp() for size in shape)
    return weight, torch.randn(shape, device="cuda") * rows[:, None] * columns


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    return all(
        torch.equal(
            a.view(torch.int32) if a.is_floating_point() else a, b.view(torch.int32) if b.is_floating_point() else b
        )
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", REAL_SHAPES)
@pytest.mark.parametrize(("criterion", "fraction"), [("signed", 1e-5), ("abs_of_sum", 1e-3), ("magnitude", 1e-2)])
def test_real_shapes(shape: tuple[int, int], dtype: torch.dtype, criterion: str, fraction: float) -> None:
    weight, statistic = real(shape, dtype)
    statistic = None if criterion == "magnitude" else statistic
    k = int(fraction * weight.numel())
    assert same(
        cuda_cases.best_of(weight, statistic, criterion, k), reference.top_scores(weight, statistic, criterion, k)
    )


def test_all_matrices_of_a_block_in_one_launch() -> None:
    matrices = {str(shape): real(shape, torch.bfloat16) for shape in REAL_SHAPES}
    ks = {name: weight.numel() // 1000 for name, (weight, _) in matrices.items()}
    together = dict(ops.top_scores_of_each(matrices, "signed", ks, backend="cuda"))
    for name, pair in matrices.items():
        assert same(together[name], reference.top_scores(*pair, "signed", ks[name]))
    k = sum(ks.values())
    places, indices, values = cuda.top_scores_of_all(matrices, "signed", k)
    scores = torch.cat([reference.form_scores(*pair, "signed").flatten() for pair in matrices.values()])
    begins = torch.tensor([0, *(weight.numel() for weight, _ in matrices.values())], device="cuda").cumsum(0)
    expected = reference.top_scores(scores, torch.ones_like(scores), "signed_reverse", k)
    assert same((begins[places] + indices, values), expected)


@pytest.mark.parametrize("few_values", [False, True], ids=["sampled cut", "searched cut"])
def test_same_bits_twice(few_values: bool) -> None:
    weight, statistic = real((4096, 4096), torch.bfloat16)
    if few_values:
        weight, statistic = weight.sign(), torch.ones_like(statistic)
    first = cuda_cases.best_of(weight, statistic, "signed", 20_000)
    assert same(first, reference.top_scores(weight, statistic, "signed", 20_000))
    for _ in range(5):
        assert same(cuda_cases.best_of(weight, statistic, "signed", 20_000), first)


def test_work_is_queued_on_the_current_stream() -> None:
    weight, statistic = real((1024, 4096), torch.bfloat16)
    expected = reference.top_scores(weight, statistic, "signed", 4000)
    on_stream, offsets = torch.zeros_like(weight), torch.arange(0, weight.numel(), 1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, in which another stream would find zeros
        on_stream.copy_(weight)
        got = cuda_cases.best_of(on_stream, statistic, "signed", 4000)
        torch.cuda._sleep(200_000_000)
        on_stream.neg_()
        [old] = cuda.apply_sparse_each_([on_stream.view(-1)], [offsets], 0.5)
        kept = cuda.difference(got[0].sort().values, expected[0][:100].sort().values)
    torch.cuda.synchronize()
    assert same(got, expected)
    assert torch.equal(old, -weight.view(-1)[offsets])
    assert torch.equal(on_stream.view(-1)[offsets], (-weight.view(-1)[offsets] * 0.5))
    assert torch.equal(kept, expected[0][100:].sort().values)


def test_the_waist_takes_it() -> None:
    assert ops.available_backends()["cuda"] == "available"
    weight, statistic = real((1024, 4096), torch.bfloat16)
    before = weight.clone()
    expected = reference.top_scores(weight, statistic, "signed", 500)
    for backend in (None, "cuda"):
        assert same(ops.top_scores(weight, statistic, "signed", 500, backend=backend), expected)
        old = ops.apply_sparse_(weight, expected[0], 0.0, backend=backend)
        assert not weight.view(-1)[expected[0]].any()
        ops.restore_sparse_(weight, expected[0], old, backend=backend)
        assert torch.equal(weight, before)
