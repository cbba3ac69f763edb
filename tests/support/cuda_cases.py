"""What the CUDA operations are given and what has to come out, for the CPU emulation and for a device alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastprune.errors import ScoringError
from fastprune.ops import cuda, reference
from fastprune.ops.criteria import CRITERIA
from support.criteria import statistic_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Case = tuple[Tensor, Tensor | None, str, int]

SAMPLED, RUN = 1 << 15, 16  # as in csrc/cuda/selection.cuh


def _random(shape: tuple[int, ...], criterion: str = "signed", k: int = 40, dtype: torch.dtype = torch.float32) -> Case:
    weight, values = torch.randn(shape).to(dtype), torch.randn(shape)
    return weight, statistic_for(criterion, values), criterion, k


def sampled_positions(n: int) -> Tensor:
    """The positions that are sampled out of n weights, as in csrc/cuda/selection.cuh."""
    stretch, positions = n // (SAMPLED // RUN), []
    for run in range(SAMPLED // RUN):
        bits = (run + 1) * 0x9E3779B97F4A7C15 % 2**64
        bits ^= bits >> 31
        start = run * stretch + ((bits & 0xFFFFFFFF) * (stretch - RUN + 1) >> 32)
        positions.extend(range(start, start + RUN))
    return torch.tensor(positions)


def _too_few_reach_the_sampled_cut() -> Case:
    weight = torch.rand(260, 257)
    weight.view(-1)[sampled_positions(weight.numel())] += 2
    return weight, torch.ones(260, 257), "signed_reverse", 1000


def _misaligned() -> Case:
    return torch.randn(66_801).bfloat16()[1:].view(100, 668), torch.randn(100, 668), "signed", 33


def _strided_statistic() -> Case:
    return torch.randn(130, 516), torch.randn(516, 130).T, "abs_of_sum", 99


def _statistic_with_gaps(row_stride: int) -> Case:
    return torch.randn(130, 516), torch.randn(130, row_stride)[:, :516], "signed", 99


def _wanda_of_rows() -> Case:
    return torch.randn(130, 516).half(), torch.rand(130, 1), "wanda", 99


def _wide_statistic() -> Case:
    weight, statistic, criterion, k = _random((130, 516), dtype=torch.bfloat16)
    return weight, statistic.double() * (1 + 1e-9), criterion, k


def _few_values(k: int) -> Case:
    return torch.randint(-2, 3, (258, 260)).bfloat16(), torch.ones(258, 260), "signed_reverse", k


def _zeros_of_both_signs() -> Case:
    weight = torch.where(torch.rand(258, 260) < 0.5, -1.0, 1.0)
    statistic = torch.zeros(258, 260)
    statistic[7, 3] = 5.0
    return weight, statistic, "signed", 2000


def _extreme_values() -> Case:
    weight = torch.full((258, 260), 1e-42)
    flat, extremes = weight.view(-1), torch.tensor([float("inf"), -float("inf"), 3e38, 1e-45, -1e-45])
    flat[torch.randperm(flat.numel())[:500]] = extremes.repeat(100)
    return weight, torch.ones(258, 260), "signed", 700


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{shape}": lambda shape=shape: _random(shape, k=4) for shape in [(1, 1), (3, 5), (17, 129), (1000,), (5, 4, 9)]
    },
    **{f"{dtype}": lambda dtype=dtype: _random((257, 260), "signed", 66, dtype) for dtype in DTYPES},
    **{criterion: lambda criterion=criterion: _random((257, 260), criterion, 70) for criterion in CRITERIA},
    **{f"k={k}": lambda k=k: _random((257, 260), "abs", k) for k in (0, 1, 8000, 20_000, 66_820, 70_000)},
    "columns not a multiple of four": lambda: _random((301, 311), "wanda", 70),
    "one row": lambda: _random((1, 40_001), k=11),
    "one column": lambda: _random((40_001, 1), k=11),
    "full steps only": lambda: _random((64, 1024), "abs", 300, torch.bfloat16),
    "no weights": lambda: _random((0, 7)),
    "misaligned": _misaligned,
    "strided statistic": _strided_statistic,
    "statistic with gaps": lambda: _statistic_with_gaps(520),
    "statistic with odd gaps": lambda: _statistic_with_gaps(519),
    "wanda of rows": _wanda_of_rows,
    "float64 statistic": _wide_statistic,
    "all equal": lambda: (torch.ones(258, 260), torch.ones(258, 260), "abs", 50),
    "many ties, k above them": lambda: _few_values(16_000),
    "many ties, k in them": lambda: _few_values(300),
    "zeros of both signs": _zeros_of_both_signs,
    "all negative": lambda: (torch.rand(258, 260), torch.ones(258, 260), "signed", 50),
    "extreme values": _extreme_values,
    "too few reach the sampled cut": _too_few_reach_the_sampled_cut,
}


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Indices and values are equal as bits."""
    indices, values = (tensor.cpu() for tensor in got)
    assert indices.dtype == torch.int64 and values.dtype == torch.float32
    assert indices.tolist() == expected[0].tolist()
    assert values.view(torch.int32).tolist() == expected[1].view(torch.int32).tolist()


def _to(device: str, tensor: Tensor | None) -> Tensor | None:
    """On the device; a view keeps its strides and its alignment."""
    if tensor is None or device == "cpu":
        return tensor
    storage = tensor.untyped_storage().to(device=device)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    return empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def best_of(weight: Tensor, statistic: Tensor | None, criterion: str, k: int) -> tuple[Tensor, Tensor]:
    """The selection from one matrix."""
    [(_, found)] = cuda.top_scores_of_each({"": (weight, statistic)}, criterion, {"": k})
    return found


