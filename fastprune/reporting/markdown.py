"""``report.md``: findings, checks and results as Markdown, with links to the PNG files.

In: a checked record and its plots. Out: text. Names from the record are escaped, so that they neither break a table nor
become markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastprune.reporting.figures import Plot
from fastprune.reporting.findings import checks_summary, headline
from fastprune.reporting.formatting import (
    METRICS,
    bound,
    cell,
    check_value,
    clean,
    count,
    extra_columns,
    grouped,
    measured,
    model_label,
    rate_cell,
    result_rows,
)
from fastprune.reporting.masks import mask_label


def markdown(record: Mapping[str, Any], plots: Sequence[Plot], files: Mapping[str, str]) -> str:
    """The report as Markdown; ``files`` has the file name of each plot."""
    parts = [f"# {_safe(record.get('title') or 'fastprune report')}", _safe(headline(record))]
    parts.append("\n".join(f"- {_safe(note)}" for note in record.get("notes") or () if clean(note)))
    checks = record.get("checks") or ()
    if checks:
        rows = [
            [
                check["claim"],
                check_value(check.get("value")),
                bound(check.get("bound")),
                "holds" if check["holds"] else "FAILS",
            ]
            for check in checks
        ]
        parts += ["## Checks", checks_summary(record), _table(["claim", "measured", "expected", "verdict"], rows)]
    results = result_rows(record)
    if results:
        rates, extras = measured(results), extra_columns(results)
        heads = ["model", "weights", "removed", *(f"{METRICS[name]}, %" for name in rates), *extras]
        rows = [
            [
                model_label(model),
                mask_label(record, row["mask"]),
                count(row.get("pruned")),
                *(rate_cell(row.get(name)) for name in rates),
                *(cell(row.get(name)) for name in extras),
            ]
            for model, mine in grouped(results)
            for row in mine
        ]
        parts += ["## Results", _table(heads, rows)]
    for plot in plots:
        words = " ".join(_safe(text) for text in (plot.finding, plot.reading, plot.caption) if text)
        parts += [f"## {_safe(plot.title)}", f"![{_safe(plot.title)}]({files[plot.name]})", words]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_safe(text) for text in line] for line in (heads, *rows)]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _safe(text: object) -> str:
    """One line in which the markup of Markdown and HTML is escaped."""
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", line)
