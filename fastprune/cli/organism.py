"""The synthetic model organism: ``organism train`` and ``organism export``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fastprune.cli.app import pasted
from fastprune.cli.frame import Run, command
from fastprune.cli.outputs import OutputFolder
from fastprune.errors import ArgumentError


def _check_own(out: Path, force: bool) -> None:
    """The functions themselves refuse what they would replace, by what they would write."""


@command(names={"out_dir": "out", "folder": "out"})
def train(
    run: Run,
    out: Annotated[Path, OutputFolder(_check_own), typer.Option(help="New folder for base, sft and aligned.")],
    seed: Annotated[int, typer.Option(help="Seed of initialization and data.")] = 1,
) -> None:
    """Train base, SFT control and aligned model from scratch (a few minutes on two cores)."""
    from fastprune.organism import train_organism

    train_organism(seed, out, progress=not run.quiet)
    run.result({"checkpoints": out, "seed": seed}, f"base, sft and aligned in {out}")
    run.talk(f"next: {pasted('demo', '--checkpoints', out)}")


@command(names={"out_dir": "out"})
def export(
    run: Run,
    out: Annotated[Path, OutputFolder(_check_own), typer.Option(help="Folder for the files.")],
    seed: Annotated[int, typer.Option(help="Seed of the drawn rows.")] = 0,
) -> None:
    """Write the organism's calibration and evaluation rows as JSONL, to try the other commands on."""
    from fastprune.organism import checkpoint_path, export_data

    if not run.force:
        _check_rows(out, seed)
    files = {**export_data(out, seed=seed), "model": checkpoint_path("aligned")}
    run.result({"files": files, "seed": seed}, "\n".join(f"{name:>18}  {path}" for name, path in files.items()))
    words = ("--harm", out / "harm.jsonl", "--benign", out / "benign.jsonl", "--format", "chat")
    run.talk(f"next: {pasted('score', files['model'], *words)}")


def _check_rows(out: Path, seed: int) -> None:
    """Refuse to replace rows by others; the same rows may be written again."""
    from fastprune.organism import export_data

    if not any(out.glob("*.jsonl")):
        return
    with tempfile.TemporaryDirectory(prefix="fastprune-") as scratch:
        for new in export_data(scratch, seed=seed).values():
            old = out / new.name
            if old.exists() and old.stat().st_size and old.read_bytes() != new.read_bytes():
                raise ArgumentError(
                    f"expected a folder without {new.name}, or one of an earlier export (of this seed), got "
                    f"{out}, whose {new.name} would be lost; give --force to replace an earlier export, "
                    "or name another folder",
                    argument="out",
                )
