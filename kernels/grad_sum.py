"""Gradient of a weight, summed over all tokens: a matrix product that adds to a float32 result.

    acc[o, j] += sum_t dy[t, o] * x[t, j]

dy (n_tokens, out) and x (n_tokens, in) are bfloat16, float16 or float32, acc (out, in) is float32. FLOPs:
2 * out * in * n_tokens; bytes: 8 * out * in for acc, plus dy and x once for every band of tiles. Where torch can ask
cuBLAS for a float32 result of 16-bit inputs, that is the better choice; this kernel serves where it cannot.

A single tile of 128 x 256 leaves room in the registers, since there is no second sum as in the per-example kernel. The
product starts at zero and acc is added at the end: tensor cores cut off what does not fit when they add to their sum,
so a large acc inside it would lose a little, always in the same direction, at every step. For the same reason a launch
takes no more than 4096 tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastprune_kernels import launching
from fastprune_kernels.tiling import BlockShape, mma_shape, tile_position
from torch import Tensor

# 256 additions of 16 products, each cut towards zero, take 6e-6 off the sum, norm-wise, for products of one sign and
# for random ones alike (emulated in float64; 1.2e-5 with 8192 tokens). The statistics are to be right to 1e-5.
MAX_TOKENS = 4096


@triton.jit(do_not_specialize=["n_tokens"])
def _grad_sum_kernel(
    acc_ptr,
    dy_ptr,
    x_ptr,
    n_tokens,
    n_out,
    n_in,
    stride_acc_out,
    stride_acc_in,
    stride_dy_token,
    stride_dy_out,
    stride_x_token,
    stride_x_in,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """``acc += dy.T @ x`` for a tile of the weight."""
    tile_out, tile_in = tile_position(tl.program_id(0), tl.cdiv(n_out, BLOCK_OUT), tl.cdiv(n_in, BLOCK_IN))
    out = tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    token = tl.arange(0, BLOCK_TOKENS)
    origin_out = (tile_out * BLOCK_OUT).to(tl.int64)
    origin_in = (tile_in * BLOCK_IN).to(tl.int64)
    in_rows = out < n_out - tile_out * BLOCK_OUT
    in_columns = column < n_in - tile_in * BLOCK_IN
    dy_offsets = out[:, None] * stride_dy_out + token[None, :] * stride_dy_token
    x_offsets = token[:, None] * stride_x_token + column[None, :] * stride_x_in
    dy_ptr += origin_out * stride_dy_out
    x_ptr += origin_in * stride_x_in
    step_dy = tl.full((), BLOCK_TOKENS, tl.int64) * stride_dy_token
    step_x = tl.full((), BLOCK_TOKENS, tl.int64) * stride_x_token
    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for first in range(0, n_tokens, BLOCK_TOKENS):
        real = token < n_tokens - first
        dy = tl.load(dy_ptr + dy_offsets, mask=in_rows[:, None] & real[None, :], other=0.0)
        x = tl.load(x_ptr + x_offsets, mask=real[:, None] & in_columns[None, :], other=0.0)
        if INTERPRETED:  # its products of bfloat16 are wrong
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        if x_ptr.dtype.element_ty == tl.float32:  # for the reasons in per_example.py
            product += tl.dot(dy, x, input_precision="tf32x3")
        else:
            product = tl.dot(dy, x, product)
        dy_ptr += step_dy
        x_ptr += step_x
    # In two halves, since acc, the product and the product on its way to rows do not fit into the registers at once.
    halves = tl.split(tl.permute(tl.reshape(product, (BLOCK_OUT, 2, BLOCK_IN // 2)), (0, 2, 1)))
    acc_ptr += origin_out * stride_acc_out + origin_in * stride_acc_in
    column = tl.arange(0, BLOCK_IN // 2)
    for i in tl.static_range(2):
        in_tile = in_rows[:, None] & (column < n_in - tile_in * BLOCK_IN)[None, :]
        acc_ptrs = acc_ptr + out[:, None] * stride_acc_out + column[None, :] * stride_acc_in
        tl.store(acc_ptrs, tl.load(acc_ptrs, mask=in_tile, other=0.0) + halves[i], mask=in_tile)
        column += BLOCK_IN // 2


def grad_sum_shape(dtype: torch.dtype, capability: tuple[int, int], vectorized: bool) -> BlockShape:
    """Block shape; see :func:`fastprune_kernels.tiling.block_shape` for what limits it."""
    if dtype == torch.float32 or not vectorized:
        return mma_shape(dtype, vectorized)
    if (9, 0) <= capability < (12, 0):
        return BlockShape(128, 256, 64, 8, 3)
    return BlockShape(128, 128, 32, 8, 4)


def accumulate_grad_sum(acc: Tensor, dy: Tensor, x: Tensor, *, shape: BlockShape | None = None) -> None:
    """``acc += dy.T @ x``.

    Args:
        acc: float32 ``(out, in)``, added to in place; any strides.
        dy: ``(n_tokens, out)``, bfloat16, float16 or float32; any strides.
        x: ``(n_tokens, in)``, of the dtype of ``dy``; any strides.
        shape: Used instead of what :func:`grad_sum_shape` chooses.

    For one input and block shape, results are bit-identical from run to run.

    Raises:
        TypeError: A dtype that the kernel does not take.
        ValueError: Strides that the kernel does not take.
    """
    launching.check_inputs(dy, x)
    launching.check_accumulators(acc)
    if acc.numel() == 0:
        return
    vectorized = launching.is_vectorized(dy) and launching.is_vectorized(x)
    with launching.on_device_of(x):
        shape = shape or grad_sum_shape(x.dtype, launching.capability(), vectorized)
        launching.check_offsets(dy, shape.block_tokens, shape.block_out)
        launching.check_offsets(x, shape.block_tokens, shape.block_in)
        launching.check_offsets(acc, shape.block_out, shape.block_in)
        n_tiles = triton.cdiv(acc.shape[0], shape.block_out) * triton.cdiv(acc.shape[1], shape.block_in)
        for dy_part, x_part in zip(dy.split(MAX_TOKENS), x.split(MAX_TOKENS), strict=True):
            _grad_sum_kernel[(n_tiles,)](
                acc,
                dy_part,
                x_part,
                len(x_part),
                *acc.shape,
                *acc.stride(),
                *dy.stride(),
                *x.stride(),
                INTERPRETED=launching.INTERPRETED,
                BLOCK_OUT=shape.block_out,
                BLOCK_IN=shape.block_in,
                BLOCK_TOKENS=shape.block_tokens,
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
            )