def check_case(device: str, name: str) -> None:
    weight, statistic, criterion, k = CASES[name]()
    got = best_of(_to(device, weight), _to(device, statistic), criterion, k)
    assert_same(got, reference.top_scores(weight, statistic, criterion, k))


def check_nan(device: str, index: int, k: int, dtype: torch.dtype) -> None:
    weight, statistic, criterion, _ = _random((257, 260), "signed", 0, dtype)
    weight.view(-1)[index] = float("nan")
    weight.view(-1)[index + 1 :: 1001] = -float("nan")
    with pytest.raises(ScoringError) as expected:
        reference.top_scores(weight, statistic, criterion, k)
    with pytest.raises(ScoringError) as raised:
        best_of(_to(device, weight), _to(device, statistic), criterion, k)
    assert str(raised.value) == str(expected.value)


def _matrices() -> dict[str, tuple[Tensor, Tensor]]:
    """Matrices of many sizes and dtypes; one is empty, one has ties only, one the scores of another."""
    shapes = [(3, 5), (260, 258), (0, 4), (129, 517), (258, 260), (258, 260), (1, 1)]
    weights = [torch.randn(shape).to(DTYPES[i % 4]) for i, shape in enumerate(shapes)]
    statistics = [torch.randn(shape) for shape in shapes]
    weights[4], statistics[4] = torch.ones(258, 260), torch.ones(258, 260)
    weights[5], statistics[5] = weights[1].float().view(258, 260), statistics[1].view(258, 260)
    return {f"m{i}": pair for i, pair in enumerate(zip(weights, statistics, strict=True))}


def _all_to(device: str, matrices: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (_to(device, weight), _to(device, statistic)) for name, (weight, statistic) in matrices.items()}


def check_each(device: str) -> None:
    matrices = _matrices()
    ks = dict(zip(matrices, [4, 70, 3, 0, 50, 66, 9], strict=True))
    got = dict(cuda.top_scores_of_each(_all_to(device, matrices), "abs_of_sum", ks))
    assert list(got) == list(matrices)
    for name, pair in matrices.items():
        assert_same(got[name], reference.top_scores(*pair, "abs_of_sum", ks[name]))


def check_all(device: str, k: int) -> None:
    matrices = _matrices()
    places, indices, values = cuda.top_scores_of_all(_all_to(device, matrices), "abs_of_sum", k)
    parts = [reference.form_scores(*pair, "abs_of_sum").flatten() for pair in matrices.values()]
    scores = torch.cat(parts)
    order = scores.sort(descending=True, stable=True).indices[:k]
    begins = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    place_of = torch.repeat_interleave(torch.arange(len(parts)), begins.diff())
    assert places.tolist() == place_of[order].tolist()
    assert_same((indices, values), (order - begins[place_of[order]], scores[order]))


def check_nan_of_several(device: str) -> None:
    matrices = _matrices()
    for name, at in (("m3", 5000), ("m5", 7)):
        matrices[name][0].view(-1)[at] = float("nan")
    on_device = _all_to(device, matrices)
    with pytest.raises(ScoringError, match=r"^m3: .*flat index 5000, position \(9, 347\)"):
        list(cuda.top_scores_of_each(on_device, "signed", dict.fromkeys(matrices, 1)))
    with pytest.raises(ScoringError, match=r"^m3: .*flat index 5000, position \(9, 347\)"):
        cuda.top_scores_of_all(on_device, "signed", 100)


def check_difference(device: str, a_size: int, b_size: int, highest: int) -> None:
    a, b = (torch.randperm(highest)[:size].sort().values for size in (a_size, b_size))
    got = cuda.difference(_to(device, a), _to(device, b))
    assert got.dtype == torch.int64
    assert got.tolist() == sorted(set(a.tolist()) - set(b.tolist()))


def every_value(dtype: torch.dtype) -> Tensor:
    """All values of a 16 bit type; of the wider ones, random bits."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return torch.randint(-(1 << 62), 1 << 62, (20_000,)).view(dtype)


def bits(values: Tensor) -> list[int]:
    return values.cpu().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).tolist()


def check_sparse(device: str, scale: float) -> None:
    """Several matrices at once: old values, scaled values, untouched values and restored values, as bits."""
    before = [every_value(dtype) for dtype in DTYPES]
    before.append(before[0][:0])
    offsets = [torch.randperm(len(values))[: len(values) * 3 // 4] for values in before]
    weights = [_to(device, values.clone()) for values in before]
    on_device = [_to(device, where) for where in offsets]
    versions = [weight._version for weight in weights]
    old = cuda.apply_sparse_each_(weights, on_device, scale)
    for values, where, weight, kept in zip(before, offsets, weights, old, strict=True):
        assert bits(kept) == bits(values[where])
        number = where[~values[where].isnan()]
        expected = values.clone()
        expected[number] = reference.scaled(values[number], scale)
        if scale == 0:
            expected[where] = 0
        assert bits(weight) == bits(expected)
    assert all(weight._version > version for weight, version in zip(weights, versions, strict=True))
    cuda.restore_sparse_each_(weights, on_device, old)
    assert [bits(weight) for weight in weights] == [bits(values) for values in before]
