"""Options that several commands share, and the values they take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprune.cli.processes import note
from fastprune.errors import ArgumentError
from fastprune.evaluation.attacks import ATTACKS
from fastprune.evaluation.judges import JUDGES


class Format(StrEnum):
    """How rows become tokens."""

    raw = "raw"
    chat = "chat"


class Bos(StrEnum):
    """Whether raw text begins with the tokenizer's BOS."""

    auto = "auto"
    true = "true"
    false = "false"

    @property
    def rule(self) -> str | bool:
        """As Python's functions take it."""
        return {"auto": "auto", "true": True, "false": False}[self]


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


if TYPE_CHECKING:
    AttackName = JudgeName = str
else:  # typer offers the members of an enum as choices
    AttackName = StrEnum("AttackName", {name: name for name in ATTACKS})
    JudgeName = StrEnum("JudgeName", {name: name for name in JUDGES})

AttackOption = Annotated[
    AttackName,
    typer.Option(
        help=f"Attack behind the harm rate. {'. '.join(f'{name}: {kind.summary}' for name, kind in ATTACKS.items())}."
    ),
]
JudgeOption = Annotated[
    JudgeName,
    typer.Option(help=f"Judge of harm. {'. '.join(f'{name}: {kind.summary}' for name, kind in JUDGES.items())}."),
]


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

BosOption = Annotated[
    Bos,
    typer.Option(
        help="Begin raw text with the tokenizer's BOS. auto: where the tokenizer does so by itself. "
        "false: never, as in the published recipe."
    ),
]
TemplateArgsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Variables of the chat template: a JSON object, or NAME=VALUE such as enable_thinking=false; repeatable."
    ),
]
SystemOption = Annotated[str | None, typer.Option(help="System turn of the chat format.")]
FinishOption = Annotated[
    list[str] | None,
    typer.Option(
        help="How the replies ended whose row has no column `finish`: length (cut at a limit of tokens; their end of "
        "turn is then not scored) or stop. For one set: harm=length or benign=length; repeatable."
    ),
]


def format_of(given: Format | None, model: Path, tokenizer: Any) -> str:
    """The format by name, raw by default; says so if the model was probably made for chat."""
    if given is None and getattr(tokenizer, "chat_template", None) is not None:
        note(f"{model} has a chat template, and --format is raw by default; for a chat model give --format chat")
    return (given or Format.raw).value


def template_args_of(given: Sequence[str] | None) -> dict[str, Any] | None:
    """JSON objects and ``NAME=VALUE`` as one mapping; a value that is no JSON is text.

    Raises:
        ArgumentError: One is neither a JSON object nor NAME=VALUE.
    """
    if not given:
        return None
    chosen: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                chosen |= json.loads(text)
            except ValueError as error:
                raise ArgumentError(f"template_args: expected a JSON object, got {text!r} ({error})") from error
        elif equals and name.isidentifier():
            chosen[name] = _value(value)
        else:
            raise ArgumentError(f"template_args: expected a JSON object or NAME=VALUE, got {text!r}")
    return chosen


def finish_of(given: Sequence[str] | None, roles: Sequence[str] = ("harm", "benign")) -> dict[str, str | None]:
    """``["length"]`` or ``["harm=length"]`` as the set-wide finish of each set.

    Raises:
        ArgumentError: A set is unknown; the value is checked where it is used.
    """
    chosen: dict[str, str | None] = dict.fromkeys(roles)
    for text in given or ():
        role, equals, value = text.partition("=")
        if not equals:
            chosen = dict.fromkeys(roles, text)
        elif role in chosen:
            chosen[role] = value
        else:
            raise ArgumentError(
                f"finish: expected length, stop, or one of these for {' or '.join(roles)}, got {text!r}"
            )
    return chosen


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
