"""Sums over examples of each example's weight gradient, element by element, without ever writing one to memory.

    acc[o, j] += sum_i f(G_i[o, j])        G_i[o, j] = sum over the tokens t of example i of dy[t, o] * x[t, j]

f is the absolute value (``grad_abs_sum``), the square (``grad_sq_sum``) or, as a second sum, the identity
(``grad_sum``). dy (n_tokens, out) and x (n_tokens, in) are bfloat16, float16 or float32, acc (out, in) is float32.
FLOPs: 2 * out * in * tokens. Bytes of device memory: 8 * out * in for reading and writing acc once a launch, plus dy
and x once for every band of tiles.

One program owns a tile of acc and walks the tokens of all examples in one loop: a step is the next block of tokens of
the current example, and where it was the last, f of the product tile is added to the sum tile. One loop, not one per
example inside another, keeps the copies of the following steps going across the end of an example. The sum tile
starts as acc, so results are bit-identical however the examples are split over launches, and no other program touches
the tile: there are no atomics, and the order of additions is fixed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastprune_kernels.tiling import count_steps, tile_position


@triton.jit
def _add(total, product, STATISTIC: tl.constexpr):
    if STATISTIC == "grad_abs_sum":
        return total + tl.abs(product)
    elif STATISTIC == "grad_sq_sum":
        return total + product * product
    else:
        return total + product


@triton.jit(do_not_specialize=["n_examples"])
def grad_statistics_kernel(
    acc_ptrs,
    second_ptr,
    dy_ptrs,
    x_ptr,
    starts_ptr,
    lengths_ptr,
    n_outs,
    n_in,
    n_examples,
    strides_acc_out,
    stride_acc_in,
    strides_dy_token,
    stride_dy_out,
    stride_x_token,
    stride_x_in,
    STATISTIC: tl.constexpr,
    SECOND: tl.constexpr,
    N_MATRICES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """``acc += sum_i f(dy_i.T @ x_i)`` for a tile of one of ``N_MATRICES`` weights with the same ``x``.

    A second sum, in the strides of ``acc``, goes with a single weight only.
    """
    rows = tl.cdiv(n_outs[0], BLOCK_OUT)
    for i in tl.static_range(1, N_MATRICES):
        rows += tl.cdiv(n_outs[i], BLOCK_OUT)
    tile_out, tile_in = tile_position(tl.program_id(0), rows, tl.cdiv(n_in, BLOCK_IN))
    acc_ptr, dy_ptr, n_out = acc_ptrs[0], dy_ptrs[0], n_outs[0]
    stride_acc_out, stride_dy_token = strides_acc_out[0], strides_dy_token[0]
    first_tile = 0
    before = 0
    for i in tl.static_range(1, N_MATRICES):
        before += tl.cdiv(n_outs[i - 1], BLOCK_OUT)
        if tile_out >= before:
            first_tile = before
            acc_ptr, dy_ptr, n_out = acc_ptrs[i], dy_ptrs[i], n_outs[i]
            stride_acc_out, stride_dy_token = strides_acc_out[i], strides_dy_token[i]

    # Offsets within a tile are int32, what carries over the whole tensor is int64 and the same for all threads.
    out = tl.arange(0, BLOCK_OUT)
    column = tl.arange(0, BLOCK_IN)
    token = tl.arange(0, BLOCK_TOKENS)
    origin_out = ((tile_out - first_tile) * BLOCK_OUT).to(tl.int64)
    origin_in = (tile_in * BLOCK_IN).to(tl.int64)
    in_rows = out < n_out - (tile_out - first_tile) * BLOCK_OUT
    in_columns = column < n_in - tile_in * BLOCK_IN
    # dy is read as its transpose, not transposed after reading: on sm_80 that would send it through registers.
    dy_offsets = out[:, None] * stride_dy_out + token[None, :] * stride_dy_token
    x_offsets = token[:, None] * stride_x_token + column[None, :] * stride_x_in
    acc_offsets = out[:, None] * stride_acc_out + column[None, :] * stride_acc_in
    in_tile = in_rows[:, None] & in_columns[None, :]
    dy_ptr += origin_out * stride_dy_out
    x_ptr += origin_in * stride_x_in
    acc_origin = origin_out * stride_acc_out + origin_in * stride_acc_in

    total = tl.load(acc_ptr + acc_origin + acc_offsets, mask=in_tile, other=0.0)
    if SECOND is not None:
        second = tl.load(second_ptr + acc_origin + acc_offsets, mask=in_tile, other=0.0)
    example = 0
    start = tl.load(starts_ptr)
    left = tl.load(lengths_ptr).to(tl.int32)
    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for _ in range(count_steps(lengths_ptr, n_examples, BLOCK_TOKENS)):
        real = token < left
        dy = tl.load(dy_ptr + start * stride_dy_token + dy_offsets, mask=in_rows[:, None] & real[None, :], other=0.0)
        x = tl.load(x_ptr + start * stride_x_token + x_offsets, mask=real[:, None] & in_columns[None, :], other=0.0)
        if INTERPRETED:  # its products of bfloat16 are wrong
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        if x_ptr.dtype.element_ty == tl.float32:
            # Three products of tf32 leave out 2**-21, but tensor cores also cut what does not fit each time they add
            # to their sum; starting that sum anew at every step keeps the error near float32's own at any length.
            product += tl.dot(dy, x, input_precision="tf32x3")
        else:
            product = tl.dot(dy, x, product)
        last = left <= BLOCK_TOKENS
        if last:
            total = _add(total, product, STATISTIC)
            if SECOND is not None:
                second = _add(second, product, SECOND)
            # Zero, always; but a plain zero is hoisted by the compiler and costs two moves a register.
            product = tl.where(left > BLOCK_TOKENS, product, 0.0)
        example += last.to(tl.int32)
        following = tl.minimum(example, n_examples - 1)
        start = tl.where(last, tl.load(starts_ptr + following), start + BLOCK_TOKENS)
        left = tl.where(last, tl.load(lengths_ptr + following).to(tl.int32), left - BLOCK_TOKENS)

    # + 0, but the compiler does not see it: it would keep the addresses of the first loads alive through the loop.
    acc_origin += example - n_examples
    tl.store(acc_ptr + acc_origin + acc_offsets, total, mask=in_tile)
    if SECOND is not None:
        tl.store(second_ptr + acc_origin + acc_offsets, second, mask=in_tile)
