"""The ``cpp`` backend: passes the addresses of validated CPU tensors to the compiled extension.

``fastprune.ops`` is the only caller.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor

from fastprune.ops import memory, reference
from fastprune.ops.criteria import GRADIENT_SUMS
from fastprune.ops.score_source import Source, dtype_name, missing_formula


@functools.cache
def has_gradient_kernel() -> bool:
    """Whether the processor (AVX2 or AVX-512) has a kernel for the gradients of examples."""
    return _extension().has_gradient_kernel()


def accumulate_per_example(accs: Mapping[str, Tensor], dy: Tensor, x: Tensor, spans: list[tuple[int, int]]) -> None:
    """Add each example's gradient, its absolute value and its square, as asked, while it is in registers.

    Args:
        accs: Accumulators by the names of their statistics; ``(out, in)`` with unit column stride and equal row
            strides, float32 or float64.
        dy: ``(n_tokens, out)``, any float dtype, strided as it may be.
        x: ``(n_tokens, in)``, of the dtype of ``dy``.
        spans: First and end token of each example, none empty.
    """
    offsets, some = torch.tensor(spans, dtype=torch.int64), next(iter(accs.values()))
    _extension().add_gradients(
        _cpp_dtype(some),
        *(accs[name].data_ptr() if name in accs else 0 for name in GRADIENT_SUMS),
        some.stride(0),
        _cpp_dtype(dy),
        dy.data_ptr(),
        *dy.stride(),
        dy.shape[1],
        x.data_ptr(),
        *x.stride(),
        x.shape[1],
        offsets.data_ptr(),
        len(spans),
        torch.get_num_threads(),
    )
    for acc in accs.values():
        memory.note_write(acc)


def accumulate_act_sq_sum(acc: Tensor, x: Tensor) -> None:
    """:func:`fastprune.ops.reference.accumulate_act_sq_sum`, bit-identical."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if wide.stride(1) != 1:
        wide = wide.contiguous()
    sums = acc.contiguous()
    _extension().add_column_squares(
        _cpp_dtype(sums),
        sums.data_ptr(),
        _cpp_dtype(wide),
        wide.data_ptr(),
        wide.stride(0),
        *wide.shape,
        torch.get_num_threads(),
    )
    if sums is acc:
        memory.note_write(acc)
    else:
        acc.copy_(sums)


def top_scores_of_each(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]], criterion: str, ks: Mapping[str, int]
) -> Iterable[tuple[str, tuple[Tensor, Tensor]]]:
    """:func:`fastprune.ops.reference.top_scores_of_each`, bit-identical, without storing all scores."""
    sources = {name: Source.of(*pair, criterion) for name, pair in matrices.items()}
    found = {}
    for name, source in sources.items():
        k = min(ks[name], source.weight.numel())
        found[name] = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=torch.float32)
    selections = [
        (
            *(source.weight.data_ptr(), _cpp_dtype(source.weight), source.weight.numel(), source.columns),
            *(source.statistic.data_ptr(), _cpp_dtype(source.statistic), *source.strides),
            _formula(source.formula),
            *(found[name][0].numel(), found[name][0].data_ptr(), found[name][1].data_ptr()),
        )
        for name, source in sources.items()
    ]
    first_nan = _extension().top_scores(selections, torch.get_num_threads())
    for (name, (weight, _)), index in zip(matrices.items(), first_nan, strict=True):
        if index >= 0:
            raise reference.nan_score(index, weight, criterion, name)
    return found.items()


def apply_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], scale: float) -> list[Tensor]:
    """:func:`fastprune.ops.reference.apply_sparse_each_`, bit-identical."""
    extension, every_old = _extension(), []
    for weight, where in zip(elements, offsets, strict=True):
        old, where = torch.empty(where.shape, dtype=weight.dtype), where.contiguous()
        extension.gather(weight.element_size(), weight.data_ptr(), where.data_ptr(), where.numel(), old.data_ptr())
        restore_sparse_each_([weight], [where], [reference.scaled(old, scale)])
        every_old.append(old)
    return every_old


def restore_sparse_each_(elements: Sequence[Tensor], offsets: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    """:func:`fastprune.ops.reference.restore_sparse_each_`, bit-identical."""
    extension = _extension()
    for weight, where, values in zip(elements, offsets, old, strict=True):
        where, values = where.contiguous(), values.contiguous()
        extension.scatter(weight.element_size(), weight.data_ptr(), where.data_ptr(), where.numel(), values.data_ptr())
        memory.note_write(weight)


@functools.cache
def _extension() -> ModuleType:
    """The compiled module, imported on the first call: ``import fastprune`` needs no extension."""
    return importlib.import_module("fastprune._cpp")


def _formula(name: str) -> object:
    formula = getattr(_extension().Formula, name, None)
    if formula is None:
        raise missing_formula("cpp", name)
    return formula


def _cpp_dtype(tensor: Tensor) -> object:
    return getattr(_extension().Dtype, dtype_name(tensor))
