"""Files of rows, by type, to records.

In: a path. Out: :class:`Records`, one mapping a row as the file has it, with the place that messages name. Which column
means what is decided elsewhere.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.calibration.cells import shown
from fastprune.calibration.layouts import is_header
from fastprune.errors import CalibrationError, NotFoundError

Record = tuple[Mapping[str, Any], str]
"""A row as it stands, and where, for messages."""


@dataclass(frozen=True)
class Records:
    """The rows of a table before anything is made of them.

    Attributes:
        name: Of the table, in messages.
        items: The records; iterated once.
        columns: Names of the columns; of records that each bring their own, in the order of their first appearance.
        header: Whether the names belong to the table, and not to each record.
        blank: Whether an empty text means no value, as in a CSV.
        lines: Whether each record is one prompt, without a name.
        files: How many files they come from.
    """

    name: str
    items: Iterable[Record]
    columns: Sequence[Any]
    header: bool = True
    blank: bool = False
    lines: bool = False
    files: int = 1


def read_file(path: Path, mapped: Collection[str] = ()) -> Records:
    """The records of a file, or of a folder that has a file of prompts for each category.

    Args:
        path: A ``.csv``, ``.tsv``, ``.json``, ``.jsonl``, ``.ndjson``, ``.txt`` (each also with ``.gz``) or
            ``.parquet`` file.
        mapped: Columns that the caller names, which are known to be no prompts.

    Raises:
        NotFoundError: There is no such file, or the folder has no such files.
        CalibrationError: The file cannot be read.
    """
    if path.is_dir():
        return _folder(path, mapped)
    if not path.is_file():
        raise NotFoundError(f"{path}: expected a file of rows, found none")
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _parquet(path)
    reader = _READERS.get(suffix)
    if reader is None:
        raise CalibrationError(
            f"{path}: expected a .csv or .jsonl file, got the suffix {path.suffix!r}; .tsv, .json, .txt and .parquet "
            "are read, too, and all but the last also as .gz"
        )
    return reader(path, _decoded(path), mapped)


def union(items: Iterable[Record]) -> list[Any]:
    """The keys of all records, in the order of their first appearance."""
    return list(dict.fromkeys(key for record, _ in items for key in record))


def check_unique(columns: Sequence[Any], name: str) -> None:
    """Raise CalibrationError if a column is there twice: one of the two would be lost."""
    if len(set(columns)) < len(columns):
        raise CalibrationError(f"{name}: expected each column once, got the header {shown(columns)}")


def _suffix(path: Path) -> str:
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def _decoded(path: Path) -> str:
    """The text of a file, as UTF-8 with or without a byte order mark; line breaks are as in the file."""
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise CalibrationError(
                f"{path}: expected a whole gzip file, got one that cannot be unpacked ({type(error).__name__})"
            ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: expected UTF-8 text, byte {error.start} is not ({error.reason}); save the file as UTF-8"
        ) from None


def _csv(path: Path, text: str, mapped: Collection[str]) -> Records:
    first = text.partition("\n")[0].rstrip("\r")
    for delimiter in ";\t":  # as spreadsheets of some countries write a CSV
        header = first.split(delimiter)
        if "," not in first and len(header) > 1 and any(is_header(name.strip('"'), mapped) for name in header):
            return _table(path, _cells(path, text, delimiter))
    lines = _cells(path, text, ",")
    if lines and all(len(cells) == 1 for _, cells in lines) and not is_header(lines[0][1][0], mapped):
        return _headless(path, lines)
    return _table(path, lines)


def _tsv(path: Path, text: str, mapped: Collection[str]) -> Records:
    return _table(path, _cells(path, text, "\t"))


def _headless(path: Path, lines: list[tuple[int, list[str]]]) -> Records:
    if len(lines[0][1][0].split()) < 2:  # not shown: it may be a prompt
        raise CalibrationError(
            f"{path}: expected a known column, or prompts without a header, got one column that begins with a single "
            "word; call the column prompt, or save one prompt a line as .txt"
        )
    items = [({"prompt": cells[0]}, f"{path}, line {number}") for number, cells in lines]
    return Records(str(path), items, ["prompt"], lines=True)


def _table(path: Path, lines: list[tuple[int, list[str]]]) -> Records:
    columns = lines[0][1] if lines else []
    check_unique(columns, str(path))
    items = []
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(columns):
            raise CalibrationError(
                f"{where}: expected {len(columns)} fields as in the header {shown(columns)}, got {len(cells)}"
            )
        items.append((dict(zip(columns, cells, strict=True)), where))
    return Records(str(path), items, columns, blank=True)


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Rows that are not blank, header first, each with the number of its first line."""
    limit = csv.field_size_limit(2**31 - 1)  # 131,072 characters by default; the limit is process-wide
    lines, begin = [], 1
    try:
        # csv needs newline="" to keep line breaks inside quotes as written
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if cells:
                lines.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise CalibrationError(f"{path}, line {begin}: the row that begins here is not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return lines


def _jsonl(path: Path, text: str, mapped: Collection[str]) -> Records:
    items = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            items.append((_object(_parsed(line, where), where), where))
    return Records(str(path), items, union(items), header=False)


def _json(path: Path, text: str, mapped: Collection[str]) -> Records:
    found = _parsed(text, str(path), "; a file of one object a line is called .jsonl")
    rows = found if isinstance(found, list) else _rows_of(found, path, mapped)
    places = [f"{path}, row {number}" for number in range(len(rows))]
    if rows and all(isinstance(row, str) for row in rows):
        prompts = [({"prompt": row}, where) for row, where in zip(rows, places, strict=True)]
        return Records(str(path), prompts, ["prompt"], lines=True)
    items = [(_object(row, where), where) for row, where in zip(rows, places, strict=True)]
    return Records(str(path), items, union(items), header=False)


def _rows_of(found: Any, path: Path, mapped: Collection[str]) -> list[Any]:
    """The rows of an object: of columns, or with one list of rows."""
    if not isinstance(found, dict):
        raise CalibrationError(f"{path}: expected a list of objects, got {type(found).__name__}")
    if found and all(isinstance(part, dict) for part in found.values()):  # as pandas writes columns by default
        keys = next(iter(found.values())).keys()
        if all(part.keys() == keys for part in found.values()):
            found = {name: list(part.values()) for name, part in found.items()}
    lists = {name: part for name, part in found.items() if isinstance(part, list)}
    named = len(lists) == len(found) and any(is_header(name, mapped) for name in lists)
    if not named:
        rows = {name: part for name, part in lists.items() if part and all(isinstance(row, dict) for row in part)}
        chosen = rows if len(rows) == 1 else lists
        if len(chosen) == 1:
            return next(iter(chosen.values()))
        if rows or not lists:
            raise CalibrationError(
                f"{path}: expected a list of objects, an object of columns, or an object with one list of rows, got "
                f"an object with the keys {shown(found)}; save the rows alone"
            )
    lengths = {len(part) for part in lists.values()}
    if len(lengths) != 1 or len(lists) < len(found):
        raise CalibrationError(f"{path}: expected columns of one length, got others in {shown(found)}")
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise CalibrationError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _parsed(text: str, where: str, hint: str = "") -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # JSON itself would keep the last
            check_unique([name for name, _ in pairs], where)
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"{where}: not valid JSON ({error}){hint}") from None


