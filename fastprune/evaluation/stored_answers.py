"""Answers together with their rows: what a run of answering gives, and what judges read without the model.

In: a store. Out: :class:`Answers`. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from fastprune.errors import ArtifactError
from fastprune.evaluation.answers import Answer, StoredRow
from fastprune.evaluation.store import read_store


class Answers(Sequence[Answer]):
    """Answers with their rows.

    Attributes:
        rows: The rows by ``(task, id)``.
    """

    def __init__(self, answers: Iterable[Answer], rows: Iterable[StoredRow]) -> None:
        self._answers = list(answers)
        self.rows: dict[tuple[str, str], StoredRow] = {(row.task, row.id): row for row in rows}

    @classmethod
    def load(cls, folder: str | Path) -> Answers:
        """The answers of a store, in the order in which they were given.

        Raises:
            NotFoundError: There is no such folder.
            ArtifactError: It is no store, of a later version, damaged, or holds no answer.
        """
        rows, answers = read_store(Path(folder))
        if not answers:
            raise ArtifactError(f"{folder}: expected a store with answers, got one without any; run `fastprune answer`")
        return cls(answers, rows)

    def row_of(self, answer: Answer) -> StoredRow:
        """The row that an answer belongs to."""
        return self.rows[answer.task, answer.row]

    def counts(self) -> list[dict[str, Any]]:
        """For each mask, task and attack: number of ``answers``, those ``cut`` by length, and ``unanswered`` ones."""
        groups: dict[str, list[Answer]] = {}
        for answer in self._answers:
            groups.setdefault(json.dumps([answer.mask, answer.task, answer.attack]), []).append(answer)
        return [
            {
                "mask": group[0].mask,
                "task": group[0].task,
                "attack": group[0].attack,
                "answers": len(group),
                "cut": sum(answer.finish == "length" for answer in group),
                "unanswered": sum(answer.unanswered for answer in group),
                "new_tokens": sum(answer.new_tokens for answer in group),
            }
            for group in groups.values()
        ]

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[Answer]:
        return iter(self._answers)

    @overload
    def __getitem__(self, index: int) -> Answer: ...
    @overload
    def __getitem__(self, index: slice) -> Answers: ...
    def __getitem__(self, index: int | slice) -> Answer | Answers:
        if isinstance(index, slice):
            return Answers(self._answers[index], self.rows.values())
        return self._answers[index]

    def __repr__(self) -> str:
        return f"Answers({len(self)} answers to {len(self.rows)} rows)"
