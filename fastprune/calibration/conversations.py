"""Conversations as data sets have them: lists of messages, to a prompt with what came before it, and a response.

In: a cell. Out: turns, ``(role, text)`` each with the roles system, user and assistant. Messages name the turn by its
number, from 1, and never its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastprune.calibration.cells import text
from fastprune.errors import CalibrationError

Turns = tuple[tuple[str, str], ...]
"""Turns of a conversation, each ``(role, text)``."""

_ROLES = {
    **{"system": "system", "developer": "system"},
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
_KEYS = (("role", "content"), ("from", "value"))


def is_turns(value: Any) -> bool:
    """Whether a cell holds a list of messages instead of text."""
    return not isinstance(value, str | bytes) and (isinstance(value, Sequence) or hasattr(value, "tolist"))


def parse_turns(value: Any, column: str, where: str) -> Turns:
    """The turns of a cell: a list of messages, also as JSON text, as files without nested values have it.

    Raises:
        CalibrationError: It is no such list, or a message is no text of system, user or assistant.
    """
    where = f"{where}: {column}"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise CalibrationError(
                f"{where}: expected a list of messages as JSON, got text that is none; write such rows as .jsonl"
            ) from None
    if hasattr(value, "tolist"):  # the arrays of NumPy that data frames have
        value = value.tolist()
    if isinstance(value, Mapping):  # a list of objects as older `datasets` keep it
        keys = [key for pair in _KEYS for key in pair if key in value]
        if len(keys) != 2 or not all(isinstance(value[key], Sequence) for key in keys):
            raise CalibrationError(f"{where}: expected a list of messages, got one object")
        value = [dict(zip(keys, pair, strict=False)) for pair in zip(*(value[key] for key in keys), strict=False)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise CalibrationError(f"{where}: expected a list of messages, got {type(value).__name__}")
    return tuple(_turn(item, f"{where}, turn {number}") for number, item in enumerate(value, start=1))


def check_history(turns: Turns, where: str) -> None:
    """Raise CalibrationError unless turns can stand before a prompt: a system text or none, then whole exchanges."""
    _check_order(turns, where)
    if turns and turns[-1][0] == "user":
        raise CalibrationError(f"{where}: expected the turns before a prompt to end in a reply, got a user's")


def split(turns: Turns, where: str) -> tuple[Turns, str, str | None]:
    """A conversation as what came before the prompt, the prompt, and the response (``None``: it ends in a user turn).

    Raises:
        CalibrationError: System, user and assistant do not follow each other as they have to.
    """
    _check_order(turns, where)
    response = turns[-1][1] if turns and turns[-1][0] == "assistant" else None
    asked = turns if response is None else turns[:-1]
    if not asked or asked[-1][0] != "user":
        raise CalibrationError(f"{where}: expected a user turn, got a conversation without one")
    return asked[:-1], asked[-1][1], response


def only_reply(turns: Turns, where: str) -> str:
    """The text of a response that is written as a list of one message.

    Raises:
        CalibrationError: It is another list.
    """
    if len(turns) != 1 or turns[0][0] != "assistant":
        raise CalibrationError(f"{where}: expected text, or a list of one assistant turn, got {len(turns)} turns")
    return turns[0][1]


def _turn(item: Any, where: str) -> tuple[str, str]:
    if isinstance(item, Mapping):
        pair = next((keys for keys in _KEYS if all(key in item for key in keys)), None)
        if pair is None:
            raise CalibrationError(f"{where}: expected the keys role and content, or from and value")
        if item.get("tool_calls"):
            raise CalibrationError(f"{where}: expected text alone, got a call of a tool; leave such rows out")
        role, content = (item[key] for key in pair)
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
        role, content = item
    else:
        raise CalibrationError(f"{where}: expected a message with role and content, got {type(item).__name__}")
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise CalibrationError(
            f"{where}: expected the role system, user or assistant, got another; leave such rows out"
        )
    return known, text(_content(content), "content", where)


def _content(value: Any) -> Any:
    """Text that is written as a list of parts, as text; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        parts = [part.get("text") for part in value]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else value
    return value


def _check_order(turns: Turns, where: str) -> None:
    start = 1 if turns and turns[0][0] == "system" else 0
    for number, (role, _) in enumerate(turns[start:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise CalibrationError(
                f"{where}: expected {_article(expected)} turn as turn {start + number + 1} (a system text may come "
                f"first, then user and assistant take turns), got {_article(role)}; leave such rows out"
            )


def _article(role: str) -> str:
    return f"an {role}" if role == "assistant" else f"a {role}"
