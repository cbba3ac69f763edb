"""From a record to a folder of files.

The record is written first, because it cannot be made again. The other files are made in memory before the first of
them is written, so that a folder never contains half a report.

In: a record and a folder. Out: ``record.json``, one PNG per plot, ``report.html``, ``report.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastprune.errors import ArgumentError
from fastprune.reporting.attack_plot import attack_plot
from fastprune.reporting.heatmaps import heatmap_plot, transfer_plot
from fastprune.reporting.markdown import markdown
from fastprune.reporting.page import page
from fastprune.reporting.plots import controls_plot, sweep_plot
from fastprune.reporting.record import checked, dump, write_atomically

_FILES = ("record.json", "report.html", "report.md")
_PLOTS = {
    "sweep": sweep_plot,
    "controls": controls_plot,
    "attacks": attack_plot,
    "heatmap": heatmap_plot,
    "transfer": transfer_plot,
}


def check_replaceable(folder: Path) -> None:
    """Refuse a folder in which a report would replace or remove files that are not from a report.

    Raises:
        ArgumentError: There are such files without the record of a report; the message names the first.
    """
    existing = [name for name in (*_FILES, *(f"{plot}.png" for plot in _PLOTS)) if (folder / name).exists()]
    if existing and not _holds_report(folder):
        raise ArgumentError(
            f"expected a folder without {existing[0]}, or one of an earlier report, got {folder}, whose "
            f"{existing[0]} would be lost; name another folder",
            argument="out_dir",
        )


def write_report(record: Mapping[str, Any], out_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write a record and everything that is made from it.

    Args:
        record: The dict of a run; every section is optional. ``None`` and NaN are shown as "–".
        out_dir: The folder, made if needed. Files of the same names are replaced atomically; plots of an earlier report
            that this one lacks are removed.

    Returns:
        The path of each file: ``record``, ``html``, ``markdown``, and for each plot that the record has data for
        ``sweep``, ``controls``, ``attacks``, ``heatmap``, ``transfer`` (PNG).

    Raises:
        ArtifactError: The record is not valid; the message names the key. Nothing is written.
        ArgumentError: ``out_dir`` is a file, or contains files of these names that are not from a report.
    """
    record = checked(record)
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"expected a folder, got the file {str(folder)!r}", argument="out_dir")
    check_replaceable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"record": folder / "record.json"}
    write_atomically(paths["record"], dump(record).encode("utf-8"))

    made = {name: make(record) for name, make in _PLOTS.items()}
    plots = [plot for plot in made.values() if plot is not None]
    pictures = {plot.name: f"{plot.name}.png" for plot in plots}
    contents = {name: (folder / file, plot.png()) for (name, file), plot in zip(pictures.items(), plots, strict=True)}
    contents["markdown"] = (folder / "report.md", markdown(record, plots, pictures).encode("utf-8"))
    contents["html"] = (folder / "report.html", page(record, plots).encode("utf-8"))
    for name, (path, content) in contents.items():
        write_atomically(path, content)
        paths[name] = path
    for name, plot in made.items():
        if plot is None:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return paths


def _holds_report(folder: Path) -> bool:
    """Whether the folder contains a record of this package, of whatever version."""
    try:
        record = json.loads((folder / "record.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and isinstance(record.get("schema"), int)
