"""Launchers of the CUDA operations: from validated tensors to the addresses and the stream that the extension takes.

``fastprune.ops`` is the only caller. In: tensors on one CUDA device, any float dtype. Out: what the same function of
:mod:`fastprune.reference` returns, to the same bits. Work is queued on the current stream of the tensors' device, and
all memory comes from torch. Selection and set difference wait for the device, because they report or return a count;
sparse writes do not. This module knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from fastprune import reference
from fastprune.errors import ArgumentError, BackendError, ScoringError

_FORMULAS = {
    "signed": "negated_product",
    "signed_reverse": "product",
    "abs": "abs_weight_times",
    "abs_of_sum": "abs_product",
    "fisher": "square_times",
    "wanda": "abs_weight_times",  # with the root of the statistic
    "magnitude": "abs_weight",
}


def top_scores(weight: Tensor, statistic: Tensor | None, criterion: str, k: int) -> tuple[Tensor, Tensor]:
    """:func:`fastprune.reference.top_scores`, to the same bits."""
    return top_scores_of_each([weight], [statistic], criterion, [k])[0]


def top_scores_of_each(
    weights: Sequence[Tensor], statistics: Sequence[Tensor | None], criterion: str, ks: Sequence[int]
) -> list[tuple[Tensor, Tensor]]:
    """:func:`top_scores` of each of several matrices in one launch.

    Args:
        weights: Matrices on one device; dtypes may differ.
        statistics: One for each, as for :func:`fastprune.reference.top_scores`.
        criterion: One for all.
        ks: How many of each; all if it has fewer.

    Returns:
        Indices and values of each.

    Raises:
        ScoringError: A score is not a number; the message names the matrix by its place and the first flat index.
    """
    ks = [min(k, weight.numel()) for weight, k in zip(weights, ks, strict=True)]
    _, indices, values = _select(weights, statistics, criterion, [1] * len(ks), ks, with_sources=False)
    return list(zip(indices.split(ks), values.split(ks), strict=True))


def top_scores_of_all(
    weights: Sequence[Tensor], statistics: Sequence[Tensor | None], criterion: str, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best scores of all matrices together, ties by the place of the matrix and then by index.

    Args:
        weights: As for :func:`top_scores_of_each`, at least one.
        statistics: As for :func:`top_scores_of_each`.
        criterion: One for all.
        k: How many of all; all if there are fewer.

    Returns:
        int64 places of the matrices, int64 flat indices in them and float32 values, each ``(k,)``, by descending score.

    Raises:
        ScoringError: As :func:`top_scores_of_each`.
    """
    k = min(k, sum(weight.numel() for weight in weights))
    return _select(weights, statistics, criterion, [len(weights)], [k], with_sources=True)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """The values of ``a`` that are not in ``b``, ascending.

    Args:
        a: int64 ``(n,)``, ascending and unique.
        b: int64 ``(m,)``, ascending, on the same device.
    """
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    with _device_of([a, b]) as (extension, device, stream):
        workspace = _bytes(extension.difference_workspace(len(a), device), a)
        count = extension.difference(
            *(a.data_ptr(), len(a), b.data_ptr(), len(b), out.data_ptr()),
            *(workspace.data_ptr(), workspace.numel(), device, stream),
        )
    return out[:count].clone()


def apply_sparse_(elements: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """:func:`fastprune.reference.apply_sparse_`, to the same bits; a NaN keeps its payload."""
    return apply_sparse_each_([elements], [offsets], scale)[0]


def apply_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], scale: float) -> list[Tensor]:
    """:func:`apply_sparse_` of several matrices on one device in one launch; returns the old values of each."""
    offsets = [each.contiguous() for each in offsets]
    old = [weight.new_empty(each.shape) for weight, each in zip(elements, offsets, strict=True)]
    _write(elements, offsets, old, scale)
    return old


def restore_sparse_(elements: Tensor, offsets: Tensor, old: Tensor) -> None:
    """:func:`fastprune.reference.restore_sparse_`, to the same bits."""
    restore_sparse_each_([elements], [offsets], [old])


