"""Arguments of the accumulating operations, and the error of their sums against float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

BACKENDS = [name for name in ("torch", "cpp") if ops.available_backends()[name] == "available"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# An empty example, tokens 29 to 33 in no example, and examples that do not stand in the order of their tokens.
STARTS, LENGTHS, N_TOKENS = torch.tensor([7, 0, 5, 34]), torch.tensor([22, 7, 0, 6]), 40


def sliced(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """A tensor that is a window of a larger one, with a gap after each row and before the first."""
    return torch.randn(rows + 1, cols + 5).to(dtype)[1:, 2 : 2 + cols]


def arguments(op: str, out: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    tensors = (sliced(N_TOKENS, out, dtype), sliced(N_TOKENS, inner, dtype))
    return tensors if op == "accumulate_grad_sum" else (*tensors, STARTS, LENGTHS)


def exact(op: str, start: Tensor, args: tuple[Tensor, ...]) -> Tensor:
    acc = start.to(torch.float64, copy=True)
    getattr(reference, op)(acc, *args)
    return acc


def error(found: Tensor, wanted: Tensor) -> float:
    """Norm-wise relative error."""
    norm = float(wanted.norm())
    return float((found.double() - wanted).norm()) / norm if norm else float(found.double().norm())


GOOD = {
    "acc": torch.zeros(3, 5),
    "dy": torch.zeros(4, 3),
    "x": torch.zeros(4, 5),
    "starts": torch.tensor([0, 2]),
    "lengths": torch.tensor([2, 2]),
}
