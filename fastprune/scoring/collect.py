"""What the pass leaves of every matrix: its best-scored weights, and the samples that identify the model.

In: final statistics, segment by segment, from this process, a journal or other processes. Out: the kept lists of every
criterion and the model's fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fastprune.model.fingerprint import fingerprint_of_samples, sample
from fastprune.model.matrices import Matrix
from fastprune.ops.criteria import CRITERIA
from fastprune.scoring.journal import Journal, NullJournal
from fastprune.scoring.processes import Processes
from fastprune.scoring.top_scores import TopScores, TopScoresCollector


class Collector:
    """The sink of a pass: forms scores of what is final and keeps the best, about a thousandth.

    Args:
        matrices: In model order.
        criteria: Of each role.
        fractions: Kept fraction of each role.
        backend: Backend of the ops.
        journal: Notes everything that is added.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        criteria: Mapping[str, tuple[str, ...]],
        fractions: Mapping[str, float],
        backend: str | None,
        journal: Journal | NullJournal,
    ) -> None:
        self.shapes = {matrix.name: tuple(matrix.weight.shape) for matrix in matrices}
        self._criteria, self._journal = criteria, journal
        n_lists = sum(map(len, criteria.values()))
        sizes = {matrix.name: matrix.weight.numel() for matrix in matrices}
        self._keepers = {
            (role, criterion): TopScoresCollector(sizes, fractions[role], n_lists, backend)
            for role, names in criteria.items()
            for criterion in names
        }
        self._samples: dict[str, torch.Tensor] = {}
        self._losses: dict[str, torch.Tensor] = {}

    def add_losses(self, role: str, losses: torch.Tensor) -> None:
        """Take a set's ``(2,)`` losses: on end-of-turn tokens, and in all."""
        self._losses[role] = losses
        self._journal.note({f"losses/{role}": losses})

    def end_of_turn_shares(self) -> dict[str, float]:
        """Share of each set's loss on end-of-turn tokens, to three decimals: further ones differ by rounding."""
        sums = {role: losses.tolist() for role, losses in self._losses.items()}
        return {role: round(ends / total, 3) if total > 0 else 0.0 for role, (ends, total) in sums.items()}

    def add(self, role: str, final: Mapping[Matrix, Mapping[str, torch.Tensor]]) -> None:
        """Form the scores of some matrices under every criterion of a role.

        Args:
            role: ``"harm"`` or ``"benign"``.
            final: The statistics of each matrix, by their names.

        Raises:
            ScoringError: A score is NaN; names the matrix.
        """
        noted = {}
        for matrix in final:
            if matrix.name not in self._samples:
                self._samples[matrix.name] = noted[f"sample/{matrix.name}"] = sample(matrix.weight)
        for criterion in self._criteria[role]:
            matrices, row = {}, CRITERIA[criterion]
            for matrix, statistics in final.items():
                values = None if row.statistic is None else statistics[row.statistic]
                if values is not None and row.broadcasts and matrix.input_major:
                    values = values.unsqueeze(1)
                matrices[matrix.name] = matrix.weight, values
            for name, kept in self._keepers[role, criterion].add(matrices, criterion).items():
                label = f"{role}/{criterion}/{name}"
                noted |= {f"indices/{label}": kept.indices, f"values/{label}": kept.values}
                noted[f"floor/{label}"] = torch.tensor([kept.floor], dtype=torch.float32)
        self._journal.note(noted)

    def restore(self, noted: Mapping[str, torch.Tensor]) -> None:
        """Add what a journal noted of a finished segment."""
        for key, tensor in noted.items():
            kind, _, label = key.partition("/")
            if kind == "sample":
                self._samples[label] = tensor
            elif kind == "losses":
                self._losses[label] = tensor
            elif kind == "indices":
                role, criterion, name = label.split("/", 2)
                keeper = self._keepers[role, criterion]
                floor = float(noted[f"floor/{label}"])
                keeper.insert(name, TopScores(tensor, noted[f"values/{label}"], keeper.sizes[name], floor))

    def merge(self, processes: Processes) -> None:
        """Bring together on every process what each of them kept."""
        mine = {key: keeper.so_far for key, keeper in self._keepers.items()}
        gathered = processes.all_gather((self._samples, mine, self._losses))
        self._losses = {role: sum(losses[role] for _, _, losses in gathered) for role in self._losses}
        for rank, (samples, lists, _) in enumerate(gathered):
            if rank == processes.rank:
                continue
            self._samples |= samples
            for key, by_name in lists.items():
                for name, kept in by_name.items():
                    self._keepers[key].insert(name, kept)

    def lists(self) -> dict[str, dict[str, dict[str, TopScores]]]:
        """Role to criterion to matrix, in model order.

        Raises:
            ScoringError: A matrix was never scored.
        """
        return {
            role: {criterion: self._keepers[role, criterion].finish() for criterion in names}
            for role, names in self._criteria.items()
        }

    def fingerprint(self) -> str:
        """The fingerprint of the model whose weights were scored."""
        return fingerprint_of_samples({name: (self.shapes[name], values) for name, values in self._samples.items()})
