"""The program: its commands in one table, its help, and how it names commands to go on with."""

from __future__ import annotations

import importlib
import shlex
from typing import Annotated

import typer

import fastprune

# Name to file and function, in the order of the help. A name of two words is a command of a group.
COMMANDS = {
    "organism train": "organism:train",
    "organism export": "organism:export",
    "demo": "demo:demo",
    "generate": "generate:generate",
    "score": "score:score",
    "select": "select:select",
    "patch": "patch:patch",
    "plan": "plan:plan",
    "control": "control:control",
    "answer": "answer:answer",
    "eval": "eval:evaluate",
}
_GROUPS = {"organism": "The synthetic model organism: data files and retraining."}

_HELP = """Find the few weights that a language model needs for one behavior, remove them, and measure what stays.

Start with `fastprune demo`. With a model of your own, a folder on disk:

1. `fastprune generate MODEL prompts.csv --out harm.jsonl`, and the same for benign prompts

2. `fastprune score MODEL --harm harm.jsonl --benign benign.jsonl --out scores.safetensors`

3. `fastprune select scores.safetensors -p 5e-5 -q 1e-5 --out mask.safetensors`

4. `fastprune answer MODEL --rows held_out.csv --mask mask.safetensors --store answers`, or with a report at once
`fastprune eval MODEL --harm held_out.jsonl --skills skills.jsonl --mask mask.safetensors --out report`

5. `fastprune patch MODEL mask.safetensors --out PRUNED_MODEL`
"""


def program() -> typer.Typer:
    """The program with all of its commands; their files load neither torch nor transformers."""
    app = typer.Typer(
        name="fastprune",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help=_HELP,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    groups = {name: typer.Typer(no_args_is_help=True, help=text) for name, text in _GROUPS.items()}
    for name, place in COMMANDS.items():
        file, function = place.split(":")
        made = getattr(importlib.import_module(f"fastprune.cli.{file}"), function)
        group, _, own = name.rpartition(" ")
        (groups[group] if group else app).command(own)(made)
    for name in groups:
        app.add_typer(groups[name], name=name)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fastprune {fastprune.__version__}")
        raise typer.Exit


def pasted(*words: object) -> str:
    """A command as it can be pasted into a shell."""
    return "fastprune " + shlex.join(map(str, words))


def quiet_loading() -> None:
    """Silence transformers' own bar for loading weights, which it draws even where there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
