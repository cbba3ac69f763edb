"""Messages of the library in the words of a command: arguments of Python's functions become its options.

In: an error or a warning, and the parameters of the command that met it. Out: text, with ``strict=False`` as
``--no-strict`` and ``p_max=0.1`` as ``--p-max 0.1``.
"""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from fastprune.errors import FastpruneError, FastpruneWarning


class Wording:
    """How one command writes the arguments of the library.

    Args:
        parameters: Those of the command, as typer's context has them.
        names: Arguments of the library that the command calls otherwise: argument to parameter.
    """

    def __init__(self, parameters: Iterable[Any] = (), names: Mapping[str, str] | None = None) -> None:
        self._parameters = {parameter.name: parameter for parameter in parameters}
        self._names = dict(names or {})

    def text(self, message: BaseException | str) -> str:
        """A message as the command says it."""
        return (
            message.spelled(self.argument) if isinstance(message, FastpruneError | FastpruneWarning) else str(message)
        )

    def argument(self, name: str, value: str = "") -> str:
        """One argument of the library, with the ``repr`` of its value or without a value.

        What the command has no option for stays as it is in Python.
        """
        parameter = self._parameters.get(self._names.get(name, name))
        if parameter is None:
            return f"{name}={value}" if value else name
        if parameter.param_type_name == "argument":
            return parameter.name
        option = max(parameter.opts, key=len)
        if value == "None":
            return f"no {option}"
        if value in ("True", "False") and getattr(parameter, "is_flag", False):
            without = parameter.secondary_opts[0] if parameter.secondary_opts else f"no {option}"
            return option if value == "True" else without
        return f"{option} {_word(value)}" if value else option


def _word(value: str) -> str:
    """The ``repr`` of a value as a word of the shell."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return shlex.quote(found if isinstance(found, str) else json.dumps(found))
