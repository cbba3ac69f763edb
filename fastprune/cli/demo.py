"""``fastprune demo``: the effect and its controls on the shipped model organism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastprune.cli.app import quiet_loading
from fastprune.cli.frame import Run, command
from fastprune.cli.inputs import InputPath
from fastprune.cli.outputs import OutputFolder, check_report, written

_ARTIFACTS = (("scores.safetensors", "scores"), ("mask.safetensors", "mask"))
_STAGES = InputPath("checkpoint folder", folders=("base", "sft", "aligned"), holds="config.json")


def _check_folder(out: Path, force: bool) -> None:
    """A demonstration is run again over an earlier one; another report is replaced only if that is asked for."""
    check_report(out, force or _is_demo(out), _ARTIFACTS)


def _is_demo(folder: Path) -> bool:
    try:
        record = json.loads((folder / "record.json").read_bytes())
        return record["title"] == "fastprune on the model organism"
    except (OSError, ValueError, KeyError, TypeError):
        return False


@command()
def demo(
    run: Run,
    out: Annotated[
        Path, OutputFolder(_check_folder), typer.Option(help="Folder for the report, pictures and artifacts.")
    ] = Path("demo"),
    checkpoints: Annotated[
        Path | None, _STAGES, typer.Option(help="Folder of `organism train` (default: the shipped checkpoints).")
    ] = None,
    q: Annotated[float, typer.Option("-q", help="Harm fraction of each matrix.")] = 3e-3,
    p: Annotated[float, typer.Option("-p", help="Protected fraction of each matrix.")] = 5e-2,
    seed: Annotated[int, typer.Option(help="Seed of the drawn rows and of the random mask.")] = 0,
) -> None:
    """See the effect and its controls on a tiny trained model (about a minute)."""
    from fastprune.experiments import DemoSettings, run_demo
    from fastprune.reporting import print_results, write_report

    quiet_loading()
    settings = DemoSettings(p=p, q=q, seed=seed, checkpoints=checkpoints)
    result = run_demo(out / "data", settings, progress=not run.quiet)
    run.result(result.record, lambda: print_results(result.record))

    def write(folder: Path) -> dict[str, Path]:
        files = write_report(result.record, folder)
        files["scores"] = result.scores.save(folder / "scores.safetensors")
        files["mask"] = result.mask.save(folder / "mask.safetensors")
        return files

    run.files(written(out, write))
    run.talk(f"\nOpen {out / 'report.html'} in a browser. The rows of the run are in {out / 'data'}.")
