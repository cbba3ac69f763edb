"""Errors and warnings name arguments by structure wherever a command has an option for them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import fastprune
from fastprune import errors
from fastprune.cli.app import COMMANDS, program

PACKAGE = Path(fastprune.__file__).parent
KINDS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.FastpruneError | errors.FastpruneWarning)
}
# Arguments that a command calls otherwise, see `names` in the declarations of the commands.
OTHERS = {"out_dir", "in_dir", "folder", "like", "n_examples", "n_tokens", "harm_rows", "skill_rows", "model_or_config"}


def options() -> set[str]:
    """Names of all parameters of all commands, and of the arguments that stand for them."""
    found = set(OTHERS)
    for words in COMMANDS:
        command = typer.main.get_command(program())
        for word in words.split():
            command = command.commands[word]
        found |= {parameter.name for parameter in command.params}
    return found - {"as_json", "quiet", "force", "undo"}  # `patch --undo` is no argument of the library


OPTIONS = options()
NAMED = re.compile(rf"^({'|'.join(OPTIONS)})(: | must be )")
# With a value that a command could take, and not as an argument of a call of the library.
MENTIONED = re.compile(rf"(?<![\w.\[])({'|'.join(OPTIONS)})=(?=['\"\d{{]|True|False|None|$|[\s,;)])")


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every error and warning that the library makes, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node.func, "id", None) if isinstance(node, ast.Call) else None
            if name in KINDS or name == "warn":
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def texts(call: ast.Call) -> list[str]:
    """The literal parts of the message, without what stands in braces."""
    if not call.args:
        return []
    message = call.args[0]
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "" for part in parts]


def test_every_error_whose_text_begins_with_an_option_carries_it() -> None:
    found = list(calls())
    assert len(found) > 300
    wrong = [f"{place} {texts(call)[0]}" for place, call in found if texts(call) and NAMED.match(texts(call)[0])]
    assert not wrong, "write argument=…"


def test_every_option_in_the_advice_is_a_setting() -> None:
    wrong = [f"{place} {text}" for place, call in calls() for text in texts(call) if MENTIONED.search(text)]
    assert not wrong, "write setting(…)"


@pytest.mark.parametrize("text", ["segments: expected less", "max_length must be positive", "give q_max=0.1 or more"])
def test_the_tests_above_see_what_they_are_for(text: str) -> None:
    (part,) = texts(ast.parse(f"ArgumentError({text!r})").body[0].value)
    assert NAMED.match(part) or MENTIONED.search(part)
