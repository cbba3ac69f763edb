"""The synthetic model organism: ``demo``, ``organism train`` and ``organism export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastprune.cli.app import app, command, organism_app, quiet_loading
from fastprune.cli.files import check_report, output_folder, written
from fastprune.cli.processes import say
from fastprune.errors import require


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures and artifacts.")] = Path("demo"),
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of `organism train`; the shipped checkpoints by default.")
    ] = None,
    q: Annotated[float, typer.Option("-q", help="Harm fraction of each matrix.")] = 3e-3,
    p: Annotated[float, typer.Option("-p", help="Protected fraction of each matrix.")] = 5e-2,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and the random mask.")] = 0,
) -> None:
    """See the effect and its controls on a tiny model that was really trained (about a minute)."""
    from fastprune.experiments import DemoSettings, run_demo
    from fastprune.reporting import print_files, print_results, write_report

    require("matplotlib", "report")  # the pictures come last
    quiet_loading()
    settings = DemoSettings(p=p, q=q, seed=seed, checkpoints=checkpoints)
    context.with_resource(output_folder(out))
    check_report(out, (("scores.safetensors", "scores"), ("mask.safetensors", "mask")))
    result = run_demo(out / "data", settings)
    print_results(result.record)

    def write(folder: Path) -> dict[str, Path]:
        files = write_report(result.record, folder)
        files["scores"] = result.scores.save(folder / "scores.safetensors")
        files["mask"] = result.mask.save(folder / "mask.safetensors")
        return files

    print_files(written(out, write))
    say(f"\nOpen {out / 'report.html'} in a browser. The rows that went in are in {out / 'data'}.")


@organism_app.command("train")
def organism_train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for base, sft and aligned.")],
    seed: Annotated[int, typer.Option(help="Of initialisation and data.")] = 1,
) -> None:
    """Train base, SFT control and aligned model from scratch (a few minutes on two cores)."""
    from fastprune.organism import train_organism

    context.with_resource(output_folder(out))
    train_organism(seed, out)
    say(f"written to {out}\nnext: {command('demo', '--checkpoints', out)}")


@organism_app.command("export")
def organism_export(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    seed: Annotated[int, typer.Option(help="Of the drawn rows.")] = 0,
) -> None:
    """Write the organism's calibration and evaluation rows as JSONL, to try the other commands on."""
    from fastprune.organism import checkpoint_path, export_data

    context.with_resource(output_folder(out))
    for name, path in export_data(out, seed=seed).items():
        say(f"{name:>18}  {path}")
    model = checkpoint_path("aligned")
    say(f"{'model':>18}  {model}")
    files = ("--harm", out / "harm.jsonl", "--benign", out / "benign.jsonl")
    say(f"next: {command('score', model, *files, '--format', 'chat')}")
