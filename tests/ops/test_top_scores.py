"""``ops.top_scores``: every backend gives the bits of a full sort of the reference's scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.criteria import statistic_for

from fastprune import ops
from fastprune.errors import ArgumentError, BackendError, ScoringError
from fastprune.ops import reference

CPU_BACKENDS = ("torch", "cpp")
SHAPES = ((1, 1), (3, 5), (17, 129), (256, 300))


def sorted_scores(weight: torch.Tensor, statistic: torch.Tensor | None, criterion: str):
    """The definition: all scores, sorted stably, -0 as 0."""
    scores = reference.form_scores(weight, statistic, criterion).flatten().float() + 0.0
    values, indices = torch.sort(scores, descending=True, stable=True)
    return indices, values


def assert_bits(found, expected, k: int) -> None:
    assert torch.equal(found[0], expected[0][:k])
    assert torch.equal(found[1].view(torch.int32), expected[1][:k].contiguous().view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("criterion", ops.CRITERIA)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equal_to_a_full_sort(backend: str, criterion: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        wide = torch.randn(shape[0], shape[1] + 3).to(dtype)
        for weight in (wide[:, :-3].contiguous(), wide[:, 1:-2]):  # the second is strided
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            statistic = statistic_for(criterion, torch.randn(shape, dtype=wide))
            expected = sorted_scores(weight, statistic, criterion)
            n = weight.numel()
            for k in {0, 1, n // 1000, n // 9, n, n + 5}:
                assert_bits(ops.top_scores(weight, statistic, criterion, k, backend=backend), expected, min(k, n))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("spread", ["ties", "hot corner", "constant", "tail"])
def test_distributions_that_mislead_a_sample(spread: str, threads: int) -> None:
    weight = torch.ones(1024, 640)
    statistic = {
        "ties": torch.randint(0, 3, weight.shape).float(),
        "hot corner": torch.zeros_like(weight).index_put_((torch.tensor(5),), torch.rand(640) + 1.0),
        "constant": torch.full_like(weight, 2.0),
        "tail": torch.rand_like(weight).pow(40),
    }[spread]
    expected = sorted_scores(weight, statistic, "abs")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for k in (1, 640, 700, 100_000, 400_000):
            assert_bits(ops.top_scores(weight, statistic, "abs", k, backend="cpp"), expected, k)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_negative_zero_counts_as_zero(backend: str) -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    indices, values = ops.top_scores(weight, torch.tensor([[1.0, 1.0, -0.0, 0.0]]), "signed", 4, backend=backend)
    assert indices.tolist() == [0, 1, 2, 3]
    assert torch.equal(values.view(torch.int32), torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("place", [0, 7, 300 * 300 - 1])
def test_nan_is_reported_with_its_first_index(backend: str, place: int) -> None:
    statistic = torch.randn(300, 300)
    statistic.view(-1)[place:] = torch.nan
    with pytest.raises(ScoringError, match=str(place)):
        ops.top_scores(torch.ones(300, 300), statistic, "signed", 3, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_wanda_broadcasts_along_the_input_axis(backend: str) -> None:
    weight, inputs = torch.randn(40, 30), torch.rand(40, 1)
    expected = sorted_scores(weight, inputs, "wanda")
    assert_bits(ops.top_scores(weight, inputs, "wanda", 100, backend=backend), expected, 100)


def several() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Small matrices, which go side by side, around one that keeps all threads busy."""
    shapes = {"small": (3, 5), "none": (0, 4), "large": (2048, 1030), "middle": (300, 311), "again": (300, 311)}
    dtypes = {"large": torch.bfloat16, "middle": torch.float16}
    return {
        name: (torch.randn(shape).to(dtypes.get(name, torch.float32)), torch.randn(shape))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_matrices_as_each_alone(threads: int, backend: str) -> None:
    matrices = several()
    ks = {"small": 20, "none": 2, "large": 2000, "middle": 40_000, "again": 0}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = dict(ops.top_scores_of_each(matrices, "signed", ks, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert list(found) == list(matrices)
    for name, (weight, statistic) in matrices.items():
        assert_bits(found[name], sorted_scores(weight, statistic, "signed"), min(ks[name], weight.numel()))
    assert list(ops.top_scores_of_each({}, "signed", {}, backend=backend)) == []


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_first_of_several_matrices_with_a_nan_is_named(backend: str) -> None:
    matrices = several()
    for name, at in (("middle", 77), ("large", 2_000_000), ("again", 3)):
        matrices[name][1].view(-1)[at:] = torch.nan
    ks = dict.fromkeys(matrices, 5)
    with pytest.raises(ScoringError, match=r"^large: the 'signed' score at flat index 2000000, "):
        list(ops.top_scores_of_each(matrices, "signed", ks, backend=backend))


def test_a_matrix_that_does_not_fit_is_named() -> None:
    matrices = {"good": (torch.randn(3, 4), torch.randn(3, 4)), "bad": (torch.randn(3, 4), torch.randn(4, 3))}
    with pytest.raises(ArgumentError, match=r"^bad: statistic: expected the weight's shape \(3, 4\), got \(4, 3\)"):
        ops.top_scores_of_each(matrices, "signed", {"good": 1, "bad": 1})
    with pytest.raises(BackendError, match=r"^good: backend 'triton' has no top_scores"):
        ops.top_scores_of_each(matrices, "signed", {"good": 1, "bad": 1}, backend="triton")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    k=st.integers(0, 1700),
    levels=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_ties_by_lowest_index(rows: int, columns: int, k: int, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).float()
    statistic = torch.randint(-levels, levels + 1, (rows, columns), generator=generator).float()
    expected = sorted_scores(weight, statistic, "signed")
    for backend in CPU_BACKENDS:
        found = ops.top_scores(weight, statistic, "signed", k, backend=backend)
        assert_bits(found, expected, min(k, rows * columns))


def test_bad_arguments() -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(ArgumentError, match="criterion"):
        ops.top_scores(weight, weight, "best", 1)
    with pytest.raises(ArgumentError, match="k"):
        ops.top_scores(weight, weight, "signed", -1)
    with pytest.raises(ArgumentError, match="k: expected an integer"):
        ops.top_scores(weight, weight, "signed", 1.0)
    with pytest.raises(ArgumentError, match=r"weight: .* view that is to be negated"):
        ops.top_scores(torch._neg_view(weight), weight, "signed", 1)
    with pytest.raises(ArgumentError, match="statistic"):
        ops.top_scores(weight, torch.randn(4, 3), "signed", 1)
    with pytest.raises(ArgumentError, match="abacus"):
        ops.top_scores(weight, weight, "signed", 1, backend="abacus")
    with pytest.raises(BackendError, match="cuda"):
        ops.top_scores(weight, weight, "signed", 1, backend="cuda")
