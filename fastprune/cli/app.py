"""The program itself: its help, its version, how it warns, and how it names commands to go on with."""

from __future__ import annotations

import shlex
import warnings
from typing import Annotated

import typer

import fastprune
from fastprune.cli.processes import note, started
from fastprune.cli.words import as_options
from fastprune.errors import ArgumentError, FastpruneWarning

app = typer.Typer(
    name="fastprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Find the few weights that a language model needs for one behaviour, remove them, and measure what stays.

    Start with `fastprune demo`. With a model of your own, a folder on disk:

    1. `fastprune score MODEL --harm harm.jsonl --benign benign.jsonl --out scores.safetensors`

    2. `fastprune select scores.safetensors -p 5e-5 -q 1e-5 --out mask.safetensors`

    3. `fastprune eval MODEL --mask mask.safetensors --harm held_out.jsonl --skills skills.jsonl`

    4. `fastprune patch MODEL mask.safetensors --out PRUNED_MODEL`
    """,
)
organism_app = typer.Typer(no_args_is_help=True, help="The synthetic model organism: data files and retraining.")
app.add_typer(organism_app, name="organism")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fastprune {fastprune.__version__}")
        raise typer.Exit
    if started() > 1 and context.invoked_subcommand != "score":
        raise ArgumentError(
            f"{context.invoked_subcommand}: runs in one process, and {started()} were started; only score shares its "
            "work between several"
        )
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *rest: object) -> None:
    """One line, without the place in the library's code that a warning otherwise shows."""
    note(as_options(message), "note" if issubclass(category, FastpruneWarning) else category.__name__)


def command(*words: object) -> str:
    """A command as it can be pasted into a shell."""
    return "fastprune " + shlex.join(map(str, words))


def quiet_loading() -> None:
    """Silence transformers' own bar for loading weights, which it draws even where there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
