"""The best scores of every matrix, collected while the engine goes through the model.

In: some matrices at a time, in any order. Out: for each matrix a prefix of its weights by descending score, long enough
for every later selection up to the fraction, within a matrix and over all matrices together. A full list of scores
would be as large as the model; with the default fraction this is about a thousandth of it.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fastprune import ops
from fastprune.errors import ArgumentError, ScoringError
from fastprune.planning.list_lengths import local_counts


@dataclass(frozen=True, eq=False)
class TopScores:
    """The best-scored weights of one matrix: a prefix of the order by descending score, ties by ascending index.

    Attributes:
        indices: ``(kept,)`` int64 on the CPU, row-major flat in the stored layout.
        values: ``(kept,)`` float32 on the CPU, descending.
        numel: Number of weights of the matrix.
        floor: Score of the first weight that was not kept, an upper bound of all scores outside the list; -inf if all
            are kept.
    """

    indices: torch.Tensor
    values: torch.Tensor
    numel: int
    floor: float

    def __len__(self) -> int:
        return len(self.arrays[0])

    @property
    def complete(self) -> bool:
        """Whether every weight of the matrix is in the list."""
        return len(self) == self.numel

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values as NumPy arrays on the same memory: reading an element costs a tenth of a tensor's."""
        return self.indices.numpy(), self.values.numpy()

    def __getstate__(self) -> dict[str, object]:
        """The state without the NumPy views, which would be sent between processes a second time."""
        return {name: value for name, value in vars(self).items() if name != "arrays"}

    def above(self, threshold: float, *, equal: bool) -> int:
        """Number of kept scores above the threshold, or (``equal``) not below it."""
        # Bisection without a negated copy: a sweep over p and q calls this hundreds of times a point.
        find = bisect_right if equal else bisect_left
        return find(self.arrays[1], -threshold, key=operator.neg)

    def prefix(self, length: int) -> TopScores:
        """The first ``length`` entries as a list of their own."""
        if length >= len(self):
            return self
        # Cloned, as a view would keep the whole list in memory.
        values = self.values[:length].clone()
        return TopScores(self.indices[:length].clone(), values, self.numel, float(self.values[length]))


