"""Leakage between sets: rows of one behavior that stand in two sets that should have none in common.

A model that is measured on the rows by which its weights were chosen looks better than it is. So the rows of
calibration, of the choice of p and q, and of the report are compared, set by set of one behavior; harmful rows are
never compared with benign ones.

Two prompts are *exact* copies if they are equal, and *near* ones if they are equal once case, punctuation and white
space are dropped, or if both have 8 words or more and .9 of the distinct word 5-grams of the shorter one stand in the
longer one. Counted of the shorter one, a prompt is found inside a longer one, such as the template of a jailbreak.

In: rows, files, or the hashes that scores and masks keep. Out: :class:`Overlap`, numbers and ids without a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprune.calibration.prompts import GRAM, LEAST_WORDS, PromptHashes, PromptIndex
from fastprune.calibration.rows import describe, read_table
from fastprune.errors import CalibrationError

_LEAST_KNOWN = LEAST_WORDS - GRAM + 1  # 5-grams of the shorter prompt that a verdict needs: those of 8 words
_SHOWN = 5  # rows that a message names


@dataclass(frozen=True)
class Pair:
    """A row of the second set and the first row of the first set that it copies.

    Attributes:
        row: Its number in the second set, from 0.
        name: Its id.
        other: Number of the row in the first set; ``None`` if that set is hashes in a file.
        other_name: Id of that row.
        exact: Whether the prompts are equal; otherwise they are nearly so.
    """

    row: int
    name: str | None
    other: int | None
    other_name: str | None
    exact: bool


@dataclass(frozen=True)
class Overlap:
    """What two sets have in common.

    Attributes:
        pairs: One for each row of the second set that is in the first, exact ones before near ones.
        rows: Number of rows of the second set.
        prompts: Number of distinct prompts of the first set.
    """

    pairs: tuple[Pair, ...]
    rows: int
    prompts: int

    @property
    def exact(self) -> int:
        """Rows of the second set whose prompt is in the first."""
        return sum(pair.exact for pair in self.pairs)

    @property
    def near(self) -> int:
        """Further rows of the second set, whose prompt is nearly in the first."""
        return len(self.pairs) - self.exact

    def facts(self) -> dict[str, int]:
        """The numbers, as JSON data."""
        return {"rows": self.rows, "prompts": self.prompts, "exact": self.exact, "near": self.near}

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __str__(self) -> str:
        named = [f"{pair.row}" + (f" (id {pair.name!r})" if pair.name is not None else "") for pair in self.pairs]
        more = len(named) - _SHOWN
        rows = ", ".join(named[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{self.exact} exact, {self.near} near; row{'s' if len(named) > 1 else ''} {rows}"


def overlap(first: Any, second: Any, *, role: str | None = None) -> Overlap:
    """Rows of the second set that are in the first, exactly or nearly.

    Args:
        first: A path, rows, a calibration set, or scores or a mask, of which the calibration rows are taken.
        second: The same.
        role: ``"harm"`` or ``"benign"``: which rows of scores or of a mask.

    Returns:
        The rows, numbered from 0. Between rows it is exact. The file of scores or of a mask keeps the 5-grams of long
        prompts in part where most of its prompts are long: a verbatim copy is then still found, a share near .9 is an
        estimate, and a prompt many times shorter than the one that contains it may be missed.

    Raises:
        NotFoundError, ArgumentError, CalibrationError: As :func:`fastprune.calibration.read_rows`; or the prompts of
            one of them are not known: it was scored from loaders of your own, or by an earlier fastprune.
    """
    indices = []
    for argument, source in (("first", first), ("second", second)):
        index = prompts_of(source, role)
        if index is None:
            raise CalibrationError(f"expected rows whose prompts are known, got {UNKNOWN}", argument=argument)
        indices.append(index)
    return compared(*indices)


def check_overlap(rows: Any, against: Any, *, role: str | None = None, name: str | None = None) -> Overlap:
    """Refuse rows to be reported that are among the calibration rows.

    Args:
        rows: A path or rows.
        against: A path, rows, a calibration set, or the scores or the mask that are measured.
        role: ``"harm"`` or ``"benign"``: which calibration rows of scores or of a mask.
        name: Of the rows, in messages.

    Returns:
        The overlap, which is empty.

    Raises:
        CalibrationError: There is one; the message has numbers and ids of rows. Or as :func:`overlap`.
    """
    found = overlap(against, rows, role=role)
    if found:
        what = f"{role} calibration rows" if role else "calibration rows"
        name = describe(rows) if name is None else name
        raise CalibrationError(f"{in_words(name, found, what)}; take them out")
    return found


def in_words(name: str, found: Overlap, among: str) -> str:
    """An overlap as a clause: numbers and ids, no text."""
    verb = "is" if len(found.pairs) == 1 else "are"
    return f"{name}: {len(found.pairs)} of {found.rows} rows {verb} among the {among} ({found})"


UNKNOWN = "scores or a mask that do not know them (scored from loaders of your own, or by an earlier fastprune)"


def prompts_of(source: Any, role: str | None = None) -> PromptIndex | None:
    """The prompts of anything that :func:`overlap` takes; ``None`` if they are not known.

    Raises:
        CalibrationError: ``source`` is scores or a mask, and ``role`` is none of its sets; or as :func:`overlap`.
    """
    if isinstance(source, PromptIndex):
        return source
    if hasattr(source, "examples") and hasattr(source, "prompts"):  # a calibration set
        return source.prompts
    for facts in (getattr(source, "metadata", None), getattr(source, "provenance", None)):
        if isinstance(facts, Mapping):
            return _calibration_prompts(facts, role)
    table = read_table(source)
    return PromptIndex.of(map(PromptHashes.of, table), [row.id for row in table])


def merged_calibration(sides: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    """What is known of the calibration rows behind a mask that is made from masks with these metadata.

    Returns:
        By role, ``{"prompts": …}`` with the prompts of all sides; ``None`` if those of one side are not known.
    """
    merged: dict[str, Any] = {}
    calibrations = [facts.get("calibration") or {} for facts in sides]
    for role in dict.fromkeys(role for calibration in calibrations for role in calibration):
        # a side without this role did not use such rows, unless nothing is known of it at all
        sides_with = [calibration for calibration in calibrations if role in calibration or not calibration]
        used = [(calibration.get(role) or {}).get("prompts") for calibration in sides_with]
        if all(each == used[0] for each in used):
            merged[role] = {"prompts": used[0]}
            continue
        indices = [None if each is None else PromptIndex.from_facts(each) for each in used]
        every = [index for index in indices if index is not None]
        merged[role] = {"prompts": PromptIndex.merged(every).facts() if len(every) == len(indices) else None}
    return merged


def compared(first: PromptIndex, second: PromptIndex) -> Overlap:
    """As :func:`overlap`, of prompts that are hashed already.

    The time is that of counting, for each prompt of the second, the 5-grams it shares with those of the first.
    """
    found = np.full(len(second), -1)
    exact = _look_up(first.exact, second.exact)
    folded = _look_up(first.folded, second.folded)
    found[folded >= 0] = folded[folded >= 0]
    found[exact >= 0] = exact[exact >= 0]
    for row, other in _sharing(first, second, np.flatnonzero(found < 0)):
        found[row] = other
    rows = [*np.flatnonzero(exact >= 0), *np.flatnonzero((exact < 0) & (found >= 0))]
    pairs = tuple(
        Pair(
            int(row),
            None if second.names is None else second.names[row],
            None if first.names is None else int(found[row]),
            None if first.names is None else first.names[found[row]],
            bool(exact[row] >= 0),
        )
        for row in rows
    )
    return Overlap(pairs, len(second), len(np.unique(first.exact)))


def _look_up(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the first equal value for each that is wanted, or -1."""
    if not len(values):
        return np.full(len(wanted), -1)
    order = np.argsort(values, kind="stable")
    places = np.searchsorted(values, wanted, sorter=order)
    candidates = order[np.minimum(places, len(values) - 1)]
    return np.where(values[candidates] == wanted, candidates, -1)


