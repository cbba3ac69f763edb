"""Sample size, 95 % interval and cut answers of each rate of a record, in total and for each category.

In: a record. Out: a table of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastprune.reporting.figures import Table
from fastprune.reporting.formatting import DASH, clean, count, model_label, rate_cell
from fastprune.reporting.masks import mask_label
from fastprune.reporting.record import missing

Part = tuple[str, Mapping[str, Any]]


def measurements_table(record: Mapping[str, Any]) -> Table:
    """A row for each rate of each model and mask; no rows if the record has no measurements."""
    rows = [
        [model_label(row["model"]), mask_label(record, row["mask"]), name, rate_cell(part.get("rate")), *_spread(part)]
        for row in record.get("measurements") or ()
        for name, part in _parts(row)
    ]
    return Table(["model", "weights", "measured", "rate, %", "95 % interval", "rows", "cut at the limit"], rows)


def _parts(row: Mapping[str, Any]) -> Iterator[Part]:
    yield from _with_categories("harm", row.get("harm"))
    yield from _with_categories("refusal", row.get("refusal"))
    recognised = row.get("recognition") or {}
    yield from _with_categories("recognition", recognised.get("accuracy"))
    if recognised.get("pairs"):
        yield "recognition, pairs", recognised["pairs"]
    if not missing(recognised.get("yes_rate")):
        yield "recognition, answered “harmful”", {"rate": recognised["yes_rate"]}
    for name, part in (row.get("skills") or {}).items():
        yield from _with_categories(clean(name), part)


def _with_categories(name: str, part: Mapping[str, Any] | None) -> Iterator[Part]:
    if part:
        yield name, part
        for category, inner in (part.get("by_category") or {}).items():
            yield f"{name}, {clean(category)}", inner


def _spread(part: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = part.get("interval") or (None, None)
    interval = DASH if missing(low) or missing(high) else f"{rate_cell(low)} to {rate_cell(high)}"
    return interval, count(part.get("n")), count(part.get("cut"))
