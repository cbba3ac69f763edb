"""Set difference: the weights that harm needs most, without those that benign behavior needs most.

In: lists of top scores, fractions, and what is spared. Out: indices, with a report of the counts. The weights of all
matrices have one numbering (offset of the matrix + flat index), so that a selection is a few sorted arrays for any
number of matrices: a point of a sweep over p and q costs milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from fastprune.errors import ArgumentError, SelectionError, setting, warn
from fastprune.scoring.top_scores import TopScores

SCOPES = ("matrix", "global")


@dataclass(frozen=True)
class Selection:
    """The outcome of a selection.

    Attributes:
        indices: Flat indices of the pruned weights by name of matrix, int64 ascending; every matrix is a key.
        asked: Weights that the harm fraction asked for, before anything was spared.
        report: Counts asked, selected and spared; see :func:`select`.
    """

    indices: dict[str, torch.Tensor]
    asked: int
    report: dict[str, Any]


def select(
    shapes: Mapping[str, tuple[int, ...]],
    harm: Mapping[str, TopScores],
    benign: Mapping[str, TopScores] | None,
    p: float | None,
    q: float,
    *,
    scope: str,
    only: set[str] | None = None,
    slice: int = 0,
    protect: Sequence[Mapping[str, torch.Tensor]] = (),
) -> Selection:
    """The weights among the top ``q`` by harm score and not among the top ``p`` by benign score.

    Args:
        shapes: Name of every matrix to its shape, in model order.
        harm: Name to the list of harm scores.
        benign: The same of benign scores; read only where ``p`` is given.
        p: Fraction of protected weights; ``None`` protects nothing.
        q: Fraction of weights asked of harm.
        scope: ``"matrix"`` or ``"global"``.
        only: Names of the matrices that take part; ``None``: all.
        slice: Take the harm ranks from ``slice * k`` to ``(slice + 1) * k``.
        protect: Indices by matrix, as a mask holds them, that are never pruned.

    Raises:
        SelectionError, ArgumentError: As :meth:`fastprune.scoring.scores.Scores.select`.

    Warns:
        FastpruneWarning: As :meth:`fastprune.scoring.scores.Scores.select`.
    """
    q, p = _check_fraction("q", q), None if p is None else _check_fraction("p", p)
    if scope not in SCOPES:
        raise ArgumentError(f"expected one of {', '.join(SCOPES)}, got {scope!r}", argument="scope")
    if isinstance(slice, bool) or not isinstance(slice, Integral) or slice < 0:
        raise ArgumentError(f"expected an integer of 0 or more, got {slice!r}", argument="slice")
    matrices = _Numbering(shapes, only)
    harmful = _Demand("q", q, int(slice), matrices)
    chosen = harmful.take(harm, scope)
    report: dict[str, Any] = {"harm": harmful.report(), "benign": None}
    pruned = np.sort(chosen)
    if p is not None:
        needed = _Demand("p", p, 0, matrices)
        pruned = _without(pruned, np.sort(needed.take(benign, scope)))
        report["benign"] = needed.report()
    report["spared_by_benign"] = len(chosen) - len(pruned)
    unprotected = pruned
    for indices in protect:
        unprotected = _without(unprotected, matrices.number(indices))
    report["spared_by_protect"] = len(pruned) - len(unprotected)
    _warn(report)
    return Selection(matrices.split(unprotected), harmful.asked, report)


class _Numbering:
    """One numbering of the weights of the selected matrices, in model order."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], only: set[str] | None) -> None:
        self._shapes = shapes
        self.names = [name for name in shapes if only is None or name in only]
        self.restricted = only is not None
        self.sizes = [math.prod(shapes[name]) for name in self.names]
        self.offsets = np.cumsum([0, *self.sizes], dtype=np.int64)
        self.numel = int(self.offsets[-1])

    def number(self, indices: Mapping[str, torch.Tensor]) -> np.ndarray:
        """Numbers of some weights, ascending; those of other matrices are left out."""
        return np.concatenate(
            [indices[name].numpy() + offset for name, offset in zip(self.names, self.offsets, strict=False)]
        )

    def split(self, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        """Ascending numbers to flat indices per matrix; matrices that are not selected get none."""
        edges = np.searchsorted(numbers, self.offsets)
        found = {
            name: torch.from_numpy(numbers[edges[i] : edges[i + 1]] - self.offsets[i])
            for i, name in enumerate(self.names)
        }
        return {name: found.get(name, torch.empty(0, dtype=torch.int64)) for name in self._shapes}


@dataclass
class _Demand:
    """The ranks that one side of the selection asks for, and the counts of what it got."""

    argument: str
    fraction: float
    slice: int
    matrices: _Numbering
    asked: int = 0
    selected: int = 0
    zero: list[str] = field(default_factory=list)
    short: dict[str, int] = field(default_factory=dict)

    def take(self, lists: Mapping[str, TopScores], scope: str) -> np.ndarray:
        """Numbers of the asked ranks with a score above 0, in no particular order."""
        numbers = self._take_by_matrix(lists) if scope == "matrix" else self._take_global(lists)
        self.selected = len(numbers)
        return numbers

    def _check_asked(self, where: str, numel: int) -> None:
        if self.asked == 0:
            raise SelectionError(
                f"{setting(self.argument, self.fraction)} rounds to 0 weights {where}; "
                f"expected {_least_fraction(numel)} or more"
            )

    def report(self) -> dict[str, Any]:
        """Counts asked and selected, matrices where the fraction rounds to 0, matrices with too few positive scores."""
        return {"asked": self.asked, "selected": self.selected, "zero": self.zero, "short": self.short}

    def _take_by_matrix(self, lists: Mapping[str, TopScores]) -> np.ndarray:
        parts = [np.empty(0, dtype=np.int64)]
        for name, numel, offset in zip(self.matrices.names, self.matrices.sizes, self.matrices.offsets, strict=False):
            k = int(self.fraction * numel)
            if k == 0:
                self.zero.append(name)
                continue
            kept, start, stop = lists[name], self.slice * k, (self.slice + 1) * k
            indices, values = kept.arrays
            if stop > len(indices) and kept.floor > 0:
                raise self._not_kept(name, stop, len(indices), (self.slice + 1) * self.fraction)
            end = min(stop, len(indices))
            if end and values[end - 1] <= 0:
                end = kept.above(0.0, equal=False)
            if end - start < k:
                self.short[name] = k - max(0, end - start)
            parts.append(indices[start:end] + offset)
            self.asked += k
        self._check_asked("in every matrix", max(self.matrices.sizes))
        return np.concatenate(parts)

    def _take_global(self, lists: Mapping[str, TopScores]) -> np.ndarray:
        self.asked = k = int(self.fraction * self.matrices.numel)
        self._check_asked("in all", self.matrices.numel)
        start, stop = self.slice * k, (self.slice + 1) * k
        kept = [lists[name] for name in self.matrices.names]
        threshold = _bound_below(kept, stop)
        lengths = [min(some.above(threshold, equal=True), some.above(0.0, equal=False)) for some in kept]
        values = np.concatenate([some.arrays[1][:n] for some, n in zip(kept, lengths, strict=True)])
        numbers = np.concatenate(
            [some.arrays[0][:n] + offset for some, n, offset in zip(kept, lengths, self.matrices.offsets, strict=False)]
        )
        chosen = _highest(values, stop)
        self._prove_exact(kept, values[chosen], numbers[chosen], stop)
        return numbers[chosen & ~_highest(values, start)]

    def _prove_exact(self, kept: list[TopScores], values: np.ndarray, numbers: np.ndarray, stop: int) -> None:
        """No weight that was not kept may come before the last one taken; the floors of the lists show that."""
        full = len(values) == stop
        last, owner = 0.0, 0
        if full:
            last = float(values.min())
            number = numbers[values == last][-1]
            owner = int(np.searchsorted(self.matrices.offsets, number, side="right")) - 1
        open_lists = [
            (name, some)
            for position, (name, some) in enumerate(zip(self.matrices.names, kept, strict=True))
            if some.floor > last or (full and some.floor == last and position < owner)
        ]
        if open_lists:
            name, some = min(open_lists, key=lambda item: item[1].numel)
            # The highest of all matrices are kept wherever they are; those of a few layers may not be.
            safe = stop / some.numel if self.matrices.restricted else (self.slice + 1) * self.fraction
            raise self._not_kept(name, stop, len(some), safe)

    def _not_kept(self, name: str, rank: int, kept: int, fraction: float) -> SelectionError:
        limit, times = f"{self.argument}_max", f" and {setting('slice', self.slice)}" if self.slice else ""
        return SelectionError(
            f"{setting(self.argument, self.fraction)}{times} needs the top {rank} scores; of {name} only {kept} were "
            "kept, "
            f"and others of its scores may be among them; score again with {setting(limit, min(1.0, fraction))} or more"
        )


def _least_fraction(numel: int) -> str:
    """The lowest fraction of three digits that, read as a float, selects one of ``numel`` weights."""
    context = Context(prec=3, rounding=ROUND_CEILING)
    fraction = context.divide(Decimal(1), Decimal(numel))
    if int(float(fraction) * numel) < 1:  # exact as a decimal, too low by the last bit as a float
        fraction = context.next_plus(fraction)
    return f"{float(fraction):.3g}"


def _bound_below(kept: list[TopScores], rank: int) -> float:
    """A score that at least ``rank`` kept scores reach, close below the ``rank``-th highest; -inf if fewer were kept.

    It is found among every ``stride``-th entry of each list. A sample stands for the ``stride`` entries up to it, the
    first of a list for itself only, so the highest ``len(kept) + rank / stride`` samples suffice.
    """
    stride = max(1, rank // 1024)
    samples = np.concatenate([some.arrays[1][::stride] for some in kept])
    place = len(samples) - len(kept) - math.ceil(rank / stride)
    return float(np.partition(samples, place)[place]) if place >= 0 else -math.inf


def _highest(values: np.ndarray, count: int) -> np.ndarray:
    """Which values are the ``count`` highest, ties by position; ``(len(values),)`` bool. Faster than a sort."""
    if count >= len(values):
        return np.ones(len(values), dtype=bool)
    if count == 0:
        return np.zeros(len(values), dtype=bool)
    last = np.partition(values, len(values) - count)[len(values) - count]
    highest = values > last
    # Lists follow each other in model order and hold equal scores by index, so position is the rank among equals.
    highest[np.flatnonzero(values == last)[: count - np.count_nonzero(highest)]] = True
    return highest


def _without(numbers: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Ascending numbers that are not among other ascending numbers."""
    if not len(removed):
        return numbers
    places = np.minimum(np.searchsorted(removed, numbers), len(removed) - 1)
    return numbers[removed[places] != numbers]


def _check_fraction(argument: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) <= 1:
        raise SelectionError(f"expected a fraction in (0, 1], got {value!r}", argument=argument)
    return float(value)


def _warn(report: Mapping[str, Any]) -> None:
    lines = []
    for argument, role in (("q", "harm"), ("p", "benign")):
        side = report[role]
        if side is None:
            continue
        if side["zero"]:
            lines.append(
                f"{argument} rounds to 0 weights in {len(side['zero'])} matrices (the first is {side['zero'][0]})"
            )
        if side["selected"] < side["asked"]:
            missing = side["asked"] - side["selected"]
            lines.append(f"{missing} of the {side['asked']} weights asked by {argument} have no {role} score above 0")
    if lines:
        warn("; ".join(lines) + "; see metadata['report'] of the mask")
