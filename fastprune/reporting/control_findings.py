"""Sentences computed from a record: which controls lower harm as well, and what that costs.

In: a checked record. Out: text without markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.reporting.findings import comparison, subject
from fastprune.reporting.formatting import METRICS, find, listing, percent, percents
from fastprune.reporting.masks import mask_label, role
from fastprune.reporting.record import RATES, missing
from fastprune.reporting.significance import fell, sized, threshold


def controls_finding(record: Mapping[str, Any]) -> str:
    """Which controls and other masks lower harm as well, and what that costs.

    Empty without such masks, or without the unpruned level.
    """
    model = subject(record)
    found = comparison(record)
    rows = [row for row in record.get("results") or () if row["model"] == model and not missing(row.get("harm"))]
    before = find(rows, model, "none")
    rest = [row for row in rows if row is not before and (found is None or row not in found.after)]
    if before is None or not rest:
        return ""
    controls = [row for row in rest if role(record, row["mask"]) == "control"]
    others = [row for row in rest if role(record, row["mask"]) != "control"]
    sentences = [
        _lowering(record, before, group, noun)
        for group, noun in ((controls, "control"), (others, "other mask"))
        if group
    ]
    return " ".join([*sentences, *_dissociation(record, before)])


def _lowering(
    record: Mapping[str, Any], before: Mapping[str, Any], group: list[Mapping[str, Any]], noun: str
) -> str:  # fmt: skip
    # the stricter rule if only some of the rates have intervals
    points = threshold(record, before, min(group, key=lambda row: sized(record, before, row, "harm")), "harm")
    also = [row for row in group if fell(record, before, row, "harm")]
    if not also:
        only = f"The {noun} does not lower" if len(group) == 1 else f"None of the {len(group)} {noun}s lowers"
        return f"{only} harm {points}."
    parts = []
    for row in also:
        lost = [
            f"{METRICS[name]} {percent(row[name])}"
            for name in RATES
            if name != "harm" and fell(record, before, row, name)
        ]
        price = f", but {listing(lost)}" if lost else ""
        parts.append(f"{mask_label(record, row['mask'])} (harm {percent(row['harm'])}{price})")
    which = f"{len(also)} of {len(group)} {noun}s" if len(group) > 1 else f"The {noun}"
    return f"{which} {'lower' if len(also) > 1 else 'lowers'} harm {points}: {listing(parts)}."


def _dissociation(record: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What happens if recognition of harm is pruned instead of harm."""
    sentences = []
    for row in record.get("dissociation") or ():
        if row["model"] != before["model"] or row["mask"] != "recognition":
            continue
        known = [
            name for name in ("recognition", "harm") if not missing(before.get(name)) and not missing(row.get(name))
        ]
        parts = [_moved(METRICS[name], before[name], row[name]) for name in known]
        if parts:
            sentences.append(f"Pruning recognition instead {listing(parts)}.")
    return sentences


def _moved(name: str, before: float, after: float) -> str:
    """``takes harm from 98 % to 2 %``, or ``does not change harm (98 %)``."""
    old, new = percents(before, after)
    return f"takes {name} from {old} to {new}" if old != new else f"does not change {name} ({new})"
