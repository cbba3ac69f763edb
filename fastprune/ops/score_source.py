"""The inputs of a compiled selection, on a CPU and on a GPU alike.

In: a weight, its statistic and a criterion, validated. Out: a contiguous weight, the statistic with its strides and the
name of a product. The square root is taken here by the reference's function, since libraries differ in its last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastprune.errors import BackendError
from fastprune.ops.criteria import CRITERIA
from fastprune.ops.reference import root


@dataclass(frozen=True)
class Source:
    """What the scores of a matrix are formed from.

    Attributes:
        weight: Contiguous.
        statistic: float32 or float64 of the weight's shape; empty where none is read.
        strides: Of the statistic, in elements, from row to row and from column to column; 0 where it is broadcast.
        formula: Name of the product, as ``csrc/scores.h`` has it.
    """

    weight: Tensor
    statistic: Tensor
    strides: tuple[int, int]
    formula: str

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return self.weight.shape[-1] if self.weight.dim() else 1

    @classmethod
    def of(cls, weight: Tensor, statistic: Tensor | None, criterion: str) -> Source:
        """The source of a criterion's scores."""
        row, weight = CRITERIA[criterion], weight.detach().contiguous()
        if statistic is None:
            return cls(weight, weight.new_empty(0, dtype=torch.float32), (0, 0), row.formula)
        statistic = statistic.detach()
        if row.root:
            statistic = root(statistic.to(torch.promote_types(weight.dtype, statistic.dtype)))
        statistic = statistic.expand(weight.shape)
        if weight.dim() == 2:
            return cls(weight, statistic, (statistic.stride(0), statistic.stride(1)), row.formula)
        return cls(weight, statistic.contiguous(), (weight.shape[-1] if weight.dim() else 1, 1), row.formula)


def missing_formula(backend: str, formula: str) -> BackendError:
    """The error for a product that an extension was built without."""
    return BackendError(
        f"backend {backend!r}: expected an extension built with the formula {formula!r}, got one without it; add it to "
        "csrc/scores.h and build again (pip install -e .), or pass backend='torch'"
    )


def dtype_name(tensor: Tensor) -> str:
    """The name by which compiled code knows a dtype."""
    return str(tensor.dtype).removeprefix("torch.")
