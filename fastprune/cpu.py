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

# Where an example's gradient is read back right after BLAS wrote it, the accumulator's tile and the products should
# still be in cache, but BLAS slows down on small tiles. Share of a plain GEMM's rate that the whole operation reaches
# with one thread (2 MB of second-level cache; rows x columns x examples of a tile):
#   1024 inputs,  80 tokens: 384 x 1024 x 1 77 %, 128 x 1024 x 1 91 %
#   2048 inputs, 250 tokens: 128 x 2048 x 1 63 %, 1024 x 2048 x 1 85 %, 1024 x 2048 x 8 92 %
#   8192 inputs, 250 tokens: 1024 x 4096 x 1 92 %, 1024 x 4096 x 4 102 %, 1024 x 2048 x 4 91 %
# So narrow weights take tiles that stay in the second-level cache. Wide ones take tiles that BLAS likes, and the
# products of several examples are added in one pass, which reads and writes the accumulator once for all of them.
NARROW_COLUMNS = 1024
NARROW_BYTES = 512 << 10
WIDE_TILE = (1024, 4096)
WIDE_BYTES = 64 << 20
WIDE_EXAMPLES = 8

Epilogue = Callable[[Tensor, Tensor], None]


def tile_of(n_rows: int, n_columns: int, item_size: int) -> tuple[int, int, int]:
    """Rows, columns and examples whose products are formed before they are added to the accumulator."""
    if n_columns <= NARROW_COLUMNS:
        rows = min(n_rows, max(1, NARROW_BYTES // max(1, n_columns * item_size)))
        columns, most, limit = n_columns, NARROW_BYTES, NARROW_BYTES
    else:
        rows, columns = min(n_rows, WIDE_TILE[0]), min(n_columns, WIDE_TILE[1])
        most, limit = WIDE_BYTES, WIDE_EXAMPLES
    return rows, columns, min(limit, max(1, most // max(1, rows * columns * item_size)))


def add_abs(acc: Tensor, gradients: Tensor) -> None:
    """``acc += |gradient|`` for one example after the other, in torch; overwrites ``gradients``."""
    for gradient in gradients.abs_():
        acc.add_(gradient)


def add_square(acc: Tensor, gradients: Tensor) -> None:
    """``acc += gradient**2`` for one example after the other, in torch; overwrites ``gradients``."""
    for gradient in gradients.square_():
        acc.add_(gradient)


def cpp_epilogue(square: bool) -> Epilogue:
    """The same as :func:`add_abs` or :func:`add_square`, in one pass that leaves ``gradients`` alone."""
    from fastprune import _cpp

    threads = torch.get_num_threads()

    def add(acc: Tensor, gradients: Tensor) -> None:
        _cpp.add_gradients(
            _cpp_dtype(acc), square, acc.data_ptr(), acc.stride(0), gradients.data_ptr(), *gradients.shape, threads
        )

    return add


def accumulate_per_example(
    acc: Tensor, dy: Tensor, x: Tensor, spans: list[tuple[int, int]], epilogue: Epilogue
) -> None:
    """Form the gradients of a few examples tile by tile and hand them to ``epilogue`` while they are in cache.

    Args:
        acc: ``(out, in)`` with unit column stride, float32 or float64.
        dy: ``(n_tokens, out)`` in the dtype of ``acc``.
        x: ``(n_tokens, in)`` in the dtype of ``acc``.
        spans: First and end token of each example, none empty.
        epilogue: Called with a tile ``(rows, columns)`` of ``acc`` and its gradients ``(examples, rows, columns)``.
    """
    n_rows, n_columns = acc.shape
    rows, columns, group = tile_of(n_rows, n_columns, acc.element_size())
    products = acc.new_empty(min(group, len(spans)) * rows * columns)
    inputs = {
        left: [x[start:end, left : left + columns] for start, end in spans]
        for left in range(0, n_columns, max(1, columns))
    }
    for top in range(0, n_rows, max(1, rows)):
        errors = [dy[start:end, top : top + rows].T for start, end in spans]
        for left, tokens in inputs.items():
            tile = acc[top : top + rows, left : left + columns]
            for first in range(0, len(spans), group):
                count = min(group, len(spans) - first)
                gradients = products[: count * tile.numel()].view(count, *tile.shape)
                for i in range(count):
                    torch.mm(errors[first + i], tokens[first + i], out=gradients[i])
                epilogue(tile, gradients)


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
