"""The report in a terminal: results, verdict of the checks, and where the files are.

In: a record, and the paths that ``write_report`` returned. Out: text on a rich console. Names from the record are
never read as rich markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.errors import require
from fastprune.reporting.findings import checks_summary, headline
from fastprune.reporting.record import checked
from fastprune.reporting.wording import (
    METRICS,
    bound,
    cell,
    clean,
    count,
    extra_columns,
    grouped,
    mask_label,
    measured,
    model_label,
    number,
    rate_cell,
    result_rows,
)

if TYPE_CHECKING:
    from rich.console import Console


def print_results(
    record: Mapping[str, Any], console: Console | None = None, files: Mapping[str, Path] | None = None
) -> None:
    """Print the finding, the table of results, the checks that fail, and the files.

    Args:
        record: The dict of a run.
        console: A rich console; default: one on standard output.
        files: What :func:`write_report` returned, if it was called.

    Raises:
        ArtifactError: The record is not valid; the message names the key.
        MissingExtra: rich is not installed.
    """
    record = checked(record)
    text = require("rich.text", "cli").Text
    console = console or require("rich.console", "cli").Console()
    found = headline(record)
    if found:
        console.print(text(f"\n{found}\n"))
    if result_rows(record):
        console.print(_results(record))
    summary = checks_summary(record)
    if summary:
        failed = [check for check in record["checks"] if not check["holds"]]
        console.print(text(f"\n{summary}", style="bold red" if failed else "bold green"))
        for check in failed:
            expected = f", expected {bound(check['bound'])}" if check.get("bound") else ""
            console.print(text(f"  ✗ {clean(check['claim'])}: {number(check.get('value'))}{expected}", style="red"))
    for name, path in (files or {}).items():
        # Not wrapped, so that a path can be copied whole.
        console.print(text(f"{name:>10}  {path}"), soft_wrap=True)


def _results(record: Mapping[str, Any]) -> Any:
    """The table, narrow enough for 80 columns: models are headings, not a column."""
    rows = result_rows(record)
    text, box = require("rich.text", "cli").Text, require("rich.box", "cli")
    table = require("rich.table", "cli").Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), caption="rates in %", caption_justify="left"
    )
    rates, extras = measured(rows), extra_columns(rows)
    table.add_column("", overflow="fold")
    for head in ["removed", *(METRICS[name] for name in rates), *map(clean, extras)]:
        table.add_column(text(head), justify="right", no_wrap=True)  # a number is never cut
    for model, mine in grouped(rows):
        table.add_row(text(model_label(model), style="bold underline"))
        for row in mine:
            cells = [
                f"  {mask_label(row['mask'])}",
                count(row.get("pruned")),
                *(rate_cell(row.get(name)) for name in rates),
                *(cell(row.get(name)) for name in extras),
            ]
            table.add_row(
                *map(text, cells), style="bold" if row["mask"] == "btap" else None, end_section=row is mine[-1]
            )
    return table
