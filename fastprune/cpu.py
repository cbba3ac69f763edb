"""Launchers of the CPU operations: from validated tensors to BLAS calls and to the addresses that the extension takes.

``fastprune.ops`` is the only caller. Products go through BLAS; what follows a product, and selection and sparse writes,
go through ``fastprune._cpp``. The per-example loop serves plain torch too, on any device, with the same products, so
that the extension's results can be compared with torch's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastprune import reference

# Bytes of the product of one example and one panel of rows. Product and accumulator panel are read back right after
# they were written, so they should still be in the second-level caches (2 MB a core here).
PANEL_BYTES = 2 << 20

Epilogue = Callable[[Tensor, Tensor], None]


def add_abs(acc: Tensor, gradient: Tensor) -> None:
    """``acc += |gradient|`` in torch; overwrites ``gradient``."""
    acc.add_(gradient.abs_())


def add_square(acc: Tensor, gradient: Tensor) -> None:
    """``acc += gradient**2`` in torch; overwrites ``gradient``."""
    acc.add_(gradient.square_())


def cpp_epilogue(square: bool) -> Epilogue:
    """The same as :func:`add_abs` or :func:`add_square`, in one pass that leaves ``gradient`` alone."""
    from fastprune import _cpp

    threads = torch.get_num_threads()

    def add(acc: Tensor, gradient: Tensor) -> None:
        rows, columns = gradient.shape
        _cpp.add_examples_gradient(
            _cpp_dtype(acc), square, acc.data_ptr(), acc.stride(0), gradient.data_ptr(), rows, columns, threads
        )

    return add


def accumulate_per_example(
    acc: Tensor, dy: Tensor, x: Tensor, spans: list[tuple[int, int]], epilogue: Epilogue
) -> None:
    """Form each example's gradient panel by panel and hand it to ``epilogue`` while it is in cache.

    Args:
        acc: ``(out, in)`` with unit column stride, float32 or float64.
        dy: ``(n_tokens, out)`` in the dtype of ``acc``.
        x: ``(n_tokens, in)`` in the dtype of ``acc``.
        spans: First and end token of each example, none empty.
        epilogue: Called with a panel of ``acc`` and the example's gradient for it, both ``(rows, in)``.
    """
    n_rows, n_columns = acc.shape
    panel = max(1, PANEL_BYTES // max(1, n_columns * acc.element_size()))
    product = acc.new_empty(min(panel, n_rows), n_columns)
    inputs = [x[start:end] for start, end in spans]
    for first in range(0, n_rows, panel):
        target = acc[first : first + panel]
        gradient = product[: len(target)]
        errors = dy[:, first : first + panel].T
        for (start, end), tokens in zip(spans, inputs, strict=True):
            torch.mm(errors[:, start:end], tokens, out=gradient)
            epilogue(target, gradient)


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
