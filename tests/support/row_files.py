"""Rows written as people have them: every layout, in every type of file that can hold it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from fastprune.calibration import Row

Record = dict[str, Any]


def turns(row: Row, role: str, content: str, names: dict[str, str]) -> list[Record]:
    spoken = [*row.history, ("user", row.prompt), *([("assistant", row.response)] if row.response else [])]
    return [{role: names.get(who, who), content: text} for who, text in spoken]


def plain(row: Row, **columns: str) -> Record:
    """Fields of a row under other names."""
    return {column: getattr(row, name) for name, column in columns.items()}


def conversation(row: Row) -> Record:
    return {"messages": turns(row, "role", "content", {}), "id": row.id}


def share_gpt(row: Row) -> Record:
    return {"id": row.id, "conversations": turns(row, "from", "value", {"user": "human", "assistant": "gpt"})}


def trl(row: Row) -> Record:
    *asked, reply = turns(row, "role", "content", {})
    return {"prompt": asked, "completion": [reply], "id": row.id}


LAYOUTS: dict[str, Callable[[Row], Record]] = {
    "own": lambda row: plain(row, prompt="prompt", response="response", category="category", id="id"),
    "own, capital": lambda row: plain(row, prompt="Prompt", response="Response", category="Category", id="ID"),
    "completion": lambda row: plain(row, prompt="prompt", response="completion", category="category", id="id"),
    "advbench": lambda row: plain(row, prompt="goal", response="target", category="category", id="id"),
    "jailbreakbench": lambda row: {
        **plain(row, id="Index", prompt="Goal", response="Target"),
        **{"Behavior": "short", "Category": row.category},
    },
    "alpaca": lambda row: (
        plain(row, prompt="instruction", response="output", category="category", id="id") | {"input": ""}
    ),
    "dolly": lambda row: plain(row, prompt="instruction", response="response", category="category", id="id"),
    "questions": lambda row: plain(row, prompt="question", response="answer", category="category", id="id"),
    "queries": lambda row: plain(row, prompt="query", response="response", category="category", id="id"),
    "messages": lambda row: conversation(row) | {"category": row.category},
    "conversations": lambda row: share_gpt(row) | {"category": row.category},
}
PROMPTS: dict[str, Callable[[Row], Record]] = {
    "prompt": lambda row: plain(row, prompt="prompt", category="category", id="id"),
    "goal": lambda row: plain(row, prompt="goal", category="category", id="id"),
    "harmbench": lambda row: {
        **plain(row, prompt="Behavior", id="BehaviorID", category="SemanticCategory"),
        **{"FunctionalCategory": "standard", "ContextString": "", "Tags": ""},
    },
    "strongreject": lambda row: plain(row, category="category", prompt="forbidden_prompt", id="id"),
    "text": lambda row: plain(row, prompt="text", category="category", id="id"),
    "messages": lambda row: conversation(row) | {"category": row.category},
}


def cell(value: Any) -> Any:
    """A value as a file without nested ones has it."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def separated(records: Sequence[Record], delimiter: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerow(records[0])
    writer.writerows([cell(value) for value in record.values()] for record in records)
    return out.getvalue()


def lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def by_column(records: Sequence[Record]) -> Record:
    return {name: [record[name] for record in records] for name in records[0]}


TEXTS: dict[str, Callable[[Sequence[Record]], str]] = {
    "a.csv": separated,
    "dos.csv": lambda records: "\ufeff" + separated(records, end="\r\n"),
    "semicolon.csv": lambda records: separated(records, ";"),
    "a.tsv": lambda records: separated(records, "\t"),
    "a.jsonl": lines,
    "bom.ndjson": lambda records: "\ufeff" + lines(records).replace("\n", "\r\n\r\n"),
    "a.json": json.dumps,
    "data.json": lambda records: json.dumps({"version": 1, "data": records}, indent=1),
    "columns.json": lambda records: json.dumps(by_column(records)),
    "pandas.json": lambda records: json.dumps(
        {name: {str(n): value for n, value in enumerate(values)} for name, values in by_column(records).items()}
    ),
}
TYPES = [*TEXTS, "a.csv.gz", "a.jsonl.gz", "a.json.gz", "A.TSV.GZ", "a.parquet"]


def write(folder: Path, name: str, records: Sequence[Record]) -> Path:
    """A file of the records, of the type that its name says."""
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix.lower() == ".gz":
        path.write_bytes(gzip.compress(TEXTS[name.lower().removesuffix(".gz")](records).encode()))
    else:
        path.write_bytes(TEXTS[name](records).encode())
    return path
