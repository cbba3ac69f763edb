"""Options that several commands share, and the values they take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastprune.cli.processes import note


class Format(StrEnum):
    """How rows become tokens."""

    raw = "raw"
    chat = "chat"


class Scope(StrEnum):
    """Where the best-scored weights are counted."""

    matrix = "matrix"
    all = "global"


class Boundaries(StrEnum):
    """Where hidden states between segments lie."""

    device = "device"
    host = "host"
    disk = "disk"


class Control(StrEnum):
    """Masks that are chosen without looking at any behaviour."""

    random = "random"
    matched = "matched"
    largest = "largest"


class AttackName(StrEnum):
    """Attacks that bear on harm during an evaluation."""

    none = "none"
    prefilling = "prefilling"


class HarmJudge(StrEnum):
    """Who decides that an answer is harmful."""

    exact = "exact"
    not_refused = "not-refused"


ModelFolder = Annotated[
    Path, typer.Argument(help="Checkpoint folder (config, safetensors, tokenizer).", show_default=False)
]
MemoryOption = Annotated[
    str | None, typer.Option(help="Budget on the model's device, such as 80GiB, of each process; decides the segments.")
]
HostMemoryOption = Annotated[
    str | None, typer.Option(help="Budget in host memory beside a GPU, such as 128GiB, of each process.")
]
SegmentsOption = Annotated[
    int | None,
    typer.Option(
        help="Cut the blocks into so many runs, 1 to all: more take less memory, and up to a third more time."
    ),
]
BoundariesOption = Annotated[
    Boundaries | None,
    typer.Option(help="Where hidden states between segments lie; by default the first that has room."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Refuse a mask that was made for a model with other weights.")
]
FormatOption = Annotated[
    Format | None,
    typer.Option(help="raw: prompt, line break, reply. chat: the tokenizer's template.", show_default="raw"),
]


def format_of(given: Format | None, model: Path, tokenizer: Any) -> str:
    """The format by name, raw by default; says so if the model was probably made for chat."""
    if given is None and getattr(tokenizer, "chat_template", None) is not None:
        note(f"{model} has a chat template, and --format is raw by default; for a chat model give --format chat")
    return (given or Format.raw).value
