"""The operations of :mod:`fastprune.ops` in plain torch, short enough to be checked by eye.

Every other backend is tested against these. They take arguments that ``ops`` has validated, run on any device, and
compute in the dtype of the accumulator (float32 or float64). On devices without a faster backend, selection, apply and
``accumulate_act_sq_sum`` run from here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fastprune.errors import ScoringError
from fastprune.ops.criteria import CRITERIA, FORMULAS

ACT_SQ_LANES = 128


@torch.no_grad()
def accumulate_grad_sum(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """``acc += dy.T @ x``: the gradient of a Linear's weight, summed over tokens."""
    acc.add_(dy.to(acc.dtype).T @ x.to(acc.dtype))


@torch.no_grad()
def accumulate_grad_abs_sum(acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """``acc += sum_i |dy_i.T @ x_i|`` over examples i, whose tokens are ``starts[i] : starts[i] + lengths[i]``."""
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        tokens = slice(start, start + length)
        acc.add_((dy[tokens].to(acc.dtype).T @ x[tokens].to(acc.dtype)).abs_())


@torch.no_grad()
def accumulate_grad_sq_sum(acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """``acc += sum_i (dy_i.T @ x_i)**2``: the diagonal of the empirical Fisher matrix."""
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        tokens = slice(start, start + length)
        acc.add_((dy[tokens].to(acc.dtype).T @ x[tokens].to(acc.dtype)).square_())


@torch.no_grad()
def accumulate_act_sq_sum(acc: Tensor, x: Tensor) -> None:
    """``acc[j] += sum_t x[t, j]**2`` in float64, in an order that is part of the definition.

    Tokens t, t + 128, t + 256, ... are added one after the other; the 128 sums are then folded in half until one is
    left. So the result is bit-identical on every backend, and its error does not grow with the number of tokens.
    """
    lanes = torch.zeros(ACT_SQ_LANES, x.shape[1], dtype=torch.float64, device=x.device)
    for block in x.split(ACT_SQ_LANES):
        lanes[: len(block)] += block.double().square()
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    acc.copy_(acc.double() + lanes[0])


@torch.no_grad()
def form_scores(weight: Tensor, statistic: Tensor | None, criterion: str) -> Tensor:
    """Scores of all weights.

    Args:
        weight: ``(rows, cols)``, any float dtype; upcast before the product.
        statistic: float32 or float64, of the weight's shape or (``wanda``) broadcastable to it; ``None`` for
            ``magnitude``.
        criterion: Name of a row of :mod:`fastprune.ops.criteria`, which has the formulas.

    Returns:
        float32 ``(rows, cols)``; the product is formed in float64 where an operand is, and then rounded. -0 is +0.
    """
    wide = torch.float64 if torch.float64 in (weight.dtype, getattr(statistic, "dtype", None)) else torch.float32
    w = weight.to(wide)
    s = w.new_ones(()) if statistic is None else statistic.to(wide)  # not read by the formula of such a criterion
    row = CRITERIA[criterion]
    scores = FORMULAS[row.formula](w, root(s) if row.root else s)
    return scores.to(torch.float32) + 0.0


def root(values: Tensor) -> Tensor:
    """Square roots in the dtype of float32 or float64 values, each rounded once.

    On a CPU, torch takes the roots of contiguous values from MKL: 0.6 % of them are one unit in the last place off, and
    those of strided values differ. NumPy uses the processor's instruction, which IEEE 754 defines exactly, as torch
    does on CUDA devices. Every backend takes its roots from here.
    """
    if values.device.type != "cpu":
        return values.sqrt()
    array = values.detach().numpy()
    with np.errstate(invalid="ignore"):  # of a negative sum of squares; the score is reported as no number
        return torch.from_numpy(np.sqrt(array, out=np.empty_like(array, order="C")))


@torch.no_grad()
def top_scores(
    weight: Tensor, statistic: Tensor | None, criterion: str, k: int, name: str = ""
) -> tuple[Tensor, Tensor]:
    """The k best scores: int64 flat indices and float32 values, by descending score, ties by ascending index.

    Raises:
        ScoringError: A score is not a number; the message names the matrix, if it has a name, and the first such score.
    """
    scores = form_scores(weight, statistic, criterion).flatten()
    nan = scores.isnan()
    if nan.any():
        raise nan_score(int(nan.nonzero()[0]), weight, criterion, name)
    k = min(k, scores.numel())
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device), scores[:0]
    kth = scores.topk(k, sorted=False).values.min()
    candidates = (scores >= kth).nonzero().flatten()
    order = scores[candidates].sort(descending=True, stable=True).indices[:k]
    return candidates[order], scores[candidates[order]]


def top_scores_of_each(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]], criterion: str, ks: Mapping[str, int]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """:func:`top_scores` of several matrices, each with its name; an error names the first matrix that has one."""
    for name, pair in matrices.items():
        yield name, top_scores(*pair, criterion, ks[name], name)


