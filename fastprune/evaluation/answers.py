"""One answer as data: what a model said to a row, under a mask and an attack, and which row that was.

In: lines of a store. Out: :class:`Answer` and :class:`StoredRow`. Loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from fastprune.calibration.rows import Row
from fastprune.errors import ArtifactError

KINDS = ("harm", "refusal", "skill", "over_refusal", "explanation")
"""Kinds of rows, as stores, options and records call them."""

UNPRUNED = "none"
"""Name of the unpruned model among the masks."""


@dataclass(frozen=True)
class StoredRow:
    """A row that a model was asked, as the user gave it, before any attack.

    Attributes:
        id: Its name, unique among the rows of its task.
        task: Its kind: ``"harm"``, ``"refusal"``, ``"skill"``, ``"over_refusal"`` or ``"explanation"``.
        prompt: The request; ``None`` once its texts were dropped, as with the other texts.
        history: System and earlier turns, as pairs of role and text.
        prefill: The start of the reply that belongs to the row.
        response: The reference.
        category: Its category, or ``None``.
        references: Other right answers.
        skill: The skill that it tests, or ``None``.
        content: Hash of everything above, which stays when the texts are dropped.
    """

    id: str
    task: str
    prompt: str | None = field(repr=False)
    history: tuple[tuple[str, str], ...] | None = field(repr=False)
    prefill: str | None = field(repr=False)
    response: str | None = field(repr=False)
    category: str | None
    references: tuple[str, ...] | None = field(repr=False)
    skill: str | None
    content: str

    @classmethod
    def of(cls, row: Row, task: str, skill: str | None = None) -> Self:
        """The row of a task; one without an id is named by its content."""
        given = row.extra.get("references")
        references = tuple(map(str, given)) if isinstance(given, list | tuple) else ()
        texts = (row.prompt, row.history, row.prefill, row.response, row.category, references)
        content = hashlib.sha256(json.dumps([task, skill, *texts]).encode()).hexdigest()[:16]
        name = row.id if row.id is not None else content
        return cls(name if skill is None else f"{skill}/{name}", task, *texts, skill, content)

    def without_texts(self) -> dict[str, Any]:
        """As a line, without what could be harmful."""
        return asdict(self) | dict.fromkeys(("prompt", "history", "prefill", "response", "references"))


@dataclass(frozen=True)
class Answer:
    """What a model said to a row.

    Attributes:
        key: Hash of everything that the answer depends on.
        row: Name of the row.
        task: Kind of the row.
        model: Digest of the unpruned model's weights.
        mask: Name of the mask; ``"none"``: unpruned.
        attack: Settings of the attack, with its ``name``.
        sampling: ``temperature`` and ``top_p``.
        seed: Seed of what was drawn.
        sample: Number of the answer, from 0, where a row was asked several times.
        prefill: The start of the reply that the model was given; ``None`` once the texts were dropped.
        text: The answer after that, without a thought; ``None`` once the texts were dropped.
        thought: What the model thought before it answered, or ``None``.
        finish: ``"stop"`` if the model ended by itself, ``"length"`` if its limit did.
        new_tokens: Number of tokens generated.
        unanswered: Whether the model thought and came to no answer.
    """

    key: str
    row: str
    task: str
    model: str
    mask: str
    attack: dict[str, Any]
    sampling: dict[str, float]
    seed: int
    sample: int
    prefill: str | None = field(repr=False)
    text: str | None = field(repr=False)
    thought: str | None = field(repr=False)
    finish: str
    new_tokens: int
    unanswered: bool

    def without_texts(self) -> dict[str, Any]:
        """As a line, without what could be harmful."""
        return asdict(self) | dict.fromkeys(("prefill", "text", "thought"))


def row_of_line(line: Mapping[str, Any], where: str) -> StoredRow:
    """The row of a line.

    Raises:
        ArtifactError: A field is missing.
    """
    values = _values(StoredRow, line, where)
    for name in ("history", "references"):  # JSON has lists only
        if values[name] is not None:
            values[name] = tuple(tuple(each) if isinstance(each, list) else each for each in values[name])
    return StoredRow(**values)


def answer_of_line(line: Mapping[str, Any], where: str) -> Answer:
    """The answer of a line.

    Raises:
        ArtifactError: A field is missing.
    """
    return Answer(**_values(Answer, line, where))


def _values(kind: Any, line: Mapping[str, Any], where: str) -> dict[str, Any]:
    names = [part.name for part in fields(kind)]
    if missing := [name for name in names if name not in line]:
        raise ArtifactError(f"{where}: expected the fields {names}, got none called {missing[0]!r}")
    return {name: line[name] for name in names}
