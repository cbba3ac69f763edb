"""Sentences computed from a record: what the sweep and the heat maps show.

In: a checked record. Out: text without markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.reporting.formatting import (
    MODELS,
    clean,
    count,
    listing,
    model_label,
    ordered,
    per_mille,
    percent,
    share,
)
from fastprune.reporting.record import missing
from fastprune.reporting.significance import points


def sweep_finding(record: Mapping[str, Any]) -> str:
    """The remaining harm of each model at the q of the run (else the largest q of the sweep)."""
    rows = [row for row in record.get("sweep") or () if row["q"] > 0 and not missing(row.get("harm"))]
    if not rows:
        return ""
    q = (record.get("settings") or {}).get("q")
    if not any(row["q"] == q for row in rows):
        q = max(row["q"] for row in rows)
    at = {row["model"]: row["harm"] for row in rows if row["q"] == q}
    parts = [f"{percent(at[name])} on {model_label(name)}" for name in ordered(at, MODELS)]
    return f"At q = {share(q)} the harm rate is {listing(parts)}."


def heatmap_finding(record: Mapping[str, Any]) -> str:
    """Number of pruned weights, and where they are densest."""
    data = record["heatmap"]
    cells = []
    for row, layer in enumerate(data["layers"]):
        for column, name in enumerate(data["matrices"]):
            n = data["counts"][row][column]
            size = data["sizes"][row][column] if data.get("sizes") else None
            if not missing(n):
                cells.append((n / size if size else 0.0, n, layer, clean(name), size))
    total = sum(item[1] for item in cells)
    if not total:
        return "No weight was removed."
    most = max(cells, key=lambda item: item[:2])
    of_size = f" of {count(most[4])} weights ({per_mille(most[1], most[4])}\u00a0‰)" if most[4] else ""
    kind = "densest in" if most[4] else "most in"
    return f"{count(total)} weights in all, {kind} layer {most[2]}, {most[3]}: {count(most[1])}{of_size}."


def transfer_finding(record: Mapping[str, Any]) -> str:
    """Mean harm on the category pruned on, on the other ones, and without pruning."""
    data = record["transfer"]
    n = len(data["categories"])
    own = _mean(data["harm"][i][i] for i in range(n))
    other = _mean(data["harm"][i][j] for i in range(n) for j in range(n) if i != j)
    before = _mean(data.get("unpruned") or ())
    parts = [
        f"{percent(value)} {where}"
        for value, where in ((own, "on the same category"), (other, "on the others"), (before, "without pruning"))
        if value is not None
    ]
    masks = data.get("overlap") or [[None] * n] * n
    overlap = _mean(masks[i][j] for i in range(n) for j in range(n) if i != j)
    shared = "" if overlap is None else f" Two masks overlap by {percent(overlap)} on average (shared weights / union)."
    mean = f"Mean harm rate: {listing(parts)}." if parts else ""
    return f"{mean}{_cells_noise(data)}{shared}".strip()


def _cells_noise(data: Mapping[str, Any]) -> str:
    """Number of prompts behind a cell and the reach of its interval; empty if the record has no numbers of prompts."""
    sizes = sorted(n for n in data.get("n") or () if not missing(n) and n)
    if not sizes:
        return ""
    many = f"{sizes[0]:,} to {sizes[-1]:,}" if sizes[0] < sizes[-1] else f"{sizes[0]:,}"
    reach = f"its 95 % interval reaches up to {points(sizes[0])} points to either side"
    return f" Each cell is over {many} held-out prompts: {reach}."


def _mean(values: Any) -> float | None:
    kept = [value for value in values if not missing(value)]
    return sum(kept) / len(kept) if kept else None
