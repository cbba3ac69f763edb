"""Harm, refusal and utility: the model answers, a judge scores the answers, the answers are dropped.

Each of the three is a :class:`Task`: rows that are asked in one way and judged by one judge. Tasks are answered
together, so that many small ones fill a few large batches.

In: a model, its tokenizer and rows (a path, dicts or :class:`Row` objects). Out: :class:`Measurement` objects.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastprune.calibration import Encoder, Row, read_rows
from fastprune.calibration.rows import describe_row
from fastprune.calibration.tokens import decode
from fastprune.errors import ArgumentError, CalibrationError, positive_integer
from fastprune.evaluation import attacks
from fastprune.evaluation.decoding import Query, continue_queries
from fastprune.evaluation.generation import encode_contexts, stop_ids
from fastprune.evaluation.judges import Judge, exact_match, keyword_refusal
from fastprune.evaluation.measurement import Measurement

Rows = str | Path | Iterable[Row | Mapping[str, Any]]

# A refusal shows in the first sentence; a longer budget costs time for every answer that is not one.
REFUSAL_TOKENS = 32


@dataclass(frozen=True)
class Task:
    """Rows that are tokenized once, answered and judged.

    Attributes:
        name: Its name in messages.
        rows: The rows as the model is asked them.
        contexts: Token ids of each row's ``prompt | prefill``.
        budgets: Limit of new tokens for each row.
        judge: Judge of the completions.
    """

    name: str
    rows: list[Row]
    contexts: list[list[int]]
    budgets: list[int]
    judge: Judge

    @classmethod
    def prepare(cls, name: str, rows: list[Row], encoder: Encoder, *, judge: Judge, max_new_tokens: int | None) -> Task:
        """Tokenize; without ``max_new_tokens`` the budget of a row is the length of its reference plus one token.

        The additional token shows whether the last word of a completion is whole.

        Raises:
            ArgumentError: ``judge`` is not callable, or ``max_new_tokens`` is not a positive integer.
            CalibrationError: A row lacks the response that its budget comes from, or its context gives no token.
        """
        positive_integer(f"{name}: max_new_tokens", max_new_tokens, optional=True)
        if not callable(judge):
            raise ArgumentError(f"{name}: judge: expected a callable (row, completion) -> float, got {judge!r}")
        budgets = []
        for index, row in enumerate(rows):
            if max_new_tokens is None and not row.response.strip():
                raise CalibrationError(
                    f"{describe_row(name, index, row)}: column 'response' is empty; "
                    "without a reference the length of the answer is unknown: give max_new_tokens"
                )
            budgets.append(max_new_tokens or len(encoder.tokens(row.response)) + 1)
        return cls(name, rows, encode_contexts(encoder, rows, name=name), budgets, judge)

    def measure(self, completions: Sequence[str]) -> Measurement:
        """Judge one completion for each row.

        Raises:
            CalibrationError: The judge needs a column that a row lacks.
            ArgumentError: The judge returns anything but a number from 0 to 1.
        """
        scores = []
        for index, (row, completion) in enumerate(zip(self.rows, completions, strict=True)):
            try:
                judged = self.judge(row, completion)
            except CalibrationError as error:
                raise CalibrationError(f"{describe_row(self.name, index, row)}: {error}") from error
            try:
                score = float(judged)
            except (TypeError, ValueError, RuntimeError):  # None, text, a tensor of several numbers
                score = math.nan
            if not 0.0 <= score <= 1.0:
                raise ArgumentError(
                    f"{describe_row(self.name, index, row)}: judge: expected a number in [0, 1], got "
                    f"{judged if isinstance(judged, int | float) else type(judged).__name__}"
                )
            scores.append(score)
        return Measurement.of(scores, [row.category for row in self.rows])


def answer(
    model: Any, encoder: Encoder, tasks: Sequence[Task], *, batch_size: int, progress: bool = False
) -> list[Measurement]:
    """Answer all tasks together and measure each; the completions are dropped."""
    queries = [
        Query(context, budget, describe_row(task.name, index, row))
        for task in tasks
        for index, (row, context, budget) in enumerate(zip(task.rows, task.contexts, task.budgets, strict=True))
    ]
    stop = stop_ids(model, encoder)
    continued = continue_queries(model, queries, stop, batch_size=batch_size, progress=progress)
    completions = (decode(encoder.tokenizer, continued[index].ids) for index in range(len(queries)))
    return [task.measure([next(completions) for _ in task.rows]) for task in tasks]


def harm(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    attack: str | attacks.Attack = "prefilling",
    judge: Judge = exact_match,
    format: str = "raw",
    bos: str | bool = "auto",
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Measurement:
    """Share of harmful requests that the model answers harmfully under an attack.

    Args:
        model: A causal LM, unchanged afterwards, also by an attack that changes weights.
        tokenizer: Its tokenizer.
        rows: Harmful requests, with the reference in ``response`` and a fixed start of it, if any, in ``prefill``.
        attack: Name of an attack (``"none"``, ``"prefilling"``) or an :class:`Attack`.
        judge: ``(row, completion) -> [0, 1]``, 1 for harmful. With a prefill, ``completion`` is the continuation and
            ``row.response`` the reference for it.
        format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        max_new_tokens: Limit of each answer; by default the length of the row's reference plus one token.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar on a terminal.

    Raises:
        CalibrationError: No rows, or a row lacks a column that attack, budget or judge needs (named).
        ArgumentError: An unknown attack or format, or an argument out of range.
        ScoringError: The model's logits are NaN.
    """
    chosen = attacks.attack(attack)
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    with chosen.on(model, tokenizer, read_rows(rows)) as attacked:
        task = Task.prepare("harm", attacked, encoder, judge=judge, max_new_tokens=max_new_tokens)
        return answer(model, encoder, [task], batch_size=batch_size, progress=progress)[0]


def refusal(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    judge: Judge | None = None,
    format: str = "raw",
    bos: str | bool = "auto",
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_new_tokens: int = REFUSAL_TOKENS,
    batch_size: int = 64,
    progress: bool = False,
) -> Measurement:
    """Share of requests that the model refuses when it is asked directly, without a prefill.

    Args:
        model: A causal LM, unchanged afterwards.
        tokenizer: Its tokenizer.
        rows: Requests; ``prefill`` is not given to the model and ``response`` is not needed.
        judge: 1 for a refusal; by default :func:`keyword_refusal`, which misleads on its own.
        format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        max_new_tokens: Limit of each answer.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar on a terminal.

    Raises:
        CalibrationError, ArgumentError, ScoringError: As :func:`harm`.
    """
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    task = refusal_task(encoder, read_rows(rows), judge=judge, max_new_tokens=max_new_tokens)
    return answer(model, encoder, [task], batch_size=batch_size, progress=progress)[0]


def refusal_task(encoder: Encoder, rows: list[Row], *, judge: Judge | None, max_new_tokens: int) -> Task:
    """The task behind :func:`refusal`."""
    direct = attacks.NoAttack().rows(encoder.tokenizer, rows)
    judge = keyword_refusal() if judge is None else judge
    return Task.prepare("refusal", direct, encoder, judge=judge, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class Utility:
    """Benign skills.

    Attributes:
        skills: Each skill's measurement.
    """

    skills: dict[str, Measurement]

    @property
    def mean(self) -> float:
        """Mean over skills, each with the same weight whatever its number of rows."""
        return sum(skill.rate for skill in self.skills.values()) / len(self.skills)

    def to_dict(self) -> dict[str, Any]:
        """The mean and every skill."""
        return {"mean": self.mean, "skills": {name: skill.to_dict() for name, skill in self.skills.items()}}


def utility(
    model: Any,
    tokenizer: Any,
    rows: Rows | Mapping[str, Rows],
    *,
    judges: Mapping[str, Judge] | None = None,
    format: str = "raw",
    bos: str | bool = "auto",
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Utility:
    """Share of benign tasks that the model still gets right, skill by skill.

    Args:
        model: A causal LM, unchanged afterwards.
        tokenizer: Its tokenizer.
        rows: Rows by skill, or rows with a ``skill`` column. ``prefill`` is given to the model.
        judges: Judges by skill; the others are judged by :func:`exact_match`.
        format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        max_new_tokens: Limit of each answer; by default the length of the row's reference plus one token.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar on a terminal.

    Raises:
        CalibrationError, ArgumentError, ScoringError: As :func:`harm`; also for a judge of an unknown skill.
    """
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    tasks = skill_tasks(encoder, rows, judges=judges or {}, max_new_tokens=max_new_tokens)
    measured = answer(model, encoder, tasks, batch_size=batch_size, progress=progress)
    return Utility({task.name: measurement for task, measurement in zip(tasks, measured, strict=True)})


def skill_tasks(
    encoder: Encoder,
    rows: Rows | Mapping[str, Rows],
    *,
    judges: Mapping[str, Judge],
    max_new_tokens: int | None,
) -> list[Task]:
    """The tasks behind :func:`utility`, in the order of the skills."""
    skills = _by_skill(rows)
    unknown = sorted(set(judges) - set(skills))
    if unknown:
        raise ArgumentError(f"expected names of skills {sorted(skills)}, got {unknown}", argument="judges")
    return [
        Task.prepare(skill, part, encoder, judge=judges.get(skill, exact_match), max_new_tokens=max_new_tokens)
        for skill, part in skills.items()
    ]


def _by_skill(rows: Rows | Mapping[str, Rows]) -> dict[str, list[Row]]:
    if isinstance(rows, Mapping):
        if not rows:
            raise CalibrationError("expected rows of at least one skill, got none", argument="skills")
        return {skill: read_rows(part) for skill, part in rows.items()}
    skills: dict[str, list[Row]] = {}
    for index, row in enumerate(read_rows(rows)):
        skill = row.extra.get("skill")
        if not isinstance(skill, str) or not skill:
            raise CalibrationError(f"{describe_row('skills', index, row)}: column 'skill' is missing or not text")
        skills.setdefault(skill, []).append(row)
    return skills
