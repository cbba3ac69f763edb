"""Messages of the library, which name Python's arguments, in the words of the command line.

In: a message. Out: the same with ``strict=False`` as ``--no-strict`` and ``p_max=0.1`` as ``--p-max 0.1``. It must not
know what the messages are about.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex

_NAMES = (
    *("p", "q", "p_max", "q_max", "slice", "max_length", "format", "segments", "offload", "resume"),
    *("bos", "finish", "system", "template_args"),
)
# Alone between blanks or punctuation: what is part of a path stays as it is. A value is a word, a number or a mapping.
_VALUE = r"'\w*'|\"\w*\"|\{[^{}]*\}|True\b|False\b|\d[\d.e-]*|"
_ARGUMENT = re.compile(rf"(?<![^\s(])({'|'.join(_NAMES)})=({_VALUE})(?=[\s,;:)]|$)")


def as_options(message: object) -> str:
    """A message with arguments written as options."""
    return _ARGUMENT.sub(_option, re.sub(r"(?<![^\s(])strict=False\b", "--no-strict", str(message)))


def _option(found: re.Match[str]) -> str:
    name, value = found[1].replace("_", "-"), found[2]
    if value.startswith("{"):
        with contextlib.suppress(ValueError, SyntaxError):  # not a mapping as Python writes it: shown as it came
            value = shlex.quote(json.dumps(ast.literal_eval(value)))
    elif value in ("True", "False"):
        value = value.lower()
    else:
        value = value.strip("'\"") or value.replace('"', "'")
    return f"{'-' if len(name) == 1 else '--'}{name} {value}".rstrip()
