"""Rows that a command measures with, and are among the rows by which a mask was chosen: the option, and the check.

Scores and masks keep hashes of their calibration prompts, so that no further file is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastprune.cli.frame import Run
from fastprune.cli.processes import note
from fastprune.errors import ArgumentError, CalibrationError, setting

if TYPE_CHECKING:
    from fastprune.calibration import Table
    from fastprune.masking import PruneMask

# Which calibration rows each set is compared with: never harmful rows with benign ones. Recognition asks about requests
# in a frame of its own.
_AGAINST = {
    "harm": "harm",
    "refusal": "harm",
    "explanation": "harm",
    "skill": "benign",
    "skills": "benign",
    "over_refusal": "benign",
}

AllowOverlapOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure with a set (harm, refusal, skills …) although rows of it are among those by which a mask was "
        "chosen; repeatable."
    ),
]


def check_overlaps(
    run: Run, masks: Mapping[str, PruneMask], tables: Mapping[str, Table], allow: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Refuse rows that are among the calibration rows of a mask, exactly or nearly.

    Args:
        run: The run of the command.
        masks: The masks by name.
        tables: The rows by set; a name may go on behind a space.
        allow: Sets of which that is known and wanted.

    Returns:
        What overlaps, as JSON data: mask, set, numbers of rows.

    Raises:
        CalibrationError: Rows overlap; says how many and which, by number and id.
        ArgumentError: ``allow`` names no set of this run.
    """
    from fastprune.calibration.leakage import UNKNOWN, compared, in_words, prompts_of

    kinds = {name: name.partition(" ")[0] for name in tables}
    unknown = sorted(set(allow or ()) - set(kinds.values()))
    if unknown:
        raise ArgumentError(
            f"expected one of {', '.join(dict.fromkeys(kinds.values()))}, got {unknown[0]!r}", argument="allow_overlap"
        )
    overlapping = []
    for name, table in tables.items():
        role = _AGAINST.get(kinds[name])
        rows = prompts_of(table)
        clean = []
        for mask, chosen in masks.items():
            calibration = chosen.metadata.get("calibration") or {}
            if role is None or (calibration and role not in calibration):
                continue  # it was chosen without rows of this behavior; of a mask without facts that is not known
            prompts = prompts_of(chosen, role)
            if prompts is None or rows is None:
                run.talk(f"{name}: not compared with the {role} calibration rows of {mask}, {UNKNOWN}")
                continue
            found = compared(prompts, rows)
            if not found:
                clean.append(mask)
                continue
            text = in_words(name, found, f"{role} calibration rows of {mask}")
            if kinds[name] not in (allow or ()):
                raise CalibrationError(
                    f"{text}; take them out, or measure all the same with {setting('allow_overlap', kinds[name])}"
                )
            note(f"{text}, which --allow-overlap allows")
            overlapping.append({"set": name, "mask": mask, **found.facts()})
        if clean:
            run.talk(f"{name}: no row is among the {role} calibration rows of {', '.join(clean)}")
    return overlapping
