"""Whether two rates of a record differ by more than chance: one rule for all sentences.

Intervals decide if the record has them (``measurements``), else a fixed number of points.

In: a record and two rows of its results. Out: yes or no.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastprune.reporting.formatting import find
from fastprune.reporting.record import missing

# Without sample sizes, two rates that differ by no more than this count as equal: with 64 prompts one answer is 0.016,
# and the 95 % interval of a rate of 0.98 is about 0.05 wide.
SAME = 0.05
_ROUNDING = 1e-9  # 0.90 - 0.85 is more than 0.05 in binary

Row = Mapping[str, Any]


def beyond_chance(record: Mapping[str, Any], before: Row, after: Row, metric: str) -> bool:
    """Whether a rate differs between two rows by more than chance does; False where either is missing.

    With intervals: zero lies outside the 95 % interval of the difference, formed from the Wilson intervals of the two
    rates (Newcombe 1998, method 10) as if they were of different prompts. They are of the same prompts, whose rates
    differ less by chance, so the rule is conservative.
    """
    if missing(before.get(metric)) or missing(after.get(metric)):
        return False
    difference = after[metric] - before[metric]
    if not sized(record, before, after, metric):
        return abs(difference) > SAME + _ROUNDING
    (below_old, above_old), (below_new, above_new) = (_reach(_parts(record, row, metric)) for row in (before, after))
    reach = math.hypot(below_new, above_old) if difference > 0 else math.hypot(above_new, below_old)
    return abs(difference) > reach + _ROUNDING


def fell(record: Mapping[str, Any], before: Row, after: Row, metric: str) -> bool:
    """Whether a rate is lower by more than chance."""
    return beyond_chance(record, before, after, metric) and after[metric] < before[metric]


def sized(record: Mapping[str, Any], before: Row, after: Row, metric: str) -> bool:
    """Whether the record holds the intervals of both rates."""
    return bool(_parts(record, before, metric)) and bool(_parts(record, after, metric))


def threshold(record: Mapping[str, Any], before: Row, after: Row, metric: str) -> str:
    """The rule for these two rates in words: ``beyond chance`` or ``by more than 5 points``."""
    return "beyond chance" if sized(record, before, after, metric) else f"by more than {100 * SAME:.0f} points"


def points(n: int) -> int:
    """Half the 95 % interval of a binomial rate over ``n`` prompts at its widest, p = 1/2, in whole points."""
    return math.ceil(100 * 1.96 * math.sqrt(0.25 / n))


def _parts(record: Mapping[str, Any], row: Row, metric: str) -> list[Mapping[str, Any]]:
    """The measurements whose mean is the rate; none if one of them lacks its interval."""
    found = find(record.get("measurements"), row["model"], row["mask"]) or {}
    skills = found.get("skills") or {}
    match metric:
        case "utility":
            parts = list(skills.values())
        case "neighbour":
            parts = [skills.get((record.get("settings") or {}).get("neighbour"))]
        case "recognition":
            parts = [(found.get("recognition") or {}).get("accuracy")]
        case _:
            parts = [found.get(metric)]
    known = (part and not missing(part.get("rate")) and part.get("interval") for part in parts)
    return parts if all(known) and not any(missing(end) for part in parts for end in part["interval"]) else []


def _reach(parts: list[Mapping[str, Any]]) -> tuple[float, float]:
    """How far the interval of a mean of independent rates reaches below and above it (Zou and Donner 2008)."""
    below = math.hypot(*(part["rate"] - part["interval"][0] for part in parts))
    above = math.hypot(*(part["interval"][1] - part["rate"] for part in parts))
    return below / len(parts), above / len(parts)
