"""Launcher of the per-example kernel: sums of absolute or squared gradients, for one weight or for several at once.

From tensors to the arguments of :func:`fastprune_kernels.per_example.grad_statistics_kernel`, where the formula, the
cost and the reasons stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
from fastprune_kernels import launching
from fastprune_kernels.per_example import grad_statistics_kernel
from fastprune_kernels.tiling import BlockShape, block_shape
from torch import Tensor

STATISTICS = ("grad_abs_sum", "grad_sq_sum", "grad_sum")
MAX_GROUP = 3  # weights in one launch: q, k and v


def accumulate_grad_statistics(
    matrices: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    x: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    shape: BlockShape | None = None,
) -> None:
    """Add one or two statistics of the examples' gradients, for one or several weights with the same input.

    Args:
        matrices: For each weight (q, k and v, say) its ``dy`` ``(n_tokens, out)`` and its accumulators by the name of
            the statistic, the same of :data:`STATISTICS` for all. An accumulator is float32 ``(out, in)`` and is added
            to in place; two accumulators of one weight have the same strides.
        x: ``(n_tokens, in)``; bfloat16, float16 or float32 like every ``dy``, and strided as it may be.
        starts: int64 ``(n_examples,)``, first row of each example in ``dy`` and ``x``; on any device.
        lengths: int64 ``(n_examples,)``, its number of rows, which may be 0. Rows of no example are never read.
        shape: Used instead of what :func:`~fastprune_kernels.tiling.block_shape` chooses.

    For one input and block shape, results are bit-identical however examples are split over launches and weights over
    groups.

    Raises:
        TypeError: A dtype that the kernel does not take.
        ValueError: Statistics or strides that the kernel does not take.
    """
    names = _names([accs for _, accs in matrices])
    listed = [(dy, [accs[name] for name in names]) for dy, accs in matrices if dy.shape[1] > 0]
    for dy, accs in listed:
        launching.check_inputs(dy, x)
        launching.check_accumulators(*accs)
        if any(launching.strides(acc) != launching.strides(accs[0]) for acc in accs):
            raise ValueError(f"accumulators of one weight: expected equal strides, got {[a.stride() for a in accs]}")
    if not listed or x.shape[1] == 0 or len(starts) == 0:
        return
    # The kernel selects pointers, sizes and row strides by matrix, but has one stride between columns. Selecting two
    # accumulators in addition to three tiles in registers would spill.
    uniform = len({(dy.stride(1), accs[0].stride(1)) for dy, accs in listed}) == 1
    size = MAX_GROUP if uniform and len(names) == 1 else 1
    for first in range(0, len(listed), size):
        _launch(listed[first : first + size], names, x, starts, lengths, shape)


def _names(accumulators: list[Mapping[str, Tensor]]) -> list[str]:
    """The one or two statistics asked for, in the order of :data:`STATISTICS`."""
    names = [name for name in STATISTICS if name in accumulators[0]]
    if any(set(accs) != set(names) for accs in accumulators) or not 1 <= len(names) <= 2 or names == ["grad_sum"]:
        raise ValueError(
            f"statistics: expected one or two of {STATISTICS}, the same for all weights and not grad_sum alone, "
            f"got {[sorted(accs) for accs in accumulators]}"
        )
    return names


def _launch(
    matrices: Sequence[tuple[Tensor, Sequence[Tensor]]],
    names: Sequence[str],
    x: Tensor,
    starts: Tensor,
    lengths: Tensor,
    shape: BlockShape | None,
) -> None:
    """One launch over the tiles of up to three weights."""
    dys, accs = [dy for dy, _ in matrices], [accs for _, accs in matrices]
    with launching.on_device_of(x):
        shape = shape or block_shape(
            sum(dy.shape[1] for dy in dys),
            x.shape[1],
            x.dtype,
            # Lengths on a device are not waited for; rows an example is what they are in a padded batch.
            float(lengths.double().mean()) if not lengths.is_cuda else len(x) / len(lengths),
            launching.capability(),
            n_statistics=len(names),
            vectorized=all(map(launching.is_vectorized, (*dys, x))),
        )
        for tensor, columns in ((x, shape.block_in), *((dy, shape.block_out) for dy in dys)):
            launching.check_offsets(tensor, shape.block_tokens, columns)
        for acc, *_ in accs:
            launching.check_offsets(acc, shape.block_out, shape.block_in)
        rows = sum(triton.cdiv(dy.shape[1], shape.block_out) for dy in dys)
        grad_statistics_kernel[(rows * triton.cdiv(x.shape[1], shape.block_in),)](
            tuple(acc[0] for acc in accs),
            accs[0][1] if len(names) == 2 else None,
            tuple(dys),
            x,
            starts.to(x.device, non_blocking=True),
            lengths.to(x.device, non_blocking=True),
            tuple(dy.shape[1] for dy in dys),
            x.shape[1],
            len(starts),
            tuple(acc[0].stride(0) for acc in accs),
            accs[0][0].stride(1),
            tuple(dy.stride(0) for dy in dys),
            dys[0].stride(1),
            x.stride(0),
            x.stride(1),
            STATISTIC=names[0],
            SECOND=names[1] if len(names) == 2 else None,
            N_MATRICES=len(matrices),
            INTERPRETED=launching.INTERPRETED,
            BLOCK_OUT=shape.block_out,
            BLOCK_IN=shape.block_in,
            BLOCK_TOKENS=shape.block_tokens,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )
