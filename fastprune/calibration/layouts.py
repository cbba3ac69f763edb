"""Layouts of tables of rows, recognized by the names of their columns.

In: the columns of a table, and what a caller says about them. Out: a :class:`Layout`, which says from which columns
the fields of a row are made. Nothing is recognized by what stands in a cell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastprune.calibration.cells import shown
from fastprune.calibration.known_layouts import (
    CONVERSATION,
    FIELDS,
    HEADERS,
    KNOWN,
    MESSAGES,
    OWN,
    REQUIRED,
    WORTH_SAYING,
    Known,
)
from fastprune.errors import ArgumentError, CalibrationError, setting

Columns = Mapping[str, str | None]
"""What a caller says about columns: field (or ``messages``) to column, ``None`` for a field that is taken from none."""


@dataclass(frozen=True)
class Layout:
    """What was recognized in a table, and what of it became rows; as text it is one line for people.

    Attributes:
        name: Name of the layout; empty where the caller named the columns.
        sources: The columns behind each field, in the order in which they are joined.
        needed: The column that every row has to have.
        columns: Every column that was found.
        conversation: Whether prompt, response and history come from one list of messages.
        joint: What joins several columns of a prompt.
        lines: Whether the rows are one prompt a line, without names of columns.
        note: What a user should know.
        table: Name of the table in messages.
        rows: Number of rows.
        without_response: How many of them have no response.
        files: How many files they come from.
    """

    name: str
    sources: Mapping[str, tuple[str, ...]]
    needed: str
    columns: tuple[Any, ...]
    conversation: bool = False
    joint: str = "\n\n"
    lines: bool = False
    note: str = ""
    table: str = ""
    rows: int = 0
    without_response: int = 0
    files: int = 1

    @property
    def has_response(self) -> bool:
        """Whether rows can have a response."""
        return self.conversation or "response" in self.sources

    @cached_property
    def used(self) -> frozenset[str]:
        """The columns that rows are made of."""
        return frozenset(column for columns in self.sources.values() for column in columns)

    def __str__(self) -> str:
        several = f" of {self.files} files" if self.files > 1 else ""
        remarks = [part for part in (self.name if self.name != OWN.name else "", self.note) if part]
        unused = [column for column in self.columns if str(column).casefold() in WORTH_SAYING - self._folded_used]
        if unused:
            remarks.append(f"not used: {_listed(unused)}")
        if self.rows and self.without_response == self.rows:
            remarks.append("no responses")
        elif self.without_response:
            remarks.append(f"{self.without_response} without a response")
        rows = f"{self.rows} row{'s' * (self.rows != 1)}"
        return f"{self.table}: {rows}{several}; {self._fields()}" + (f" ({'; '.join(remarks)})" if remarks else "")

    @property
    def _folded_used(self) -> frozenset[str]:
        return frozenset(column.casefold() for column in self.used)

    def _fields(self) -> str:
        parts = []
        if self.conversation:
            parts.append(f"prompt, response and history from {_listed(self.sources['prompt'])}")
        for name in FIELDS:
            columns = self.sources.get(name, ())
            if self.lines and name == "prompt":
                parts.append("one prompt a line")
            elif columns and not (self.conversation and name == "prompt"):
                parts.append(name if columns == (name,) else f"{name} from {_listed(columns)}")
        return ", ".join(parts)


def is_header(name: str, mapped: Collection[str] = ()) -> bool:
    """Whether a text is the name of a column by which a layout is recognized, or one that a caller has named."""
    return name.strip().casefold() in HEADERS or name in mapped


def check_mapping(columns: object) -> dict[str, str | None]:
    """What a caller says about columns, checked; empty for ``None``.

    Raises:
        ArgumentError: It is no mapping of fields to names of columns, or names a column twice.
    """
    if columns is None:
        return {}
    if not isinstance(columns, Mapping):
        raise ArgumentError(
            f'expected a mapping such as {{"prompt": "goal"}}, got {type(columns).__name__}', argument="columns"
        )
    for name, column in columns.items():
        if name not in (*FIELDS, MESSAGES):
            raise ArgumentError(f"expected one of {[*FIELDS, MESSAGES]} to be mapped, got {name!r}", argument="columns")
        if not (column is None or (isinstance(column, str) and column)):
            raise ArgumentError(
                f"expected the name of a column for {name}, or None to leave it out, got {column!r}", argument="columns"
            )
    named = [column for column in columns.values() if column is not None]
    if len(set(named)) < len(named):
        raise ArgumentError(f"expected a column for each field, got one for two in {named}", argument="columns")
    if None in (columns.get("prompt", ...), columns.get(MESSAGES, ...)):
        raise ArgumentError("expected a column for the prompt, got None", argument="columns")
    if MESSAGES in columns and not {"prompt", "response", "history"}.isdisjoint(columns):
        raise ArgumentError(
            f"expected {MESSAGES}, which hold prompt, response and history, or columns for these, got both",
            argument="columns",
        )
    return dict(columns)


def recognize(columns: Sequence[Any], mapping: Columns, where: str, *, lines: bool = False) -> Layout:
    """The layout of a table.

    Args:
        columns: Names of its columns.
        mapping: What the caller says, as :func:`check_mapping` gives it. With a column for the prompt it is the whole
            layout, to which optional columns under our own names are added; otherwise it changes what is recognized.
        where: Name of the table in messages.
        lines: Whether its rows are one prompt a line.

    Raises:
        ArgumentError: The table lacks a column that the caller names.
        CalibrationError: No layout is recognized, or several are.
    """
    names = _Names(columns, where)
    wanted = {name: names.asked(name, column) for name, column in mapping.items() if column is not None}
    asked = wanted.pop(MESSAGES, None) or wanted.get("prompt")
    known = _choose(names, where) if asked is None else CONVERSATION if MESSAGES in mapping else OWN
    # A table of our own is read as written: an unused "Prefill" in it is worth a warning.
    find = names.exact if known is OWN and set(REQUIRED) <= set(columns) else names.find
    sources: dict[str, tuple[str, ...]] = {}
    needed = asked or find(known.prompt)
    assert needed is not None  # as it was chosen
    parts = [needed]
    if asked is None:
        around = [(known.before, 0), (known.after, 1)]
        for name, place in around:
            if name is not None and (found := names.find(name)) is not None:
                parts.insert(place, found)
    sources["prompt"] = tuple(parts)
    spoken_for = {*parts, *wanted.values()}
    for name in FIELDS[1:]:
        column = wanted.get(name)
        if column is None and name not in mapping:
            own = (known.response,) if name == "response" else _candidates(known, name)
            there = (find(candidate) for candidate in own if candidate is not None)
            column = next((each for each in there if each is not None and each not in spoken_for), None)
        if column is not None:
            sources[name] = (column,)
    return Layout(
        name="" if asked is not None else known.name,
        sources=sources,
        needed=needed,
        columns=tuple(columns),
        conversation=known.conversation and "response" not in mapping,
        joint=known.joint,
        lines=lines and asked is None,
        note=known.note if sources.get("response") == (find(known.response or ""),) else "",
    )


def _candidates(known: Known, name: str) -> tuple[str, ...]:
    if name == "history" and known is not OWN:
        return ()  # others keep something else under that name
    return (name, *known.aliases.get(name, ()))


def _choose(names: _Names, where: str) -> Known:
    """The one layout whose columns are there: with responses before without, and our own before others."""
    there = names.folded
    possible = [known for known in KNOWN if known.beside is None or known.beside in there]
    fits = [known for known in possible if known.complete and there.issuperset(known.complete)]
    if not fits:
        fits = [known for known in possible if known.prompt in there]
        # both also stand beside the prompt of another layout: a short name, and a rendered conversation
        weak = [known for known in fits if known.prompt in ("behavior", "text")]
        fits = [known for known in fits if known not in weak] or weak[:1]
    one_each = {there.intersection(_columns(known)): known for known in reversed(fits)}
    fits = list(one_each.values())[::-1]  # of several with the same columns the first
    if OWN in fits:
        return OWN
    if len(fits) == 1:
        return fits[0]
    if not fits:
        lacking = [name for name in REQUIRED if name not in there]
        raise CalibrationError(
            f"{where}: expected the column{'s' * (len(lacking) > 1)} {' and '.join(lacking)}, "
            f"got {shown(names.columns)}; name the columns with "
            f"{setting('columns', {'prompt': 'COLUMN', 'response': 'COLUMN'})}, or save one prompt a line as .txt"
        )
    first = fits[0]
    shapes = [f"{known.name} ({', '.join(name for name in _columns(known) if name in there)})" for known in fits]
    meant = {name: column for name, column in zip(REQUIRED, _columns(first), strict=False) if column in there}
    raise CalibrationError(
        f"{where}: expected the columns of one layout, got those of {shapes[0]} and of {shapes[1]}; say which "
        f"are meant with {setting('columns', {MESSAGES: first.prompt} if first.conversation else meant)}"
    )


def _columns(known: Known) -> tuple[str, ...]:
    return known.complete or (known.prompt,)


def _listed(columns: Iterable[Any]) -> str:
    return " and ".join(f'"{column}"' for column in columns)


class _Names:
    """The names of a table's columns, to be found as written or else without regard to case."""

    def __init__(self, columns: Sequence[Any], where: str) -> None:
        self.columns = columns
        self._where = where
        self._by_folded: dict[str, list[str]] = {}
        for name in columns:
            if isinstance(name, str):
                self._by_folded.setdefault(name.casefold(), []).append(name)

    @property
    def folded(self) -> frozenset[str]:
        return frozenset(self._by_folded)

    def exact(self, name: str) -> str | None:
        return name if name in self.columns else None

    def find(self, name: str) -> str | None:
        if name in self.columns:
            return name
        found = self._by_folded.get(name.casefold(), [])
        if len(found) > 1:
            raise CalibrationError(
                f"{self._where}: expected one column {name}, got {shown(found)}, which differ in case alone; name one "
                f"with {setting('columns', {'prompt': 'COLUMN'})}"
            )
        return found[0] if found else None

    def asked(self, name: str, column: str) -> str:
        """The column that a caller has named."""
        found = self.find(column)
        if found is None:
            raise ArgumentError(
                f"{self._where}: expected one of the columns {shown(self.columns)} for {name}, got {column!r}; give "
                f"{setting('columns', {name: 'COLUMN'})} with one of these",
                argument="columns",
            )
        return found
