"""A model whose weights are awkward to write back, and masks for it."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn

from fastprune.masking.apply import matrices_of
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint

# how long an example takes is not what these tests are about
thorough = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

SHAPES = {"a.weight": (6, 5), "b.weight": (7, 6), "c.weight": (3, 7)}


class Toy(nn.Module):
    """Three Linears; NaN payloads, -0 and infinities among the weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)
        self.to(dtype)
        with torch.no_grad():
            for module in (self.a, self.b, self.c):
                flat = module.weight.view(-1)
                flat[:4] = torch.tensor([-0.0, math.nan, math.inf, -math.inf], dtype=dtype)
                if dtype == torch.float32:
                    flat[1:2].view(torch.int32).fill_(0x7FC12345)  # a NaN with a payload

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x)))


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter, bit by bit: NaN == NaN, and -0 is not 0."""
    return {name: p.detach().clone().view(torch.uint8) for name, p in model.named_parameters()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def mask_of(metadata: dict | None = None, **indices: list[int]) -> PruneMask:
    return PruneMask({n: torch.tensor(indices.get(n[0], []), dtype=torch.int64) for n in SHAPES}, SHAPES, metadata)


def fingerprint_of(model: nn.Module) -> str:
    return fingerprint(matrices_of(model, SHAPES))


@st.composite
def masks(draw, count: int = 1) -> list[PruneMask]:
    return [
        PruneMask(
            {
                name: torch.tensor(sorted(draw(st.sets(st.integers(0, math.prod(shape) - 1)))), dtype=torch.int64)
                for name, shape in SHAPES.items()
            },
            SHAPES,
        )
        for _ in range(count)
    ]