def _txt(path: Path, text: str, mapped: Collection[str]) -> Records:
    items = [
        ({"prompt": line.removesuffix("\n")}, f"{path}, line {number}")
        for number, line in enumerate(io.StringIO(text, newline=None), start=1)
        if line.strip()
    ]
    return Records(str(path), items, ["prompt"], lines=True)


def _parquet(path: Path) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise CalibrationError(
            f"{path}: reading a .parquet file needs pyarrow; pip install 'fastprune[data]'"
        ) from error
    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:  # what is inside a file is an OSError to Arrow
        raise CalibrationError(
            f"{path}: expected a parquet file, got one that cannot be read ({type(error).__name__})"
        ) from None
    check_unique(table.column_names, str(path))
    items = ((record, f"{path}, row {number}") for number, record in enumerate(table.to_pylist()))
    return Records(str(path), items, table.column_names)


def _folder(path: Path, mapped: Collection[str]) -> Records:
    """One file of prompts for each category, as HEx-PHI has them; the category is the name of the file.

    Files of anything but prompts are refused, so that no folder of several sets is taken for one.
    """
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if _suffix(file) in (*_READERS, ".parquet")]
    kinds = {_suffix(file) for file in files}
    if len(kinds) != 1 or not kinds <= {".txt", ".csv"}:
        raise NotFoundError(
            f"{path}: expected a file of rows, or a folder of .txt or of .csv files with one prompt a line, found a "
            f"folder with files of the types {sorted(kinds) or 'none'}; name one file"
        )
    items: list[Record] = []
    columns: list[Any] = []
    for file in files:
        part = read_file(file, mapped)
        if len(part.columns) != 1 or (columns and part.columns != columns):
            raise CalibrationError(
                f"{file}: expected one prompt a line, as in every file of a folder, got the columns "
                f"{shown(part.columns)}; name one file"
            )
        columns = list(part.columns)
        category = file.name.removesuffix(".gz")[: -len(_suffix(file))]
        items += [({**record, "category": category}, where) for record, where in part.items]
    return Records(str(path), items, [*columns, "category"], lines=columns == ["prompt"], files=len(files))


_READERS: Mapping[str, Callable[[Path, str, Collection[str]], Records]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".txt": _txt,
}
