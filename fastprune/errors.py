"""Errors that fastprune raises on purpose, and text that is safe to print.

Each class is both a :class:`FastpruneError` and the built-in error that fits, so that ``except ValueError`` catches
what a reader would expect. A message says what was expected, what was given and the way out. The argument at fault and
the arguments that the advice names are kept as such, so that the command line can show its own options instead::

    raise ArgumentError(f"expected 1 … {n}, got {segments!r}; see {setting('memory', '80GiB')}", argument="segments")
"""

from __future__ import annotations

import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Format characters that change the order in which others are shown (Trojan source, CVE-2021-42574). Others of their
# category join letters and emoji.
_DIRECTIONS = {*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
# Control characters, line and paragraph separators, halves of pairs that no encoding has.
_HARMFUL = {"Cc", "Zl", "Zp", "Cs"}
# Around a setting in a message, until the message is in its error: code points that Unicode reserves for a program's
# own use and that no text has. Marks, and not a list of parts, because messages are put together by f-strings.
_BEGIN, _VALUE, _END = "\ufdd0", "\ufdd1", "\ufdd2"
_SETTING = re.compile(f"{_BEGIN}([^{_VALUE}]*){_VALUE}([^{_END}]*){_END}")

Spelling = Callable[[str, str], str]
"""How to write an argument: its name, and the ``repr`` of its value or an empty string, to text."""


def setting(name: str, value: object = ...) -> str:
    """``name=value`` for a message of an error or a warning of this package, kept as an argument and a value.

    Args:
        name: The argument, as Python's functions call it.
        value: Its value; without one the text is ``name=``.
    """
    return f"{_BEGIN}{name}{_VALUE}{'' if value is ... else repr(value)}{_END}"


class _Message(Exception):
    """A text that knows which arguments it names.

    Args:
        message: What was expected, what was given and the way out.
        argument: The argument at fault; the text begins with its name.

    Attributes:
        argument: The same, or ``None``.
    """

    argument: str | None = None
    _marked: str = ""

    def __init__(self, message: object = "", *, argument: str | None = None) -> None:
        text = _SETTING.sub(r"\1=\2", str(message))
        super().__init__(text if argument is None else f"{argument}: {text}")
        # Copies and pickles are made from the text, and get these from ``__dict__``.
        self.argument, self._marked = argument, str(message)

    def spelled(self, spell: Spelling) -> str:
        """The text with its arguments, settings included, as ``spell`` writes them."""
        text = _SETTING.sub(lambda found: spell(found[1], found[2]), self._marked)
        return text if self.argument is None else f"{spell(self.argument, '')}: {text}"


class FastpruneError(_Message):
    """Base of all errors of this package. Nothing is changed in the model when one leaves a call."""


class ArgumentError(FastpruneError, ValueError):
    """An argument is out of range or of the wrong kind."""


class CalibrationError(FastpruneError, ValueError):
    """Calibration data cannot be read, tokenised or scored as given."""


class ModelError(FastpruneError, RuntimeError):
    """The model cannot be driven block by block, or its weights cannot be reached.

    Attributes:
        undo: As of :class:`MaskError`.
    """

    undo: Any = None


class ScoringError(FastpruneError, RuntimeError):
    """A loss, gradient or score is not finite, or a statistic cannot be formed."""


class SelectionError(FastpruneError, ValueError):
    """A selection asks for more than was kept, or for nothing at all."""


class MaskError(FastpruneError, ValueError):
    """A mask does not fit the model or another mask.

    Attributes:
        undo: What takes the mask out again, where leaving :meth:`PruneMask.applied` could not.
    """

    undo: Any = None


class ArtifactError(FastpruneError, ValueError):
    """A file is truncated, foreign, or of another version."""


class DiskError(FastpruneError, OSError):
    """A file cannot be written: the disk is full, a quota is met, or the file system refuses."""


class BackendError(FastpruneError, RuntimeError):
    """An explicitly requested backend cannot serve the call."""


class NotFoundError(FastpruneError, FileNotFoundError):
    """A file or folder named by the caller does not exist."""


class FastpruneWarning(_Message, UserWarning):
    """Something the user should know although the call went on (a shortfall, a fallback, dropped rows)."""


_PACKAGE = str(Path(__file__).parent) + os.sep


def warn(message: str, *, argument: str | None = None) -> None:
    """Issue a FastpruneWarning that names the line outside of this package that the call came from."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(FastpruneWarning(message, argument=argument), stacklevel=level)


def positive_integer(argument: str, value: object, *, optional: bool = False) -> None:
    """Raise ArgumentError unless ``value`` is a positive ``int``; an ``optional`` one may be ``None``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"expected a positive integer{' or None' * optional}, got {value!r}", argument=argument)


def printable(text: object) -> str:
    """Text whose control characters and changes of direction are escaped; line breaks stay."""
    return "".join(character if _is_plain(character) else ascii(character)[1:-1] for character in str(text))


def _is_plain(character: str) -> bool:
    return character == "\n" or (character not in _DIRECTIONS and unicodedata.category(character) not in _HARMFUL)
