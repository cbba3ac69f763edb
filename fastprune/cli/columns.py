"""The rows of a command: the option that names their columns, and what is said about what was recognized."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprune.cli.frame import Run
from fastprune.errors import ArgumentError

if TYPE_CHECKING:
    from fastprune.calibration import Table

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Columns by field where they are not to be recognized, e.g. prompt=goal,response=target (or "
        "messages=COLUMN; NAME= leaves a field out), or a JSON object. For one set: harm:prompt=goal; repeatable."
    ),
]


def read_tables(
    run: Run, sets: Mapping[str, Path | None], columns: Sequence[str] | None, *, references: bool = False
) -> dict[str, Table]:
    """Read the sets that were given, and say what was recognized in each.

    Args:
        run: The run of the command.
        sets: Paths by the name of their option.
        columns: As given.
        references: Whether every row has to have a response.

    Raises:
        ArgumentError: The option cannot be read, or names a column that there is not.
        CalibrationError, NotFoundError: As :func:`fastprune.calibration.read_rows`.
    """
    from fastprune.calibration import read_table

    mappings = columns_of(columns, list(sets))
    tables = {}
    for role, path in sets.items():
        if path is not None:
            tables[role] = read_table(path, columns=mappings[role], references=references)
            run.talk(f"{role}: {tables[role].layout}")
    return tables


def columns_of(given: Sequence[str] | None, roles: Sequence[str]) -> dict[str, dict[str, str | None]]:
    """``["prompt=goal,prefill=target"]`` or ``["harm:prompt=goal"]`` as a mapping for each set.

    What is said of one set wins over what is said of all.

    Raises:
        ArgumentError: A set is unknown, or the text is no such list; names are checked where they are used.
    """
    every: dict[str, Any] = {}
    chosen: dict[str, dict[str, Any]] = {role: {} for role in roles}
    for text in given or ():
        role, colon, rest = text.partition(":")
        if not colon or "=" in role or "{" in role:
            every |= _mapping(text)
        elif role in chosen:
            chosen[role] |= _mapping(rest)
        else:
            raise ArgumentError(
                f"expected columns of {' or '.join(roles)}, such as {roles[0]}:prompt=goal, got {text!r}",
                argument="columns",
            )
    return {role: every | own for role, own in chosen.items()}


def _mapping(text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ArgumentError(f"expected a JSON object, got {text!r} ({error})", argument="columns") from error
    mapping: dict[str, str | None] = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(f"expected FIELD=COLUMN[,FIELD=COLUMN …], got {text!r}", argument="columns")
        mapping[name.strip()] = column.strip() or None
    return mapping
