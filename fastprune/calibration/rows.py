"""Rows of a calibration or evaluation set, from wherever they are kept.

In: the path of a CSV or JSONL file, a list of dicts, or anything that yields dicts (a Hugging Face ``datasets``
object). Out: :class:`Row` objects, checked column by column, so that later code can rely on their types.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, cast

from fastprune.errors import CalibrationError, NotFoundError, warn

REQUIRED = ("prompt", "response")
OPTIONAL = ("prefill", "category", "id", "finish")
FINISHES = ("stop", "length")  # as generation servers call them
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
    """

    prompt: str
    response: str
    prefill: str = ""
    category: str | None = None
    id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None


Rows = str | Path | Iterable[Row | Mapping[str, Any]]
"""Where rows come from: the path of a file, or the rows themselves."""


def read_rows(path_or_rows: Rows) -> list[Row]:
    """Read rows from a file or from memory.

    Files are UTF-8, with or without a byte order mark. A CSV needs a header; blank lines of a JSONL file are skipped.
    ``prefill``, ``category``, ``id`` and ``finish`` may be absent, ``None``, NaN or NA, as ``datasets`` and pandas
    write missing values. Whole numbers are valid names in ``category`` and ``id``, also as floats (1.0 is "1").

    Args:
        path_or_rows: Path of a ``.csv`` or ``.jsonl`` file, or an iterable of mappings with the columns ``prompt,
            response[, prefill, category, id, finish]``. It is iterated once.

    Returns:
        The rows in their order, at least one.

    Raises:
        NotFoundError: There is no such file.
        CalibrationError: The kind of file is unknown, a column is missing, a line is not JSON, a value is not text, or
            there are no rows. The message names the file and the line, or the number of the row (from 0).

    Warns:
        FastpruneWarning: An unused column has nearly the name of an optional column that is absent.
    """
    rows: list[Row] = []
    misspelt: dict[str, str] = {}
    seen: set[frozenset] = set()
    for record, where in _records(path_or_rows):
        rows.append(_row(record, where))
        if (columns := frozenset(record)) not in seen:  # most rows have the same columns
            seen.add(columns)
            misspelt.update(_misspelt(record))
    if not rows:
        raise CalibrationError(f"{describe(path_or_rows)}: expected at least one row, got none")
    for column, meant in misspelt.items():
        warn(f"{describe(path_or_rows)}: column {column!r} is not used; did you mean {meant!r}?")
    return rows


def read_texts_or_rows(source: str | Path | Iterable[str | Row | Mapping[str, Any]]) -> list[str] | list[Row]:
    """Read texts if every item is a string, else rows as :func:`read_rows` does; a single string is a path."""
    if isinstance(source, (str, Path)):
        return read_rows(source)
    _check_yields_rows(source)
    items = list(source)
    texts = [item for item in items if isinstance(item, str)]
    # strings among rows are refused by read_rows, which names the first
    return texts if texts and len(texts) == len(items) else read_rows(cast("list[Row | Mapping[str, Any]]", items))


def describe(path_or_rows: object) -> str:
    """Name of a source in messages: its path, or ``rows`` for rows in memory."""
    return str(path_or_rows) if isinstance(path_or_rows, (str, Path)) else "rows"


def describe_row(name: str, index: int, row: Row) -> str:
    """Name of a row in messages: where it stands and its id, never its text."""
    return f"{name}, row {index}" + (f" (id {row.id!r})" if row.id is not None else "")


def _records(source: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    if not isinstance(source, (str, Path)):
        yield from _from_memory(source)
        return
    path = Path(source)
    if not path.is_file():
        raise NotFoundError(f"{path}: expected a file of rows, found none")
    match path.suffix.lower():
        case ".csv":
            reader = _from_csv
        case ".jsonl" | ".ndjson":
            reader = _from_jsonl
        case suffix:
            raise CalibrationError(f"{path}: expected a .csv or .jsonl file, got the suffix {suffix!r}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: expected UTF-8 text, byte {error.start} is not ({error.reason})") from error


def _from_csv(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    lines = _csv_lines(path)
    columns = lines[0][1] if lines else []
    _check_columns(columns, str(path))
    if len(set(columns)) < len(columns):
        raise CalibrationError(f"{path}: expected each column once, got the header {columns}")
    # an empty cell of a CSV means no value; the keys of absent optional values show that the column exists
    empty = dict.fromkeys((name for name in OPTIONAL if name in columns), None)
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            raise CalibrationError(
                f"{where}: expected {len(columns)} fields as in the header {columns}, got {len(cells)}"
            )
        record = zip(columns, cells, strict=True)
        yield empty | {name: cell for name, cell in record if cell or name in REQUIRED}, where


def _csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, header first, each with the number of its first line."""
    limit = csv.field_size_limit(2**31 - 1)  # 131,072 characters by default; the limit is process-wide
    lines, begin = [], 1
    try:
        # csv needs newline="" to keep line breaks inside quotes as written
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if cells:
                    lines.append((begin, cells))
                begin = reader.line_num + 1
    except csv.Error as error:
        raise CalibrationError(f"{path}, line {begin}: the row that begins here is not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return lines


def _from_jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise CalibrationError(f"{where}: not valid JSON ({error})") from error
            if not isinstance(record, dict):
                raise CalibrationError(f"{where}: expected a JSON object, got {type(record).__name__}")
            yield record, where


def _from_memory(source: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    _check_yields_rows(source)
    columns = getattr(source, "column_names", None)  # a datasets object can be refused before it is read
    if columns is not None:
        _check_columns(list(columns), "rows")
    for number, record in enumerate(source):
        where = f"rows, row {number}"
        if isinstance(record, Row):
            record = {**record.extra, **{name: getattr(record, name) for name in REQUIRED + OPTIONAL}}
        if not isinstance(record, Mapping):
            raise CalibrationError(f"{where}: expected a mapping, got {type(record).__name__}")
        yield record, where


def _check_yields_rows(source: Any) -> None:
    """Refuse objects whose iteration yields names of columns or splits instead of rows."""
    if isinstance(source, Mapping):
        raise CalibrationError(
            f"expected an iterable of mappings, got one {type(source).__name__} with the keys "
            f"{sorted(map(str, source))[:8]}; of several splits pass one, of a table of columns pass its rows",
            argument="rows",
        )
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a pandas DataFrame
        raise CalibrationError(
            f"expected an iterable of mappings, got a {type(source).__name__}; pass its .to_dict('records')",
            argument="rows",
        )
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise CalibrationError(
            f"expected a path or an iterable of mappings, got {type(source).__name__}", argument="rows"
        )


def _check_columns(columns: list[str], where: str) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise CalibrationError(
            f"{where}: expected the column{'s' * (len(missing) > 1)} {' and '.join(missing)}, got {columns or 'none'}"
        )


def _row(record: Mapping[str, Any], where: str) -> Row:
    _check_columns(list(record), where)
    return Row(
        prompt=_text(record["prompt"], "prompt", where),
        response=_text(record["response"], "response", where),
        prefill="" if _absent(record.get("prefill")) else _text(record["prefill"], "prefill", where),
        category=_name(record.get("category"), "category", where),
        id=_name(record.get("id"), "id", where),
        finish=_finish(record.get("finish"), where),
        extra={key: value for key, value in record.items() if key not in REQUIRED + OPTIONAL},
    )


def _misspelt(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Unused columns, each with the absent optional column whose name is nearly the same."""
    absent = [name for name in _MISSPELT if name not in record]
    for column in record:
        if absent and isinstance(column, str) and column not in REQUIRED + OPTIONAL:
            for meant in difflib.get_close_matches(column.strip().lower(), absent, n=1, cutoff=_ALIKE):
                yield column, meant


def _absent(value: Any) -> bool:
    if isinstance(value, Real):
        return math.isnan(value)
    return value is None or type(value).__name__ in ("NAType", "NaTType")  # of pandas, which is not imported here


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: {column}: expected a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but tokenizers refuse it
        raise CalibrationError(
            f"{where}: {column}: expected valid Unicode, got half a surrogate pair at character {error.start}"
        ) from error
    return value


def _name(value: Any, column: str, where: str) -> str | None:
    if _absent(value):
        return None
    if isinstance(value, Real) and not isinstance(value, bool):
        number = cast("float", value)
        if math.isfinite(number) and number == int(number):
            return str(int(number))  # pandas turns whole numbers into floats where one is missing
    return _text(value, column, where)


def _finish(value: Any, where: str) -> str | None:
    if _absent(value):
        return None
    if not isinstance(value, str) or value not in FINISHES:
        raise CalibrationError(
            f"{where}: finish: expected one of {FINISHES}, got another {type(value).__name__}; leave it empty where it "
            "is not known, and drop rows that ended otherwise"
        )
    return value
