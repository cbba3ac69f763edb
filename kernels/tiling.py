"""How the matrix kernels cut a weight into tiles and its tokens into steps.

In: sizes, a dtype and a compute capability. Out: block shapes with the reason for each constant, and the device
functions that the kernels share. Compile-time figures are those of the tables in README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Rows of tiles in a band. 132 programs run at a time on an H100, one a multiprocessor; in bands of 8 they cover about
# 8 x 16 tiles, near the square that reads least from memory.
BAND = tl.constexpr(8)


class BlockShape(NamedTuple):
    """Tile of the weight, tokens in one step, and how the compiler is to build the program for it."""

    block_out: int
    block_in: int
    block_tokens: int
    num_warps: int
    num_stages: int


def block_shape(
    n_out: int,
    n_in: int,
    dtype: torch.dtype,
    mean_length: float,
    capability: tuple[int, int],
    *,
    n_statistics: int = 1,
    vectorized: bool = True,
) -> BlockShape:
    """Block shape of the per-example kernel.

    Args:
        n_out: Rows of the weight; of all weights of a grouped launch together.
        n_in: Columns of the weight.
        dtype: Of the inputs.
        mean_length: Tokens an example; an estimate will do.
        capability: Compute capability of the device, e.g. ``(9, 0)``.
        n_statistics: Sums kept in registers in addition to the product, 1 or 2.
        vectorized: Whether rows start on 16 bytes, so that copies can go straight to shared memory.
    """
    hopper = (9, 0) <= capability < (12, 0)
    if dtype == torch.float32 or not vectorized:
        return mma_shape(dtype, vectorized, n_statistics)
    # Two float32 tiles of 128 x 128, product and sum, take 128 of the 255 registers of a thread at 8 warps; 128 x 256
    # spills with 8 and with 16 warps. Smaller tiles read more: 32 KB for 512 clocks of products, which the second
    # level cache barely delivers, against 24 KB for 256 clocks with 64 x 128. On sm_80, where the operands of a
    # product sit in registers too, a second sum does not fit beside two such tiles.
    block_out, block_in = 64 if n_statistics == 2 and not hopper else 128, 128
    # Fewer tiles than multiprocessors (132 on an H100, 108 on an A100) leave some of them idle.
    while block_out * block_in > 64 * 64 and triton.cdiv(n_out, block_out) * triton.cdiv(n_in, block_in) < 108:
        block_out, block_in = (64, block_in) if block_out == 128 else (64, 64)
    num_warps = 4 if block_out * block_in == 64 * 64 else 8
    # An example fills its last step by half on average, and each step costs some 40 clocks besides its products (8
    # clocks a token for 128 x 128): 32 tokens are better under about 130, 64 above. 16 would gain nothing: with 32,
    # the instructions of a step and of an example's sum already take as long as the products.
    block_tokens = 64 if mean_length >= 128 and hopper else 32
    # 64 bytes a clock over some 1000 clocks from a loaded cache: 64 KB should be on their way while a step is in use.
    step = (block_out + block_in) * block_tokens * dtype.itemsize
    num_stages = min(6 if hopper else 4, max(2, (128 << 10) // step))
    return BlockShape(block_out, block_in, block_tokens, num_warps, num_stages)


def mma_shape(dtype: torch.dtype, vectorized: bool, n_statistics: int = 1) -> BlockShape:
    """Block shape for float32, and for rows that cannot be copied 16 bytes at a time.

    32 rows are too few for Hopper's wgmma, and that is the point: the older instruction then does the products. Triton
    3.6 and 3.7 feed float32 to wgmma from registers, where their ptxas (12.8) can reuse a register too early (fixed
    in 13.3), and without asynchronous copies they leave out the barrier between the reads of one group of four warps
    and the next writes of another (triton-lang/triton 11047, fixed after 3.7).
    """
    wide = dtype == torch.float32 and vectorized and n_statistics == 1
    return BlockShape(32, 256 if wide else 128, 32, 8, 3 if vectorized else 2)


@triton.jit
def tile_position(tile, rows, columns):
    """Row and column of a tile. Tiles are numbered down each column of a band of rows: neighbours share reads."""
    first = tile // (BAND * columns) * BAND
    height = tl.minimum(rows - first, BAND)
    within = tile - first * columns
    return first + within % height, within // height


@triton.jit
def count_steps(lengths_ptr, n_examples, BLOCK_TOKENS: tl.constexpr):
    """Steps over all examples; one without tokens takes one too."""
    n_steps = 0
    lane = tl.arange(0, 128)
    for first in range(0, n_examples, 128):
        real = first + lane < n_examples
        lengths = tl.load(lengths_ptr + first + lane, mask=real, other=0).to(tl.int32)
        n_steps += tl.sum(tl.where(real, tl.maximum(tl.cdiv(lengths, BLOCK_TOKENS), 1), 0))
    return n_steps