def nan_score(index: int, weight: Tensor, criterion: str, name: str = "") -> ScoringError:
    """The error for a score that is not a number, at a flat index of the matrix of that name, if it has one."""
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), weight.shape))
    return ScoringError(
        f"{name and name + ': '}the {criterion!r} score at flat index {index}, position {position} of the "
        f"{tuple(weight.shape)} weight, "
        "is not a number; the weight or its statistic is NaN, infinite times zero, or a negative sum of squares"
    )


@torch.no_grad()
def apply_sparse_(elements: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """``elements[offsets] *= scale`` (scale 0 writes +0); returns the old values. ``elements`` is one-dimensional."""
    old = elements[offsets]
    elements[offsets] = scaled(old, scale)
    return old


@torch.no_grad()
def restore_sparse_(elements: Tensor, offsets: Tensor, old: Tensor) -> None:
    """``elements[offsets] = old``, bit-identical."""
    elements[offsets] = old


def apply_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], scale: float) -> list[Tensor]:
    """:func:`apply_sparse_` of several matrices, one after the other; returns the old values of each."""
    return [apply_sparse_(*pair, scale) for pair in zip(elements, offsets, strict=True)]


def restore_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """:func:`restore_sparse_` of several matrices, one after the other."""
    for weight, where, values in zip(elements, offsets, old, strict=True):
        restore_sparse_(weight, where, values)


def scaled(old: Tensor, scale: float) -> Tensor:
    """``old * scale`` in float32 (float64 for float64), rounded to the dtype of ``old``; all +0 where scale is 0."""
    if scale == 0:
        return torch.zeros_like(old)
    wide = torch.float64 if old.dtype == torch.float64 else torch.float32
    return (old.to(wide) * scale).to(old.dtype)


def add_product_(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """``acc += dy.T @ x``; the inputs are converted to the dtype of ``acc`` unless the device can sum them in it."""
    if acc.dtype != dy.dtype and takes_as_they_are(acc, dy):
        torch.addmm(acc, dy.T, x, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(dy.to(acc.dtype).T, x.to(acc.dtype))


def takes_as_they_are(acc: Tensor, dy: Tensor) -> bool:
    """Whether torch multiplies such inputs without converting them first."""
    return acc.dtype == dy.dtype or (acc.dtype == torch.float32 and forms_float32(acc.device, dy.dtype))


@functools.cache
def forms_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product of such 16-bit inputs can add to a float32 sum.

    By torch's sources it can on CUDA devices since version 2.10. Versions before 2.8 do not know ``out_dtype``; 2.8 and
    2.9 want a sum of the inputs' dtype and go wrong with ``out``. So a product of ones is tried, not a version read.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    one, acc = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(acc, one, one, out_dtype=torch.float32, out=acc)
    except (RuntimeError, TypeError):
        return False
    return bool((acc == 9).all())
