"""The table of criteria: one row for each importance score, read by every backend and by the command line.

A new criterion is a row here and an independent definition in :mod:`fastprune.testing.oracle`. A new product is also a
line in :data:`FORMULAS` and one in ``csrc/scores.h``.

Sources: arXiv 2604.09544 (signed, abs), 2402.05162 (abs_of_sum, wanda, set difference).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

GRADIENT_SUMS = ("grad_sum", "grad_abs_sum", "grad_sq_sum")
"""Statistics of gradients, in the order in which the C++ kernel takes their accumulators."""
STATISTICS = (*GRADIENT_SUMS, "act_sq_sum")

FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda w, s: w * s,
    "negated_product": lambda w, s: -(w * s),
    "abs_product": lambda w, s: (w * s).abs(),
    "abs_weight_times": lambda w, s: w.abs() * s,
    "square_times": lambda w, s: w * w * s,
    "abs_weight": lambda w, s: w.abs(),
}
"""Products of a weight and its statistic, under the names that ``csrc/scores.h`` lists them by."""


@dataclass(frozen=True)
class Criterion:
    """One importance score.

    Attributes:
        name: As users write it.
        statistic: One of :data:`STATISTICS`; ``None`` for a score that needs no data.
        formula: One of :data:`FORMULAS`.
        root: Whether the product takes the square root of the statistic.
    """

    name: str
    statistic: str | None
    formula: str
    root: bool = False

    @property
    def broadcasts(self) -> bool:
        """Whether the statistic has one number per input feature, not one per weight."""
        return self.statistic == "act_sq_sum"


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("signed", "grad_sum", "negated_product"),
        Criterion("signed_reverse", "grad_sum", "product"),
        Criterion("abs", "grad_abs_sum", "abs_weight_times"),
        Criterion("abs_of_sum", "grad_sum", "abs_product"),
        Criterion("fisher", "grad_sq_sum", "square_times"),
        Criterion("wanda", "act_sq_sum", "abs_weight_times", root=True),
        Criterion("magnitude", None, "abs_weight"),
    )
}