class TopScoresCollector:
    """Collects the lists of one criterion over one calibration set.

    Kept of a matrix of n weights: ``ceil(fraction * n)``, raised to ``min(n, 16384)`` if that fits (see
    ``SMALL_BYTES``), and every positive score that is among the ``ceil(fraction * N)`` highest of all N weights (ties
    by matrix order, then index). The latter is what makes one selection over all matrices exact when a single matrix
    holds all of it.

    Args:
        sizes: Number of weights of each matrix, in model order.
        fraction: In (0, 1]; 1 keeps everything.
        n_lists: Number of collectors that share ``SMALL_BYTES``, this one included.
        backend: For :func:`fastprune.ops.top_scores_of_each`.

    Raises:
        ArgumentError: ``fraction`` is outside (0, 1], or there is no matrix.
    """

    def __init__(self, sizes: Mapping[str, int], fraction: float, n_lists: int, backend: str | None = None) -> None:
        if not 0 < fraction <= 1:
            raise ArgumentError(f"expected a number in (0, 1] (p_max, q_max), got {fraction!r}", argument="fraction")
        if not sizes:
            raise ArgumentError("expected at least one matrix, got none", argument="sizes")
        self.sizes = dict(sizes)
        self._backend = backend
        self._n_global = math.ceil(fraction * sum(self.sizes.values()))
        self._n_local = dict(zip(self.sizes, local_counts(list(self.sizes.values()), fraction, n_lists), strict=True))
        self._kept: dict[str, TopScores] = {}
        # Scores below it cannot be among the n_global highest. It only rises, so a stale threshold keeps too many.
        self._threshold = -math.inf
        self._fresh = 0  # candidates added since the threshold was taken

    def add(
        self, matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]], criterion: str
    ) -> dict[str, TopScores]:
        """Form the scores of some matrices and keep the best.

        The matrices together set the threshold. Once it is there, only a matrix that holds more than its share of the
        highest scores is asked for more. Added one by one, the first matrices of 7 B weights would have to list 7
        million entries each.

        Args:
            matrices: Name, one of ``sizes`` and not added before, to the matrix in stored layout and to what the
                criterion needs, as for :func:`fastprune.ops.top_scores`.
            criterion: Name of the criterion.

        Returns:
            What was kept for now; to :meth:`insert` it into another collector of the same settings has the same effect.

        Raises:
            ScoringError: A score is NaN; the message names the matrix.
            ArgumentError: A matrix is unknown, of another size, or was added before.
        """
        for name, (weight, _) in matrices.items():
            self._check_new(name, weight.numel())
        asks = {name: self._n_local[name] for name in matrices}
        while asks:
            lowest = {}
            # One more entry than is asked for: its score is the floor.
            ks = {name: min(self.sizes[name], ask + 1) for name, ask in asks.items()}
            asked = {name: matrices[name] for name in asks}
            for name, (indices, values) in ops.top_scores_of_each(asked, criterion, ks, backend=self._backend):
                found = TopScores(indices.cpu(), values.cpu(), self.sizes[name], -math.inf)
                lowest[name] = float(found.values[-1]) if len(found) else -math.inf
                enough = max(self._n_local[name], min(self._candidates(found), self._n_global))
                self._kept[name] = found.prefix(enough)
            self._trim()
            asks = {
                name: min(4 * ask, self._limit(name))
                for name, ask in asks.items()
                if ask < self._limit(name) and self._is_candidate(lowest[name])
            }
        return {name: self._kept[name] for name in matrices}

    def insert(self, name: str, kept: TopScores) -> None:
        """Add a list that a collector of the same settings formed before, e.g. one read from a journal.

        Raises:
            ArgumentError: As :meth:`add`.
        """
        self._check_new(name, kept.numel)
        self._kept[name] = kept
        self._fresh += min(self._candidates(kept), self._n_global)
        if self._fresh >= self._n_global:
            self._trim()

    @property
    def so_far(self) -> dict[str, TopScores]:
        """The lists collected so far."""
        return dict(self._kept)

    def finish(self) -> dict[str, TopScores]:
        """The lists in model order.

        Raises:
            ScoringError: A matrix was never added.
        """
        missing = [name for name in self.sizes if name not in self._kept]
        if missing:
            raise ScoringError(
                f"{len(missing)} of {len(self.sizes)} matrices were never scored, the first is {missing[0]}"
            )
        self._trim()
        return {name: self._kept[name] for name in self.sizes}

    def _limit(self, name: str) -> int:
        """Entries of a matrix that may be kept."""
        return min(self.sizes[name], max(self._n_local[name], self._n_global))

    def _check_new(self, name: str, numel: int) -> None:
        if name not in self.sizes:
            raise ArgumentError(f"{name}: expected one of the {len(self.sizes)} matrices of sizes")
        if self.sizes[name] != numel:
            raise ArgumentError(f"{name}: expected {self.sizes[name]} weights, got {numel}")
        if name in self._kept:
            raise ArgumentError(f"{name}: expected a matrix that was not added before")

    def _is_candidate(self, value: float) -> bool:
        return value >= self._threshold and value > 0

    def _candidates(self, kept: TopScores) -> int:
        return min(kept.above(self._threshold, equal=True), kept.above(0.0, equal=False))

    def _trim(self) -> None:
        """Update the threshold; cut each list to its own share and to what is among the highest of all so far."""
        names = [name for name in self.sizes if name in self._kept]
        values = np.concatenate(
            [self._kept[name].values[: self._candidates(self._kept[name])].numpy() for name in names]
        )
        self._fresh = 0
        if len(values) < self._n_global:
            return
        self._threshold = float(np.partition(values, len(values) - self._n_global)[len(values) - self._n_global])
        higher = [self._kept[name].above(self._threshold, equal=False) for name in names]
        ties_left = self._n_global - sum(higher)
        for name, n_higher in zip(names, higher, strict=True):  # model order, which is how equal scores are ranked
            kept = self._kept[name]
            ties = min(kept.above(self._threshold, equal=True) - n_higher, ties_left)
            ties_left -= ties
            self._kept[name] = kept.prefix(max(self._n_local[name], n_higher + ties))