def restore_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """:func:`restore_sparse_` of several matrices on one device in one launch."""
    _write(elements, [each.contiguous() for each in offsets], [each.contiguous() for each in old], None)


def _select(
    weights: Sequence[Tensor],
    statistics: Sequence[Tensor | None],
    criterion: str,
    group_sizes: list[int],
    ks: list[int],
    *,
    with_sources: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not weights:
        raise ArgumentError("weights: expected at least one matrix, got none")
    largest = max(weight.numel() for weight in weights)
    if largest >= 1 << 32:
        raise BackendError(f"backend 'cuda' selects from matrices of fewer than 2^32 weights, got one of {largest}")
    flats = [weight.detach().contiguous() for weight in weights]
    spread = [_spread(*pair, criterion) for pair in zip(flats, statistics, strict=True)]
    sources = []
    for flat, (statistic, *strides) in zip(flats, spread, strict=True):
        weight_part = (flat.data_ptr(), _name(flat), flat.numel(), flat.shape[-1] if flat.dim() else 1)
        sources.append((*weight_part, statistic.data_ptr(), _name(statistic), *strides, _FORMULAS[criterion]))
    values = flats[0].new_empty(sum(ks), dtype=torch.float32)
    indices = flats[0].new_empty(sum(ks), dtype=torch.int64)
    places = torch.empty_like(indices) if with_sources else None
    with _device_of([*flats, *(statistic for statistic, _, _ in spread)]) as (extension, device, stream):
        sizes = [flat.numel() for flat in flats]
        workspace = _bytes(extension.top_scores_workspace(sizes, group_sizes, ks, device), flats[0])
        nan = extension.top_scores(
            *(sources, group_sizes, ks, workspace.data_ptr(), workspace.numel()),
            *(0 if places is None else places.data_ptr(), indices.data_ptr(), values.data_ptr(), device, stream),
        )
    if nan is not None:
        place, index = nan
        error = reference.nan_score(index, weights[place], criterion)
        raise error if len(weights) == 1 else ScoringError(f"matrix {place} of {len(weights)}: {error}")
    return places, indices, values


def _spread(weight: Tensor, statistic: Tensor | None, criterion: str) -> tuple[Tensor, int, int]:
    """The statistic as the kernels read it, with its row and column stride, 0 where it is broadcast."""
    if statistic is None:
        return weight.new_empty(0, dtype=torch.float32), 0, 0
    statistic = statistic.detach()
    if criterion == "wanda":
        statistic = statistic.to(torch.promote_types(weight.dtype, statistic.dtype)).sqrt()
    statistic = statistic.expand(weight.shape)
    if weight.dim() == 2:
        return statistic, *statistic.stride()
    return statistic.contiguous(), weight.shape[-1] if weight.dim() else 1, 1


def _write(elements: Sequence[Tensor], offsets: list[Tensor], old: list[Tensor], scale: float | None) -> None:
    if not elements:
        return
    weights = [
        (weight.data_ptr(), where.data_ptr(), kept.data_ptr(), where.numel(), _name(weight))
        for weight, where, kept in zip(elements, offsets, old, strict=True)
    ]
    with _device_of([*elements, *offsets, *old]) as (extension, device, stream):
        workspace = _bytes(extension.sparse_workspace(len(weights)), elements[0])
        at = (workspace.data_ptr(), workspace.numel(), device, stream)
        if scale is None:
            extension.restore_sparse(weights, *at)
        else:
            extension.apply_sparse(weights, scale, *at)
    for weight in elements:
        torch.autograd.graph.increment_version(weight)  # a write through an address is not seen by autograd


@contextmanager
def _device_of(tensors: Sequence[Tensor]) -> Iterator[tuple[ModuleType, int, int]]:
    """The extension, the device's number and the address of its current stream, with that device as the current one."""
    from fastprune import _cuda

    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or tensors[0].device.type != "cuda":
        raise ArgumentError(f"expected tensors on one CUDA device, got {', '.join(sorted(map(str, devices)))}")
    with torch.cuda.device(tensors[0].device):
        yield _cuda, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
