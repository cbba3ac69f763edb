"""The ``cuda`` backend: passes the addresses of validated tensors and a stream to the compiled extension.

``fastprune.ops`` is the only caller. In: tensors on one CUDA device, any float dtype. Out: results bit-identical to
those of the same function of :mod:`fastprune.ops.reference`. Work is queued on the current stream of the tensors'
device, and torch allocates all memory. Selection and set difference synchronize, because they return a count or report
an error; sparse writes do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from fastprune.errors import ArgumentError, BackendError
from fastprune.ops import memory, reference
from fastprune.ops.score_source import Source, dtype_name, missing_formula

# Bytes of workspace from which on one launch has enough work.
_WORKSPACE = 160 << 20


def top_scores_of_each(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]], criterion: str, ks: Mapping[str, int]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """:func:`fastprune.ops.reference.top_scores_of_each`, bit-identical, of as many matrices a launch as fit.

    Args:
        matrices: On one device; dtypes may differ.
        criterion: One for all.
        ks: How many of each; all if it has fewer.

    Raises:
        ScoringError: A score is not a number; the message names the matrix and the first flat index.
    """
    lengths = {name: min(ks[name], weight.numel()) for name, (weight, _) in matrices.items()}
    for names in _launches(matrices, lengths):
        some, each = {name: matrices[name] for name in names}, [lengths[name] for name in names]
        _, indices, values = _select(some, criterion, [1] * len(names), each, with_sources=False)
        yield from zip(names, zip(indices.split(each), values.split(each), strict=True), strict=True)


def top_scores_of_all(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]], criterion: str, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best scores of all matrices together, ties by the place of the matrix and then by index.

    Args:
        matrices: As for :func:`top_scores_of_each`, at least one.
        criterion: One for all.
        k: How many of all; all if there are fewer.

    Returns:
        int64 places of the matrices, int64 flat indices in them and float32 values, each ``(k,)``, by descending score.

    Raises:
        ScoringError: As :func:`top_scores_of_each`.
    """
    k = min(k, sum(weight.numel() for weight, _ in matrices.values()))
    return _select(matrices, criterion, [len(matrices)], [k], with_sources=True)


def _launches(matrices: Mapping[str, tuple[Tensor, Tensor | None]], ks: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in runs that need about ``_WORKSPACE``, or of one matrix."""
    shapes = {name: (weight.numel(), ks[name]) for name, (weight, _) in matrices.items()}
    # Experts are thousands of one shape: each shape is asked about once.
    with _device_of([weight for weight, _ in matrices.values()]) as (extension, device, _):
        needs = {(n, k): extension.top_scores_workspace([n], [1], [k], device) for n, k in {*shapes.values()}}
    names: list[str] = []
    used = 0
    for name, shape in shapes.items():
        if names and used + needs[shape] > _WORKSPACE:
            yield names
            names, used = [], 0
        names.append(name)
        used += needs[shape]
    if names:
        yield names


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


def apply_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], scale: float) -> list[Tensor]:
    """:func:`fastprune.ops.reference.apply_sparse_each_` in one launch, bit-identical; a NaN keeps its payload.

    Args:
        elements: One-dimensional, on one device; dtypes may differ.
        offsets: int64, of each.
        scale: One for all.
    """
    offsets = [each.contiguous() for each in offsets]
    old = [weight.new_empty(each.shape) for weight, each in zip(elements, offsets, strict=True)]
    _write(elements, offsets, old, scale)
    return old


def restore_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """:func:`fastprune.ops.reference.restore_sparse_each_` in one launch, bit-identical."""
    _write(elements, [each.contiguous() for each in offsets], [each.contiguous() for each in old], None)


def _select(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]],
    criterion: str,
    group_sizes: list[int],
    ks: list[int],
    *,
    with_sources: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not matrices:
        raise ArgumentError("expected at least one, got none", argument="matrices")
    largest = max(weight.numel() for weight, _ in matrices.values())
    if largest >= 1 << 32:
        raise BackendError(f"backend 'cuda' selects from matrices of fewer than 2^32 weights, got one of {largest}")
    read = [Source.of(*pair, criterion) for pair in matrices.values()]
    sources = [
        (
            *(source.weight.data_ptr(), dtype_name(source.weight), source.weight.numel(), source.columns),
            *(source.statistic.data_ptr(), dtype_name(source.statistic), *source.strides),
            source.formula,
        )
        for source in read
    ]
    some = read[0].weight
    values = some.new_empty(sum(ks), dtype=torch.float32)
    indices = some.new_empty(sum(ks), dtype=torch.int64)
    places = torch.empty_like(indices) if with_sources else indices[:0]
    tensors = [tensor for source in read for tensor in (source.weight, source.statistic)]
    with _device_of(tensors) as (extension, device, stream):
        if read[0].formula not in extension.formulas:
            raise missing_formula("cuda", read[0].formula)
        sizes = [source.weight.numel() for source in read]
        workspace = _bytes(extension.top_scores_workspace(sizes, group_sizes, ks, device), some)
        nan = extension.top_scores(
            *(sources, group_sizes, ks, workspace.data_ptr(), workspace.numel()),
            *(places.data_ptr() if with_sources else 0, indices.data_ptr(), values.data_ptr(), device, stream),
        )
    if nan is not None:
        place, index = nan
        name = list(matrices)[place]
        raise reference.nan_score(index, matrices[name][0], criterion, name)
    return places, indices, values


def _write(elements: Sequence[Tensor], offsets: list[Tensor], old: list[Tensor], scale: float | None) -> None:
    if not elements:
        return
    weights = [
        (weight.data_ptr(), where.data_ptr(), kept.data_ptr(), where.numel(), dtype_name(weight))
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
        memory.note_write(weight)


@contextmanager
def _device_of(tensors: Sequence[Tensor]) -> Iterator[tuple[ModuleType, int, int]]:
    """The extension, the device's number and the address of its current stream, with that device as the current one."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1 or tensors[0].device.type != "cuda":
        raise ArgumentError(f"expected tensors on one CUDA device, got {', '.join(sorted(map(str, devices)))}")
    extension = importlib.import_module("fastprune._cuda")
    with torch.cuda.device(tensors[0].device):
        yield extension, torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)
