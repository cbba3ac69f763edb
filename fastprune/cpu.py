"""Launchers of the CPU operations: from validated tensors to the addresses that the extension takes.

``fastprune.ops`` is the only caller.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from fastprune import reference


@functools.cache
def has_gradient_kernel() -> bool:
    """Whether the processor (AVX2 or AVX-512) has a kernel for the gradients of examples."""
    from fastprune import _cpp

    return _cpp.has_gradient_kernel()


def accumulate_per_example(accs: Mapping[str, Tensor], dy: Tensor, x: Tensor, spans: list[tuple[int, int]]) -> None:
    """Add each example's gradient, its absolute value and its square, as asked, while it is in registers.

    Args:
        accs: Accumulators by the names of their statistics; ``(out, in)`` with unit column stride and equal row
            strides, float32 or float64.
        dy: ``(n_tokens, out)``, any float dtype, strided as it may be.
        x: ``(n_tokens, in)``, of the dtype of ``dy``.
        spans: First and end token of each example, none empty.
    """
    from fastprune import _cpp

    offsets, some = torch.tensor(spans, dtype=torch.int64), next(iter(accs.values()))
    _cpp.add_gradients(
        _cpp_dtype(some),
        *(accs[name].data_ptr() if name in accs else 0 for name in reference.GRADIENT_SUMS),
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


def accumulate_act_sq_sum(acc: Tensor, x: Tensor) -> None:
    """:func:`fastprune.reference.accumulate_act_sq_sum`, to the same bits."""
    from fastprune import _cpp

    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    if wide.stride(1) != 1:
        wide = wide.contiguous()
    sums = acc.contiguous()
    _cpp.add_column_squares(
        _cpp_dtype(sums),
        sums.data_ptr(),
        _cpp_dtype(wide),
        wide.data_ptr(),
        wide.stride(0),
        *wide.shape,
        torch.get_num_threads(),
    )
    if sums is not acc:
        acc.copy_(sums)


def top_scores(weight: Tensor, statistic: Tensor | None, criterion: str, k: int) -> tuple[Tensor, Tensor]:
    """:func:`fastprune.reference.top_scores`, to the same bits, without forming all scores in memory."""
    from fastprune import _cpp

    formula = {
        "signed": _cpp.Formula.negated_product,
        "signed_reverse": _cpp.Formula.product,
        "abs": _cpp.Formula.abs_weight_times,
        "abs_of_sum": _cpp.Formula.abs_product,
        "fisher": _cpp.Formula.square_times,
        "wanda": _cpp.Formula.abs_weight_times,
        "magnitude": _cpp.Formula.abs_weight,
    }[criterion]
    if criterion == "wanda":
        statistic = statistic.to(torch.promote_types(weight.dtype, statistic.dtype)).sqrt()
    flat = weight.detach().contiguous()
    columns = flat.shape[-1] if flat.dim() else 1
    if statistic is None:
        statistic, strides = flat.new_empty(0, dtype=torch.float32), (0, 0)
    else:
        statistic = statistic.detach().expand(flat.shape)
        if flat.dim() != 2:
            statistic = statistic.contiguous()
        strides = statistic.stride() if flat.dim() == 2 else (columns, 1)
    k = min(k, flat.numel())
    indices = torch.empty(k, dtype=torch.int64)
    values = torch.empty(k, dtype=torch.float32)
    nan = _cpp.top_scores(
        _cpp_dtype(flat),
        flat.data_ptr(),
        flat.numel(),
        columns,
        _cpp_dtype(statistic),
        statistic.data_ptr(),
        *strides,
        formula,
        k,
        torch.get_num_threads(),
        indices.data_ptr(),
        values.data_ptr(),
    )
    if nan >= 0:
        raise reference.nan_score(nan, weight, criterion)
    return indices, values


def apply_sparse_(elements: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """:func:`fastprune.reference.apply_sparse_`, to the same bits."""
    from fastprune import _cpp

    old = torch.empty(offsets.shape, dtype=elements.dtype)
    offsets = offsets.contiguous()
    _cpp.gather(elements.element_size(), elements.data_ptr(), offsets.data_ptr(), offsets.numel(), old.data_ptr())
    restore_sparse_(elements, offsets, reference.scaled(old, scale))
    return old


def restore_sparse_(elements: Tensor, offsets: Tensor, old: Tensor) -> None:
    """:func:`fastprune.reference.restore_sparse_`, to the same bits."""
    from fastprune import _cpp

    offsets, old = offsets.contiguous(), old.contiguous()
    _cpp.scatter(elements.element_size(), elements.data_ptr(), offsets.data_ptr(), offsets.numel(), old.data_ptr())
    torch.autograd.graph.increment_version(elements)  # a write through an address is not seen by autograd


def _cpp_dtype(tensor: Tensor) -> object:
    from fastprune import _cpp

    return getattr(_cpp.Dtype, str(tensor.dtype).removeprefix("torch."))
