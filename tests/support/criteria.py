"""Statistics of the form that each criterion takes."""

from __future__ import annotations

from torch import Tensor

from fastprune.ops.criteria import CRITERIA


def statistic_for(criterion: str, values: Tensor) -> Tensor | None:
    """Random values of the weight's shape as the statistic of a criterion: its shape, and no sign where it is a sum
    of absolute values or squares; ``None`` where it needs no data."""
    row = CRITERIA[criterion]
    if row.statistic is None:
        return None
    if row.broadcasts:
        values = values[0]
    return values if row.statistic == "grad_sum" else values.abs()
