"""Rows of a calibration or evaluation set, from wherever they are kept.

In: the path of a file, a data frame, a ``datasets`` object, or anything that yields dicts; the layouts and types are
listed in ``docs/data.md``. Out: :class:`Row` objects, checked value by value, so that later code can rely on their
types, and what was recognized.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, overload

from fastprune.calibration.cells import FINISHES, shown
from fastprune.calibration.conversations import Turns
from fastprune.calibration.known_layouts import FIELDS, REQUIRED
from fastprune.calibration.layouts import Columns, Layout, check_mapping, recognize
from fastprune.calibration.readers import Records, check_unique, read_file, union
from fastprune.calibration.row_values import GENERATE, row_values
from fastprune.errors import CalibrationError, setting, warn

__all__ = [
    "FINISHES",
    "Row",
    "Rows",
    "Table",
    "describe",
    "describe_row",
    "read_rows",
    "read_table",
    "read_texts_or_rows",
]

# Optional columns whose absence changes the experiment, so that a misspelt one is worth a warning. The cutoff takes
# "prefix" and "categories" for one of them, but not "preference" or "prompt_id".
_MISSPELT = ("prefill", "category", "finish")
_ALIKE = 0.75


@dataclass(frozen=True)
class Row:
    """One request and its reply.

    Attributes:
        prompt: The request; context, never scored.
        response: The reply without its prefill; every token of it is scored.
        prefill: The start of the reply that counts as context.
        category: Label by which :meth:`CalibrationSet.subset` picks rows.
        id: Name of the row in messages and reports.
        extra: Every other column, unchanged.
        finish: How the reply ended: ``"stop"`` by itself, ``"length"`` at a token limit, ``None`` unknown.
        history: What came before the prompt, ``(role, text)`` each: a system text or none, then exchanges of user and
            assistant; context, never scored.
    """

    prompt: str
    response: str
    prefill: str = ""
    category: str | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None
    history: Turns = ()

    def to_record(self) -> dict[str, Any]:
        """The row as JSON data in our own layout, from which :func:`read_rows` makes an equal row.

        Fields without a value are left out, ``prompt`` and ``response`` never.
        """
        own = {name: getattr(self, name) for name in FIELDS}
        own["history"] = [{"role": role, "content": text} for role, text in self.history]
        return {**self.extra, **{name: value for name, value in own.items() if value or name in REQUIRED}}


class Table(Sequence[Row]):
    """The rows of one source, with what was recognized in it; taken wherever rows are.

    Attributes:
        name: Of the source, in messages.
        layout: What was recognized; its text is one line for people.
    """

    def __init__(self, rows: Iterable[Row], name: str, layout: Layout) -> None:
        self._rows = tuple(rows)
        self.name = name
        self.layout = layout

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> Row | Table:
        if isinstance(index, slice):
            return Table(self._rows[index], self.name, self.layout)
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Table({self.layout})"  # numbers and names, no text


Rows = str | Path | Iterable[Row | Mapping[str, Any]]
"""Where rows come from: the path of a file, or the rows themselves, as mappings, data frame or :class:`Table`."""


def read_rows(source: Rows, *, columns: Columns | None = None, references: bool = True) -> list[Row]:
    """Read rows from a file or from memory.

    The layout is recognized by the names of the columns: our own (``prompt, response[, prefill, category, id, finish,
    history]``), those of AdvBench, Alpaca, HarmBench and others, conversations, and one prompt a line; ``docs/data.md``
    lists them, and the types of files. Optional values may be absent, ``None``, NaN or NA, as ``datasets`` and pandas
    write missing values. Whole numbers are valid names in ``category`` and ``id``, also as floats (1.0 is "1").

    Args:
        source: Path of a file; an iterable of mappings or rows, which is iterated once; a data frame of pandas, polars
            or pyarrow; a ``datasets`` object.
        columns: Columns by field where they are not to be recognized, e.g. ``{"prompt": "goal", "response": "target"}``
            (also ``messages``); ``None`` for a field leaves it out.
        references: Whether every row has to have a response; otherwise it is ``""`` where there is none.

    Returns:
        The rows in their order, at least one.

    Raises:
        NotFoundError: There is no such file.
        ArgumentError: ``columns`` names a field or a column that there is not.
        CalibrationError: The type of file is unknown, no layout is recognized or several are, a line is not JSON, a
            value is not text, or there are no rows. The message names the file and the line, or the number of the row
            (from 0), and never a text.

    Warns:
        FastpruneWarning: An unused column has nearly the name of an optional column that is absent.
    """
    return list(read_table(source, columns=columns, references=references))


def read_table(source: Rows, *, columns: Columns | None = None, references: bool = False) -> Table:
    """As :func:`read_rows`, together with what was recognized; responses are not needed by default."""
    mapping = check_mapping(columns)
    if isinstance(source, Table) and not mapping:
        if references:
            _check_responses(source)
        return source
    records = _records(source, [column for column in mapping.values() if column is not None])
    if not records.header:  # records bring their own columns, so all of them are looked at
        items = list(records.items)
        records = replace(records, items=items, columns=union(items))
        if not items:
            raise CalibrationError(f"{records.name}: expected at least one row, got none")
    place = records.name if records.header else next(iter(records.items))[1]
    layout = recognize(records.columns, mapping, place, lines=records.lines)
    if references and not layout.has_response:
        raise _no_response(place, layout)
    rows: list[Row] = []
    misspelt: dict[str, str] = {}
    seen: set[frozenset] = set()
    for record, where in records.items:
        rows.append(Row(**row_values(record, where, layout, blank=records.blank, references=references)))
        if (keys := frozenset(record)) not in seen:  # most rows have the same columns
            seen.add(keys)
            misspelt.update(_misspelt(record, layout, mapping))
    if not rows:
        raise CalibrationError(f"{records.name}: expected at least one row, got none")
    for column, meant in misspelt.items():
        warn(f"{records.name}: column {column!r} is not used; did you mean {meant!r}?")
    layout = replace(layout, table=records.name, files=records.files, rows=len(rows))
    return Table(rows, records.name, replace(layout, without_response=sum(not row.response for row in rows)))


def read_texts_or_rows(
    source: str | Path | Iterable[str | Row | Mapping[str, Any]], *, references: bool = True
) -> list[str] | list[Row]:
    """Read texts if every item is a string, else rows as :func:`read_rows` does; a single string is a path."""
    if isinstance(source, (str, Path, Table)) or _is_frame(source):
        return read_rows(cast("Rows", source), references=references)
    _check_yields_rows(source)
    items = list(source)
    texts = [item for item in items if isinstance(item, str)]
    # strings among rows are refused by read_rows, which names the first
    if texts and len(texts) == len(items):
        return texts
    return read_rows(cast("list[Row | Mapping[str, Any]]", items), references=references)


def describe(source: object) -> str:
    """Name of a source in messages: its path, or ``rows`` for rows in memory."""
    if isinstance(source, Table):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else "rows"


def describe_row(name: str, index: int, row: Row) -> str:
    """Name of a row in messages: where it stands and its id, never its text."""
    return f"{name}, row {index}" + (f" (id {row.id!r})" if row.id is not None else "")


def _records(source: Any, mapped: Sequence[str]) -> Records:
    if isinstance(source, (str, Path)):
        return read_file(Path(source), mapped)
    name = describe(source)
    columns: Sequence[Any] | None
    if _is_frame(source):
        items, columns = _of_frame(source)
        check_unique(columns, name)
    else:
        _check_yields_rows(source)
        items = source
        columns = getattr(source, "column_names", None)  # a datasets object can be refused before it is read
    places = ((record, f"{name}, row {number}") for number, record in enumerate(items))
    named = ((_mapping(record, where), where) for record, where in places)
    return Records(name, named, list(columns or ()), header=columns is not None)


def _mapping(record: Any, where: str) -> Mapping[str, Any]:
    if isinstance(record, Row):
        return {**record.extra, **{name: getattr(record, name) for name in FIELDS}}
    if not isinstance(record, Mapping):
        raise CalibrationError(f"{where}: expected a mapping, got {type(record).__name__}")
    return record


def _is_frame(source: object) -> bool:
    """Whether it is a table of pandas, polars or pyarrow, which yields columns and not rows."""
    return any(hasattr(source, name) for name in ("itertuples", "to_dicts", "to_pylist"))


def _of_frame(source: Any) -> tuple[Iterable[Any], list[Any]]:
    if hasattr(source, "itertuples"):
        return source.to_dict("records"), list(source.columns)
    if hasattr(source, "to_dicts"):
        return source.to_dicts(), list(source.columns)
    return source.to_pylist(), list(source.column_names)


def _check_yields_rows(source: Any) -> None:
    """Refuse objects whose iteration yields names of columns or splits instead of rows."""
    if isinstance(source, Mapping):
        keys = sorted(map(str, source))[:8]
        raise CalibrationError(
            f"expected an iterable of mappings, got one {type(source).__name__} with the keys {shown(keys)}; of "
            "several splits pass one, such as data['train'], of a table of columns pass its rows",
            argument="rows",
        )
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a data frame of another kind
        raise CalibrationError(
            f"expected an iterable of mappings, got a {type(source).__name__}; pass its .to_dict('records')",
            argument="rows",
        )
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise CalibrationError(
            f"expected a path or an iterable of mappings, got {type(source).__name__}", argument="rows"
        )


def _check_responses(table: Table) -> None:
    if not table.layout.has_response:
        raise _no_response(table.name, table.layout)
    lacking = next((index for index, row in enumerate(table) if not row.response), None)
    if lacking is not None:
        raise CalibrationError(
            f"{describe_row(table.name, lacking, table[lacking])}: response: expected text, got none; {GENERATE}"
        )


def _no_response(where: str, layout: Layout) -> CalibrationError:
    return CalibrationError(
        f"{where}: expected the column response, got {shown(layout.columns)}; name the column with "
        f"{setting('columns', {'response': 'COLUMN'})}, or let the model write responses with `fastprune generate`"
    )


def _misspelt(record: Mapping[str, Any], layout: Layout, mapping: Columns) -> Iterator[tuple[str, str]]:
    """Unused columns, each with the absent optional column whose name is nearly the same."""
    absent = [name for name in _MISSPELT if name not in mapping and layout.sources.get(name, (name,))[0] not in record]
    for column in record:
        if absent and isinstance(column, str) and column not in layout.used:
            for meant in difflib.get_close_matches(column.strip().lower(), absent, n=1, cutoff=_ALIKE):
                yield column, meant
