"""How rows become tokens: the options, and what the files of scores and masks know of it.

Rows are measured as they were scored. So a command that is given a mask takes the format, the BOS rule and the
variables of the chat template from it; an explicit option wins, and a difference is said.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastprune.cli.processes import note
from fastprune.errors import ArgumentError


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
        return "auto" if self is Bos.auto else self is Bos.true


FormatOption = Annotated[
    Format | None,
    typer.Option(
        help="raw: prompt, line break, reply. chat: the tokenizer's template (default: that of the masks, or raw)."
    ),
]
BosOption = Annotated[
    Bos | None,
    typer.Option(
        help="Begin raw text with the tokenizer's BOS. auto: where the tokenizer does so by itself. false: never, as "
        "in the published recipe (default: that of the masks, or auto)."
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
        help="How replies without a column `finish` ended: length (cut at a token limit; the end of turn is not "
        "scored) or stop. For one set: harm=length or benign=length; repeatable."
    ),
]


@dataclass(frozen=True)
class Encoding:
    """How the rows of a command become tokens; arguments of ``load_calibration`` and ``EvaluationSuite``."""

    format: str
    bos: str | bool
    template_args: dict[str, Any] | None
    system: str | None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {name: getattr(self, name) for name in ("format", "bos", "template_args", "system")}


def encoding_of(
    tokenizer: Any,
    model: Path,
    format: Format | None,
    bos: Bos | None,
    template_args: Sequence[str] | None,
    system: str | None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Encoding:
    """The options, and for what was not given the encoding of the masks.

    Args:
        tokenizer: The model's.
        model: Its folder, for messages.
        format: As given.
        bos: As given.
        template_args: As given.
        system: As given.
        known: Encodings of scores or masks by the names of their files, as in ``provenance["calibration"]["harm"]``.

    Raises:
        ArgumentError: The masks differ and nothing was given, or an option cannot be read.
    """
    known = known or {}
    formats = {name: facts["format"] for name, facts in known.items()}
    chosen = _agreed("format", formats, None if format is None else format.value)
    if chosen is None:
        if getattr(tokenizer, "chat_template", None) is not None:
            note(f"{model} has a chat template, and --format is raw by default; for a chat model give --format chat")
        chosen = Format.raw.value
    # Of masks in another format nothing else is taken: raw text has no template, and a template writes its own BOS.
    alike = {name: facts for name, facts in known.items() if facts["format"] == chosen}
    rules = {name: (facts.get("bos") or {}).get("rule", "auto") for name, facts in alike.items()}
    rule = _agreed("bos", rules, None if bos is None else bos.rule)
    templates = {name: facts.get("template") or {} for name, facts in alike.items()}
    variables = {name: facts.get("template_args") or {} for name, facts in templates.items()}
    arguments = _agreed("template_args", variables, template_args_of(template_args))
    _check_system({name: facts.get("system_sha256") for name, facts in templates.items()}, system)
    return Encoding(chosen, "auto" if rule is None else rule, arguments or None, system)


def known_encodings(metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """How the harm rows behind each mask were encoded, for the masks that know it, by name."""
    found = {}
    for name, facts in metadata.items():
        harm = (facts.get("calibration") or {}).get("harm") or {}
        if harm.get("format") is not None:
            found[name] = harm
    return found


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
                raise ArgumentError(
                    f"expected a JSON object, got {text!r} ({error})", argument="template_args"
                ) from error
        elif equals and name.isidentifier():
            chosen[name] = _value(value)
        else:
            raise ArgumentError(f"expected a JSON object or NAME=VALUE, got {text!r}", argument="template_args")
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
                f"expected length, stop, or one of these for {' or '.join(roles)}, got {text!r}", argument="finish"
            )
    return chosen


def _agreed(option: str, known: Mapping[str, Any], given: Any) -> Any:
    """What was given, else what all masks have; a difference is said, and refused where nothing was given."""
    name = f"--{option.replace('_', '-')}"
    values = list(known.values())
    if given is not None:
        for mask, value in known.items():
            if value != given:
                note(f"{mask} was made with {name} {_shown(value)}, and {name} {_shown(given)} is used")
        return given
    if any(value != values[0] for value in values):
        made = ", ".join(f"{_shown(value)} ({mask})" for mask, value in known.items())
        raise ArgumentError(f"expected masks that were made alike, got {made}; choose one with {name}", argument=option)
    return values[0] if values else None


def _check_system(known: Mapping[str, str | None], given: str | None) -> None:
    """Say that a system turn differs from the one behind a mask, of which only the hash is known."""
    found = None if given is None else hashlib.sha256(given.encode()).hexdigest()
    for mask, expected in known.items():
        if expected != found:
            what = "without a system turn" if expected is None else "with a system turn"
            other = "none is given" if given is None else "another one is given" if expected else "one is given"
            note(f"{mask} was made {what}, and {other} with --system")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
