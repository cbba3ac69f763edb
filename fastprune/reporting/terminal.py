"""The report in a terminal: results, verdict of the checks, and paths of the files.

In: a record, and the paths that ``write_report`` returned. Out: text on a rich console. Names from the record are
never interpreted as rich markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.errors import printable
from fastprune.reporting.findings import checks_summary, headline
from fastprune.reporting.formatting import (
    METRICS,
    NBSP,
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
from fastprune.reporting.masks import mask_label, role
from fastprune.reporting.record import checked

if TYPE_CHECKING:
    from rich.console import Console


def print_results(
    record: Mapping[str, Any], console: Console | None = None, files: Mapping[str, Path] | None = None
) -> None:
    """Print the finding, the table of results, the checks that fail, and the files.

    Args:
        record: The dict of a run.
        console: A rich console; default: one on standard output.
        files: Result of :func:`write_report`, if it was called.

    Raises:
        ArtifactError: The record is not valid; the message names the key.
    """
    record = checked(record)
    console = console or _console()
    found = headline(record)
    if found:
        # rich breaks lines at no-break spaces too, and a terminal without Unicode cannot show them
        console.print(_text(f"\n{found}\n".replace(NBSP, " ")))
    if result_rows(record):
        console.print(_results(record, console.width), crop=False)
    summary = checks_summary(record)
    if summary:
        failed = [check for check in record["checks"] if not check["holds"]]
        console.print(_text(f"\n{summary}", style="bold red" if failed else "bold green"))
        for check in failed:
            expected = f", expected {bound(check['bound'])}" if check.get("bound") else ""
            console.print(
                _text(f"  ✗ {clean(check['claim'])}: {check_value(check.get('value'))}{expected}", style="red")
            )
    _print_files(files or {}, console)


def _print_files(files: Mapping[str, Path], console: Console) -> None:
    """Print names and paths, one a line."""
    for name, path in files.items():
        # Not wrapped, so that a path can be copied.
        console.print(_text(f"{name:>10}  {path}"), soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    return Console()


def _text(content: object, **style: Any) -> Any:
    """Text without rich markup and control characters."""
    from rich.text import Text

    return Text(printable(content), **style)


def _results(record: Mapping[str, Any], width: int) -> Any:
    """The table of results: models are headings, not a column, so that it fits 80 columns.

    If ``width`` is too small, names are cut first, and then the table is wider than ``width``: numbers are never cut,
    nor is the number in the name of a patched model, which takes two lines.
    """
    rows = result_rows(record)
    rates, extras = measured(rows), extra_columns(rows)
    heads = ["removed", *(METRICS[name] for name in rates), *map(clean, extras)]
    lines: list[tuple[str, list[str], str | None]] = []
    for model, mine in grouped(rows):
        lines.append((model_label(model), [""] * len(heads), "bold underline"))
        for row in mine:
            cells = [
                count(row.get("pruned")),
                *(rate_cell(row.get(name)) for name in rates),
                *(cell(row.get(name)) for name in extras),
            ]
            style = "bold" if role(record, row["mask"]) == "method" else None
            lines.append((f"  {mask_label(record, row['mask'])}", cells, style))

    numbers = [max(len(head), *(len(cells[i]) for _, cells, _ in lines)) for i, head in enumerate(heads)]
    frame = 2 * len(heads) + 2  # a blank and a divider before each column of numbers, and the edges
    names = min(max(len(name) for name, _, _ in lines), max(16, width - sum(numbers) - frame))
    needed = names + sum(numbers) + frame
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
        caption="rates in %",
        caption_justify="left",
        width=None if needed <= width else needed,
    )
    table.add_column("", no_wrap=True, min_width=names, max_width=names)
    for head, size in zip(heads, numbers, strict=True):
        table.add_column(_text(head), justify="right", no_wrap=True, min_width=size)
    for place, (name, cells, style) in enumerate(lines):
        last = place + 1 == len(lines) or not any(lines[place + 1][1])
        shown = _text(name, no_wrap=name.strip() != mask_label(record, "none"))
        table.add_row(shown, *map(_text, cells), style=style, end_section=last)
    return table
