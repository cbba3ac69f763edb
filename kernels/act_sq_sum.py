"""Sum of squared inputs per feature.

    acc[j] += sum_t x[t, j]**2        in float64, in the order of fastprune.ops.reference.accumulate_act_sq_sum

x (n_tokens, in) is bfloat16, float16 or float32, acc (in,) float32 or float64. FLOPs: 2 * in * n_tokens; bytes: those
of x, once. Memory sets the time: 32 MB for 4096 tokens of 4096 features in bfloat16 are 11 us at 3 TB/s.

The order is part of the definition: tokens t, t + 128, t + 256, ... are added one after the other, and the 128 sums
are folded in half until one is left. A program keeps those 128 sums for its columns in registers and reads x in blocks
of 128 tokens, so it is bit-identical to the reference on any device. Squares of 16- and 32-bit floats are exact in
float64: whether the compiler fuses product and addition makes no difference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastprune_kernels import launching
from torch import Tensor

LANES = 128
# 32 columns of bfloat16 are 64 bytes, what memory delivers at the least. in = 4096 gives 128 programs for the 132
# multiprocessors of an H100; 16 columns would fill them no better and read half of what is fetched.
BLOCK_IN = 32
# Blocks of tokens that are read before the first is used: 32 KB in flight a program (bfloat16), where 3 TB/s at a
# latency of 1 us ask for 23 KB a multiprocessor.
UNROLL = 4
NUM_WARPS = 8


@triton.jit(do_not_specialize=["n_tokens"])
def _act_sq_sum_kernel(
    acc_ptr,
    x_ptr,
    n_tokens,
    n_in,
    stride_acc,
    stride_x_token,
    stride_x_in,
    LANES: tl.constexpr,
    LOG2_LANES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """``acc[j] += sum_t x[t, j]**2`` for a block of columns."""
    column = tl.program_id(0).to(tl.int64) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    lane = tl.arange(0, LANES)
    in_columns = column < n_in
    x_ptrs = x_ptr + lane.to(tl.int64)[:, None] * stride_x_token + (column * stride_x_in)[None, :]
    stride_block = tl.full((), LANES, tl.int64) * stride_x_token
    sums = tl.zeros((LANES, BLOCK_IN), tl.float64)
    for first in range(0, n_tokens, LANES * UNROLL):
        for block in tl.static_range(UNROLL):
            real = first + block * LANES + lane < n_tokens
            x = tl.load(x_ptrs + block * stride_block, mask=real[:, None] & in_columns[None, :], other=0.0)
            x = x.to(tl.float32).to(tl.float64)
            sums += x * x
        x_ptrs += UNROLL * stride_block
    # Reshaped to (2, n / 2), lane i is paired with lane i + n / 2, and a sum of two has one order only.
    for halving in tl.static_range(LOG2_LANES):
        sums = tl.sum(tl.reshape(sums, (2, LANES >> (halving + 1), BLOCK_IN)), axis=0)
    acc_ptrs = acc_ptr + column * stride_acc
    acc = tl.load(acc_ptrs, mask=in_columns, other=0.0)
    acc = acc.to(tl.float64) + tl.reshape(sums, (BLOCK_IN,))
    tl.store(acc_ptrs, acc.to(acc_ptr.dtype.element_ty), mask=in_columns)


def accumulate_act_sq_sum(acc: Tensor, x: Tensor) -> None:
    """``acc[j] += sum_t x[t, j]**2``, bit-identical to the reference.

    Args:
        acc: ``(in,)``, float32 or float64, added to in place; any stride.
        x: ``(n_tokens, in)``, bfloat16, float16 or float32; any strides.

    Raises:
        TypeError: A dtype that the kernel does not take.
    """
    launching.check_inputs(x)
    launching.check_accumulators(acc, float64=True)
    if x.numel() == 0:
        return
    with launching.on_device_of(x):
        _act_sq_sum_kernel[(triton.cdiv(x.shape[1], BLOCK_IN),)](
            acc,
            x,
            x.shape[0],
            x.shape[1],
            acc.stride(0),
            x.stride(0),
            x.stride(1),
            LANES=LANES,
            LOG2_LANES=LANES.bit_length() - 1,
            BLOCK_IN=BLOCK_IN,
            UNROLL=UNROLL,
            num_warps=NUM_WARPS,
        )
