"""Weights of every dtype, layout and bit pattern, and their bitwise comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastprune import ops

BACKENDS = [name for name in ("torch", "cpp") if ops.available_backends()[name] == "available"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float64: torch.int64}

LAYOUTS = {
    "contiguous": lambda w: w,
    "window": lambda w: torch.nn.functional.pad(w, (2, 3, 1, 0))[1:, 2:-3],
    "transposed": lambda w: w.T.contiguous().T,
    "every second row": lambda w: w.repeat_interleave(2, 0)[::2],
}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(BITS.get(tensor.dtype, tensor.dtype))


def any_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of every kind: NaNs with payloads, infinities, both zeros, subnormals."""
    info = torch.iinfo(BITS[dtype])
    weight = torch.randint(info.min, info.max, shape, dtype=BITS[dtype]).view(dtype)
    weight.view(-1)[: min(3, weight.numel())] = torch.tensor([-0.0, math.inf, math.nan], dtype=dtype)[: weight.numel()]
    return weight


def several() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Matrices of every dtype and layout, a list of which is empty; and indices of them."""
    weights = {
        f"{layout}, {dtype}": LAYOUTS[layout](any_bits((17, 29), dtype)) for layout in LAYOUTS for dtype in DTYPES
    }
    counts = [0, *range(1, len(weights))]
    return weights, {name: torch.randperm(17 * 29)[:k] for name, k in zip(weights, counts, strict=True)}


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return list(some) == list(others) and all(torch.equal(bits(some[name]), bits(others[name])) for name in some)
