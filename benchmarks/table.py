"""Tables of what the benchmarks wrote: ``python benchmarks/table.py FILE.jsonl... [--into docs/performance.md]``."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- performance:begin -->\n", "<!-- performance:end -->\n"
SHARES = {"share_of_gemm_rate": "GEMM rate", "share_of_gemm": "GEMM", "share_of_copy": "copy bandwidth"}


def seconds(value: float) -> str:
    """Three digits, with a unit that suits."""
    scale, unit = (1, "s") if value >= 1 else (1e3, "ms") if value >= 1e-3 else (1e6, "µs")
    return f"{float(f'{value * scale:.3g}'):g} {unit}"


def cells(line: dict) -> dict[str, str]:
    """Column to what a line has for it; columns that no line of a table fills are left out."""
    faster = line.get("fastprune_is_faster_by")
    against = line.get("times_resident")
    return {
        "on": line["shape"],
        "method": line["method"],
        "time": seconds(line["seconds_median"]),
        "fastprune is faster by": "" if faster is None or line["method"] == "fastprune" else f"{faster:g}x",
        "time / resident": "" if against is None else f"{against:.2f}",
        "share of": next((f"{line[key]:.0%} {name}" for key, name in SHARES.items() if key in line), ""),
        "extra memory, MiB": str(line.get("peak_extra_mib", "")),
        "planned, MiB": str(line.get("planned_mib", "")),
    }


def rows(lines: Iterable[dict]) -> Iterable[str]:
    """A Markdown table for each benchmark and device, in the order of the lines."""
    for (benchmark, device, torch), group in itertools.groupby(
        lines, key=lambda line: (line["benchmark"], line["device"], line.get("torch"))
    ):
        table = [cells(line) for line in group]
        columns = [name for name in table[0] if any(row[name] for row in table)]
        yield f"**{benchmark}** ({device}, torch {torch})\n\n"
        yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
        yield from (f"| {' | '.join(row[name] for name in columns)} |\n" for row in table)
        yield "\n"


def main() -> None:
    """Read, then print or insert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with performance markers")
    options = parser.parse_args()
    lines = [json.loads(line) for file in options.files for line in file.read_text(encoding="utf-8").splitlines()]
    text = "".join(rows(line for line in lines if "seconds_median" in line))
    if options.into is None:
        print(text, end="")
        return
    page = options.into.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    options.into.write_text(f"{head}{BEGIN}{text}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
