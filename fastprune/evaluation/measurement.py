"""What a metric returns: a rate with its sample size, never the completions behind it.

Completions may be harmful text, so they are judged and dropped. In: scores of a judge. Out: plain numbers for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_Z = 1.959964  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Measurement:
    """A mean score over rows.

    Attributes:
        rate: Mean of the judge's scores, 0..1.
        n: Number of rows.
        by_category: The same for the rows of each category; rows without one count in the total only.
        cut: Number of answers that ended at their length limit; ``None`` where that says nothing, because there were
            no answers or each had the length of its reference.
        unanswered: Number of answers that were a thought and nothing after it; ``None`` without answers.
    """

    rate: float
    n: int
    by_category: dict[str, Measurement] = field(default_factory=dict)
    cut: int | None = None
    unanswered: int | None = None

    @classmethod
    def of(
        cls,
        scores: Sequence[float],
        categories: Sequence[str | None] | None = None,
        *,
        cut: int | None = None,
        unanswered: int | None = None,
    ) -> Measurement:
        """Form the means; ``scores`` must not be empty."""
        groups: dict[str, list[float]] = {}
        for score, category in zip(scores, categories or [None] * len(scores), strict=True):
            if category is not None:
                groups.setdefault(category, []).append(score)
        parts = {name: cls(math.fsum(part) / len(part), len(part)) for name, part in sorted(groups.items())}
        return cls(math.fsum(scores) / len(scores), len(scores), parts, cut, unanswered)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson interval at 95 %, which always contains the rate.

        Made for scores of 0 and 1, and too wide for graded ones, whose variance is below rate * (1 - rate). It covers
        the sampling of rows alone: not the choice of prompts, judge or attack.
        """
        z2 = _Z * _Z / self.n
        center = (self.rate + z2 / 2) / (1 + z2)
        half = _Z / (1 + z2) * math.sqrt(self.rate * (1 - self.rate) / self.n + z2 / (4 * self.n))
        # At a rate of 0 or 1 an end is the rate itself, which rounding may miss.
        return max(0.0, min(self.rate, center - half)), min(1.0, max(self.rate, center + half))

    def to_dict(self) -> dict[str, Any]:
        """Rate, n, interval and, where there are any, the counts of cut and missing answers and each category."""
        result: dict[str, Any] = {"rate": self.rate, "n": self.n, "interval": list(self.interval)}
        result |= {name: getattr(self, name) for name in ("cut", "unanswered") if getattr(self, name) is not None}
        if self.by_category:
            result["by_category"] = {name: part.to_dict() for name, part in self.by_category.items()}
        return result
