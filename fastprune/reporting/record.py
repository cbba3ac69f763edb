"""The record of a run: its schema, its checks, and its file.

Every section is optional, so that a single evaluation has a record too. Keys that are not listed here are kept.

In: a dict (or the path of a ``record.json``). Out: a plain JSON value with ``None`` for everything that is missing or
not finite.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprune.errors import ArtifactError, NotFoundError
from fastprune.files import replacing

if TYPE_CHECKING:
    from typing_extensions import TypeIs

SCHEMA = 1
RATES = ("harm", "utility", "neighbour", "recognition", "refusal")
ROLES = ("method", "control", "other")  # of a mask, by its own metadata
Check = Callable[[Any, str], None]


def validate(record: Mapping[str, Any]) -> None:
    """Check a record against the schema.

    Args:
        record: The dict of a run. Sections may be missing; measured numbers may be ``None`` or NaN.

    Raises:
        ArtifactError: A value does not fit the schema; the message names the key, e.g.
            ``record["results"][3]["harm"]``, what was expected and the value.
    """
    if not isinstance(record, Mapping):
        _refuse("record", "a dict", record)
    schema = record.get("schema", SCHEMA)
    if isinstance(schema, bool) or schema != SCHEMA:
        _refuse(
            'record["schema"]',
            f"{SCHEMA} (the version that this fastprune reads; `fastprune eval` or `fastprune demo` make another)",
            schema,
        )
    for key in ("title", "created"):
        _optional(record.get(key), f'record["{key}"]', _text)
    for key in ("environment", "model", "settings", "timings"):
        _optional(record.get(key), f'record["{key}"]', _mapping)
    for key in ("parameters", "eligible"):
        _optional((record.get("model") or {}).get(key), f'record["model"]["{key}"]', _count)
    _optional((record.get("model") or {}).get("patched"), 'record["model"]["patched"]', _patched)
    for key, value in (record.get("timings") or {}).items():
        _optional(value, f'record["timings"]["{key}"]', _number)
    for section, (required, optional) in _ROWS.items():
        _rows(record.get(section), f'record["{section}"]', required, optional)
    for index, note in enumerate(_optional(record.get("notes"), 'record["notes"]', _list) or ()):
        _text(note, f'record["notes"][{index}]')
    _optional(record.get("heatmap"), 'record["heatmap"]', _heatmap)
    _optional(record.get("transfer"), 'record["transfer"]', _transfer)


def load_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check a ``record.json``.

    Args:
        path: The file, or the folder that holds a ``record.json``.

    Returns:
        The record, with ``None`` where the file says NaN or Infinity.

    Raises:
        NotFoundError: There is no such file.
        ArtifactError: The file is not JSON (truncated, of another kind) or not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "record.json"
    if not path.is_file():
        raise NotFoundError(f"expected a record.json or a folder that holds one, got {str(path)!r}", argument="path")
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:  # covers JSONDecodeError and UnicodeDecodeError
        raise ArtifactError(f"{path}: not a complete JSON file ({error})") from error
    try:
        return checked(record)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def checked(record: Mapping[str, Any]) -> dict[str, Any]:
    """Validate a record and return a deep copy of it that is plain JSON (numpy numbers, paths and NaN replaced)."""
    validate(record)
    return {"schema": SCHEMA, **_plain(record, "record")}


def dump(record: Mapping[str, Any]) -> str:
    """The text of ``record.json``: strict JSON (no NaN), readable, ending in a newline."""
    return json.dumps(record, indent=1, allow_nan=False) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that readers see either the old content or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def missing(value: object) -> TypeIs[None]:  # so that checkers know a value that is not missing is not None
    """True for ``None`` and for numbers that are not finite."""
    return value is None or (isinstance(value, Real) and not math.isfinite(value))


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return None if missing(value) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                _refuse(where, "keys that are strings", key)
        return {key: _plain(item, f'{where}["{key}"]') for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    _refuse(where, "a JSON value", value)
    return None


def _refuse(where: str, expected: str, got: object) -> None:
    value = repr(got)
    raise ArtifactError(f"{where}: expected {expected}, got {value if len(value) <= 80 else value[:77] + '...'}")


def _optional(value: Any, where: str, check: Check) -> Any:
    if value is not None:
        check(value, where)
    return value


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        _refuse(where, "a string", value)


def _name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        _refuse(where, "a name (a string that is not empty)", value)


def _mapping(value: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        _refuse(where, "a dict", value)


def _list(value: Any, where: str) -> None:
    if not isinstance(value, (list, tuple)):
        _refuse(where, "a list", value)


def _flag(value: Any, where: str) -> None:
    if not isinstance(value, bool):
        _refuse(where, "true or false", value)


def _number(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(where, "a number", value)


def _count(value: Any, where: str) -> None:
    if not missing(value) and (isinstance(value, bool) or not isinstance(value, Integral) or value < 0):
        _refuse(where, "a whole number >= 0", value)


def _rate(value: Any, where: str) -> None:
    # the range catches percentages given as fractions
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not (math.isnan(value) or 0 <= value <= 1):
        _refuse(where, "a fraction from 0 to 1, or null", value)


def _share(value: Any, where: str) -> None:
    _rate(value, where)
    if missing(value):
        _refuse(where, "a fraction from 0 to 1", value)


def _rows(value: Any, where: str, required: Mapping[str, Check], optional: Mapping[str, Check]) -> None:
    for index, row in enumerate(_optional(value, where, _list) or ()):
        here = f"{where}[{index}]"
        _mapping(row, here)
        for key, check in required.items():
            if key not in row:
                _refuse(here, f"the key {key!r}", sorted(map(str, row)))
            check(row[key], f'{here}["{key}"]')
        for key, check in optional.items():
            _optional(row.get(key), f'{here}["{key}"]', check)


def _matrix(value: Any, where: str, n_rows: int, n_columns: int, check: Check) -> None:
    _list(value, where)
    if len(value) != n_rows:
        _refuse(where, f"{n_rows} rows", f"{len(value)} rows")
    for index, row in enumerate(value):
        _list(row, f"{where}[{index}]")
        if len(row) != n_columns:
            _refuse(f"{where}[{index}]", f"{n_columns} numbers", f"{len(row)} numbers")
        for column, item in enumerate(row):
            _optional(item, f"{where}[{index}][{column}]", check)


def _needs(value: Any, where: str, keys: Sequence[str]) -> None:
    _mapping(value, where)
    for key in keys:
        if value.get(key) is None:
            _refuse(where, f"the key {key!r}", sorted(map(str, value)))


def _heatmap(value: Any, where: str) -> None:
    _needs(value, where, ("layers", "matrices", "counts"))
    layers, matrices = value["layers"], value["matrices"]
    _list(layers, f'{where}["layers"]')
    _list(matrices, f'{where}["matrices"]')
    for index, layer in enumerate(layers):
        if isinstance(layer, bool) or not isinstance(layer, Integral):
            _refuse(f'{where}["layers"][{index}]', "the number of a layer", layer)
    for index, name in enumerate(matrices):
        _name(name, f'{where}["matrices"][{index}]')
    _optional(value.get("model"), f'{where}["model"]', _name)
    for key in ("counts", "sizes"):
        if value.get(key) is not None:
            _matrix(value[key], f'{where}["{key}"]', len(layers), len(matrices), _count)


def _transfer(value: Any, where: str) -> None:
    _needs(value, where, ("categories", "harm"))
    _list(value["categories"], f'{where}["categories"]')
    n = len(value["categories"])
    for index, name in enumerate(value["categories"]):
        _name(name, f'{where}["categories"][{index}]')
    for key in ("harm", "overlap"):
        if value.get(key) is not None:
            _matrix(value[key], f'{where}["{key}"]', n, n, _rate)
    if value.get("n") is not None:
        _matrix([value["n"]], f'{where}["n"]', 1, n, _count)
    if value.get("unpruned") is not None:
        _matrix([value["unpruned"]], f'{where}["unpruned"]', 1, n, _rate)


def _role(value: Any, where: str) -> None:
    if value not in ROLES:
        _refuse(where, f"one of {', '.join(ROLES)}", value)


def _patched(value: Any, where: str) -> None:
    """A patch that was in the weights before the evaluation."""
    _needs(value, where, ("weights",))
    _count(value["weights"], f'{where}["weights"]')


def _interval(value: Any, where: str) -> None:
    _matrix([value], where, 1, 2, _rate)


def _measured(value: Any, where: str) -> None:
    """A rate with its sample size and interval, and the same for each category."""
    _mapping(value, where)
    _optional(value.get("rate"), f'{where}["rate"]', _rate)
    _optional(value.get("n"), f'{where}["n"]', _count)
    _optional(value.get("interval"), f'{where}["interval"]', _interval)
    for key in ("cut", "unanswered"):
        _optional(value.get(key), f'{where}["{key}"]', _count)
    _each_measured(value.get("by_category"), f'{where}["by_category"]')


def _each_measured(value: Any, where: str) -> None:
    for name, part in (_optional(value, where, _mapping) or {}).items():
        _measured(part, f'{where}["{name}"]')


def _recognised(value: Any, where: str) -> None:
    _mapping(value, where)
    for key in ("accuracy", "pairs"):
        _optional(value.get(key), f'{where}["{key}"]', _measured)
    _optional(value.get("yes_rate"), f'{where}["yes_rate"]', _rate)


_RATE_CHECKS: dict[str, Check] = {name: _rate for name in RATES}
_ROWS: dict[str, tuple[dict[str, Check], dict[str, Check]]] = {
    "results": ({"model": _name, "mask": _name}, {"pruned": _count, **_RATE_CHECKS}),
    "dissociation": ({"model": _name, "mask": _name}, {"pruned": _count, **_RATE_CHECKS}),
    "skills": ({"model": _name, "mask": _name, "skill": _name}, {"score": _rate}),
    "masks": (
        {"mask": _name, "role": _role},
        {"kind": _text, "pruned": _count, "nominal": _count, "digest": _text, "standard": _flag},
    ),
    "measurements": (
        {"model": _name, "mask": _name},
        {"harm": _measured, "refusal": _measured, "recognition": _recognised, "skills": _each_measured},
    ),
    "attacks": (
        {"model": _name, "mask": _name, "attack": _name},
        {"harm": _rate, "n": _count, "interval": _interval, "cut": _count, "unanswered": _count},
    ),
    "sweep": ({"model": _name, "q": _share}, {"p": _share, "pruned": _count, **_RATE_CHECKS}),
    "checks": ({"claim": _name, "holds": _flag}, {"value": _number, "bound": _text}),
}