def _sharing(first: PromptIndex, second: PromptIndex, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Rows of the second that share enough 5-grams with one of the first, and the first of these."""
    owners = np.repeat(np.arange(len(first)), first.kept)
    by_row = (owners << 32) | first.grams.astype(np.int64)  # ascending
    order = np.argsort(first.grams, kind="stable")
    grams, owners = first.grams[order], owners[order]
    begins = np.searchsorted(grams, second.grams, "left")
    ends = np.searchsorted(grams, second.grams, "right")
    for row in rows:
        span = slice(second.starts[row], second.starts[row + 1])
        hit = np.flatnonzero(ends[span] > begins[span])
        if not len(hit):
            continue
        sharing = np.concatenate([owners[b:e] for b, e in zip(begins[span][hit], ends[span][hit], strict=True)])
        if 8 * len(sharing) < len(first):
            others, shared = np.unique(sharing, return_counts=True)
        else:
            counts = np.bincount(sharing, minlength=len(first))
            others = np.flatnonzero(counts)
            shared = counts[others]
        # Where only the lowest hashes of a prompt are known, both are compared up to the highest that both know.
        known_to = np.minimum(first.known_to[others], second.known_to[row])
        ours = np.searchsorted(by_row, (others << 32) | known_to, "right") - first.starts[others]
        theirs = np.searchsorted(second.grams[span], known_to, "right")
        sizes = first.sizes[others]
        of_shorter = np.where(sizes <= second.sizes[row], ours, theirs)
        # short prompts with a repeated word have fewer
        needed = np.minimum(_LEAST_KNOWN, np.minimum(sizes, second.sizes[row]))
        near = others[(10 * shared >= 9 * of_shorter) & (of_shorter >= needed)]
        if len(near):
            yield row, near[0]


def _calibration_prompts(facts: Mapping[str, Any], role: str | None) -> PromptIndex | None:
    calibration = facts.get("calibration") or {}
    if role is None or (calibration and role not in calibration):
        roles = " or ".join(repr(name) for name in calibration) or "'harm' or 'benign'"
        raise CalibrationError(f"expected {roles} for the rows of scores or a mask, got {role!r}", argument="role")
    prompts = (calibration.get(role) or {}).get("prompts")
    return None if prompts is None else PromptIndex.from_facts(prompts)
