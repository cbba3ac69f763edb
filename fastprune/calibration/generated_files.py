"""Files of rows whose replies a model has written: for their owner alone, with what they are of in a file beside.

``rows.jsonl`` has the rows, and ``rows.provenance.json`` numbers, settings and hashes, no text. While they are made,
``.rows.jsonl.partial`` holds the replies so far.

In: rows and facts. Out: the two files, whole or not at all. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastprune.calibration.rows import Row
from fastprune.errors import ArgumentError, ArtifactError
from fastprune.files import JsonLines, private_replacing, sha256

VERSION = 1
# Columns that say something about a row without being its text.
_NUMBERS = ("id", "category", "finish", "new_tokens", "sample", "skill")


def provenance_path(path: Path) -> Path:
    """Where the provenance of a file of rows stands."""
    return path.with_name(f"{path.stem}.provenance.json")


def partial_path(path: Path) -> Path:
    """Where the replies stand while a file of rows is made."""
    return path.with_name(f".{path.name}.partial")


def is_generated(path: Path) -> bool:
    """Whether a file is as this package has written it."""
    return path.is_file() and _provenance(path).get("sha256") == sha256(path)


def write_generated(path: Path, rows: Iterable[Row], facts: Mapping[str, Any]) -> None:
    """Write rows, and first their provenance: rows are never there without it.

    Raises:
        DiskError: The disk is full.
    """
    _write(path, [row.to_record() for row in rows], facts)


@contextmanager
def partial_replies(path: Path, key: Mapping[str, Any], *, restart: bool = False) -> Iterator[JsonLines]:
    """The replies so far, for as long as a file of rows is made; gone when the block is left without an error.

    Args:
        path: The file of rows.
        key: Everything that the replies depend on, as JSON data.
        restart: Begin anew where there are replies of another key.

    Yields:
        The file; its ``records`` begin with the key.

    Raises:
        ArgumentError: The replies there are of another key, or another process is at it.
    """
    place = partial_path(path)
    given = json.loads(json.dumps(key))
    with JsonLines(place, "out") as lines:
        if lines.records and (other := lines.records[0].get("key")) != given:
            if not restart:
                known = other if isinstance(other, dict) else {}
                different = next((name for name, value in given.items() if known.get(name) != value), "key")
                raise ArgumentError(
                    f"expected a name without unfinished replies, got {path}, of which a run with another "
                    f"{different.replace('_', ' ')} has left {len(lines.records) - 1} in {place}; run that command "
                    "again to finish them, remove the file, or name another",
                    argument="out",
                )
            lines.clear()
        if not lines.records:
            lines.append({"key": given})
        yield lines
        place.unlink()


def forget_texts(path: Path) -> int:
    """Drop the texts of a file of rows, and keep ids, numbers and hashes.

    Only of a file that this package has written, as it has written it: the user's own files stay as they are.

    Args:
        path: The file.

    Returns:
        Number of its rows.

    Raises:
        ArtifactError: It is no such file, or was changed since.
    """
    if not is_generated(path):
        raise ArtifactError(
            f"{path}: expected rows as `fastprune generate` wrote them, got a file without their provenance, or one "
            "that was changed since; remove it yourself"
        )
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts = {name: record[name] for name in sorted(record) if name not in _NUMBERS}
        digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
        records.append({name: record[name] for name in _NUMBERS if name in record} | {"texts_dropped": digest})
    _write(path, records, {**_provenance(path), "texts": "dropped"})
    return len(records)


def _write(path: Path, records: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    known = {**facts, "version": VERSION, "kind": "rows", "sha256": hashlib.sha256(content).hexdigest()}
    with private_replacing(path) as temporary:
        temporary.write_bytes(content)
        # Before the rows have their name, and after they are whole.
        with private_replacing(provenance_path(path)) as beside:
            beside.write_text(json.dumps(known, indent=1))


def _provenance(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(provenance_path(path).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and facts.get("kind") == "rows" else {}
