"""Values of a table as rows need them: text, names, and what counts as no value.

In: a value as a file or a data frame has it. Out: checked text. A message names the column and the row, never a text:
what stands in a header may be a prompt, too, in a file that has none, so only what looks like a name is shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from numbers import Real
from typing import Any, cast

from fastprune.errors import CalibrationError, setting

FINISHES = ("stop", "length")  # as generation servers call them

# One word: a header of several may be the first prompt of a file without a header.
_NAME = re.compile(r"[^\W\d][\w.:/-]{0,39}")


def shown(columns: Iterable[Any]) -> str:
    """Names of columns for a message; one that could be a text is shown by its place, from 1."""
    names = [
        name if isinstance(name, str) and _NAME.fullmatch(name) else f"<column {place}>"
        for place, name in enumerate(columns, start=1)
    ]
    return str(names) if names else "none"


def absent(value: Any) -> bool:
    """Whether a value stands for none, as ``datasets`` and pandas write it."""
    if isinstance(value, Real):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # of pandas, which is not imported here


def text(value: Any, column: str, where: str, *, expected: str = "a string") -> str:
    """A value that has to be text.

    Raises:
        CalibrationError: It is something else, or holds half a surrogate pair.
    """
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {column}: expected {expected}, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but tokenizers refuse it
        raise CalibrationError(
            f"{where}: {column}: expected valid Unicode, got half a surrogate pair at character {error.start}"
        ) from None
    return value


def name(value: Any, field: str, column: str, where: str) -> str | None:
    """A value that has to be a name: text, a whole number, or absent.

    Raises:
        CalibrationError: It is something else.
    """
    if absent(value):
        return None
    if isinstance(value, Real) and not isinstance(value, bool):
        number = cast("float", value)
        if math.isfinite(number) and number == int(number):
            return str(int(number))  # pandas turns whole numbers into floats where one is missing
    if not isinstance(value, str):
        raise CalibrationError(
            f"{where}: {column}: expected a string, got {type(value).__name__}; leave the column out "
            f"with {setting('columns', {field: None})}"
        )
    return text(value, column, where)


def finish(value: Any, column: str, where: str) -> str | None:
    """How a reply ended, or ``None`` where that is not said.

    Raises:
        CalibrationError: It is another word.
    """
    if absent(value):
        return None
    if not isinstance(value, str) or value not in FINISHES:
        raise CalibrationError(
            f"{where}: {column}: expected one of {FINISHES}, got another {type(value).__name__}; leave it empty where "
            "it is not known, and drop rows that ended otherwise"
        )
    return value
