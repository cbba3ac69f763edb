"""Inputs for the Triton kernels, and the comparison with plain torch. To be imported after Triton was found."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from fastprune_kernels import grad_abs_sum, launching
from fastprune_kernels.tiling import BlockShape
from torch import Tensor

from fastprune.ops import reference

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not launching.INTERPRETED, reason="kernels are compiled here")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
each_device = pytest.mark.parametrize("device", DEVICES)
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
each_size = pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 129), (70, 33)], ids=str)

# Ragged: examples of 0 and 1 token, a gap, one that starts inside another, one of several steps.
STARTS = torch.tensor([2, 20, 20, 21, 25, 60])
LENGTHS = torch.tensor([16, 0, 1, 17, 40, 70])
N_TOKENS = 131
SMALL = BlockShape(32, 64, 16, 4, 2)

Accumulate = Callable[[Tensor], None]


def strided(rows: int, columns: int, dtype: torch.dtype, device: str, layout: str = "slice") -> Tensor:
    """Random numbers that are a part of a larger tensor whose other elements are NaN."""
    shape = {"slice": (rows + 2, columns + 3), "transposed": (columns + 3, rows + 2), "step": (rows + 2, 2 * columns)}
    base = torch.full(shape[layout], math.nan, dtype=dtype, device=device)
    if layout == "transposed":
        base = base.T
    view = base[1 : 1 + rows, ::2] if layout == "step" else base[1 : 1 + rows, 2 : 2 + columns]
    return view.copy_(torch.randn(rows, columns))


def inputs(
    n_out: int,
    n_in: int,
    dtype: torch.dtype,
    device: str,
    layouts: tuple[str, str] = ("slice", "slice"),
    spans: tuple[Tensor, Tensor] = (STARTS, LENGTHS),
    n_tokens: int = N_TOKENS,
) -> tuple[Tensor, Tensor]:
    """``dy`` and ``x``; rows that belong to no example are NaN."""
    used = torch.zeros(n_tokens, dtype=torch.bool, device=device)
    for start, length in zip(*(each.tolist() for each in spans), strict=True):
        used[start : start + length] = True
    dy, x = (strided(n_tokens, n, dtype, device, layout) for n, layout in zip((n_out, n_in), layouts, strict=True))
    dy[~used], x[~used] = math.nan, math.nan
    return dy, x


def assert_nothing_written_around(acc: Tensor) -> None:
    """``acc`` is from :func:`strided`."""
    assert acc._base.isnan().sum() == acc._base.numel() - acc.numel()


def assert_as_exact_as_torch(acc: Tensor, before: Tensor, accumulate: Accumulate, longest: int) -> None:
    """``|acc - exact| <= 2 |torch - exact| + floor |exact|``, by norms; ``accumulate`` is the reference.

    The floor is in units of 2**-24: 8 for products of float32 as three of tf32, which leave out 2**-21 of them, and
    1 / 8 a token because tensor cores cut, instead of rounding, when they add 8 or 16 products to their sum.
    """
    exact, torch_own = before.double(), before.clone()
    accumulate(exact)
    accumulate(torch_own)
    error, own = (acc - exact).norm(), (torch_own - exact).norm()
    assert error <= 2 * own + 2**-24 * (8 + longest / 8) * exact.norm()  # false for NaN


def reference_of(name: str, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor) -> Accumulate:
    """The reference for a statistic, as a function of the accumulator."""
    if name != "grad_sum":
        return lambda acc: getattr(reference, f"accumulate_{name}")(acc, dy, x, starts, lengths)

    def accumulate(acc: Tensor) -> None:
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            reference.accumulate_grad_sum(acc, dy[start : start + length], x[start : start + length])

    return accumulate


def check(names, dys, x, starts=STARTS, lengths=LENGTHS, shape=SMALL, acc_layout="slice") -> list[dict[str, Tensor]]:
    """Run the kernel on accumulators that are not zero, compare each with the reference, return them."""
    starts, lengths = starts.to(x.device), lengths.to(x.device)
    accs = [
        {name: strided(dy.shape[1], x.shape[1], torch.float32, x.device.type, acc_layout) for name in names}
        for dy in dys
    ]
    before = [{name: acc.clone() for name, acc in each.items()} for each in accs]
    grad_abs_sum.accumulate_grad_statistics(list(zip(dys, accs, strict=True)), x, starts, lengths, shape=shape)
    for dy, each, old in zip(dys, accs, before, strict=True):
        for name, acc in each.items():
            accumulate = reference_of(name, dy, x, starts, lengths)
            assert_as_exact_as_torch(acc, old[name], accumulate, max([0, *lengths.tolist()]))
            assert_nothing_written_around(acc)
    return accs
