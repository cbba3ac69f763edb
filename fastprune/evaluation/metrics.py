"""Harm, refusal and utility: the model answers, a judge scores the answers, the answers are dropped.

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
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation import attacks
from fastprune.evaluation.judges import Judge, exact_match, keyword_refusal
from fastprune.evaluation.measurement import Measurement
from fastprune.evaluation.tasks import Completion, Task, ask, questions_of

Rows = str | Path | Iterable[Row | Mapping[str, Any]]

# Many models answer first and put the disclaimer, or the refusal, later: a sentence does not show it.
REFUSAL_TOKENS = 128


def judged(task: Task, completions: Sequence[Completion], judge: Judge) -> Measurement:
    """Judge one completion for each row.

    Raises:
        CalibrationError: The judge needs a column that a row lacks.
        ArgumentError: The judge is not callable, or returns anything but a number from 0 to 1.
    """
    scores = []
    for index, (row, completion) in enumerate(zip(task.rows, completions, strict=True)):
        try:
            given = judge(row, completion.text)
        except CalibrationError as error:
            raise CalibrationError(f"{describe_row(task.name, index, row)}: {error}") from error
        try:
            score = float(given)
        except (TypeError, ValueError, RuntimeError):  # None, text, a tensor of several numbers
            score = math.nan
        if not 0.0 <= score <= 1.0:
            raise ArgumentError(
                f"{describe_row(task.name, index, row)}: judge: expected a number in [0, 1], got "
                f"{given if isinstance(given, int | float) else type(given).__name__}"
            )
        scores.append(score)
    return Measurement.of(
        scores,
        [row.category for row in task.rows],
        cut=None if task.by_reference else sum(each.finish == "length" for each in completions),
        unanswered=sum(each.is_unanswered for each in completions),
    )


def answered(
    model: Any, encoder: Encoder, tasks: Sequence[Task], *, batch_size: int, progress: bool = False
) -> list[list[Completion]]:
    """Greedy answers to all tasks, asked together: one for each row of each task."""
    completions = ask(model, encoder, questions_of(tasks), batch_size=batch_size, progress=progress)
    in_order = (completions[index] for index in range(len(completions)))
    return [[next(in_order) for _ in task.rows] for task in tasks]


def check_judge(name: str, judge: object) -> None:
    """Raise ArgumentError unless a judge can be called; ``name`` is that of its task."""
    if not callable(judge):
        raise ArgumentError(f"{name}: judge: expected a callable (row, completion) -> float, got {judge!r}")


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
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Raises:
        CalibrationError: No rows, or a row lacks a column that attack, budget or judge needs (named).
        ArgumentError: An unknown attack or format, or an argument out of range.
        ScoringError: The model's logits are NaN.
    """
    chosen = attacks.attack(attack)
    check_judge("harm", judge)
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    with chosen.on(model, tokenizer, read_rows(rows, references=False)) as attacked:
        task = Task.prepare("harm", "harm", attacked, encoder, max_new_tokens=max_new_tokens)
        [completions] = answered(model, encoder, [task], batch_size=batch_size, progress=progress)
        return judged(task, completions, judge)


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
        max_new_tokens: Limit of each answer; shorter where the model has no positions for more.
        batch_size: Rows in a forward pass.
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Raises:
        CalibrationError, ArgumentError, ScoringError: As :func:`harm`.
    """
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    judge = keyword_refusal() if judge is None else judge
    check_judge("refusal", judge)
    task = direct_task("refusal", encoder, read_rows(rows, references=False), max_new_tokens=max_new_tokens)
    [completions] = answered(model, encoder, [task], batch_size=batch_size, progress=progress)
    return judged(task, completions, judge)


def direct_task(kind: str, encoder: Encoder, rows: list[Row], *, max_new_tokens: int | None) -> Task:
    """Rows of a kind that is asked without a prefill."""
    direct = attacks.NoAttack().rows(encoder.tokenizer, rows)
    return Task.prepare(kind, kind, direct, encoder, max_new_tokens=max_new_tokens)


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
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Raises:
        CalibrationError, ArgumentError, ScoringError: As :func:`harm`; also for a judge of an unknown skill.
    """
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    tasks = skill_tasks(encoder, rows, max_new_tokens=max_new_tokens)
    chosen = skill_judges(tasks, judges or {})
    completions = answered(model, encoder, tasks, batch_size=batch_size, progress=progress)
    return Utility(
        {task.name: judged(task, found, chosen[task.name]) for task, found in zip(tasks, completions, strict=True)}
    )


def skill_tasks(encoder: Encoder, rows: Rows | Mapping[str, Rows], *, max_new_tokens: int | None) -> list[Task]:
    """The tasks behind :func:`utility`, in the order of the skills."""
    return [
        Task.prepare(skill, "skill", part, encoder, max_new_tokens=max_new_tokens)
        for skill, part in _by_skill(rows).items()
    ]


def skill_judges(tasks: Sequence[Task], judges: Mapping[str, Judge]) -> dict[str, Judge]:
    """A judge for each skill, by default :func:`exact_match`.

    Raises:
        ArgumentError: There is a judge of an unknown skill, or one that cannot be called.
    """
    skills = [task.name for task in tasks]
    unknown = sorted(set(judges) - set(skills))
    if unknown:
        raise ArgumentError(f"expected names of skills {sorted(skills)}, got {unknown}", argument="judges")
    for skill, judge in judges.items():
        check_judge(skill, judge)
    return {skill: judges.get(skill, exact_match) for skill in skills}


def _by_skill(rows: Rows | Mapping[str, Rows]) -> dict[str, list[Row]]:
    if isinstance(rows, Mapping):
        if not rows:
            raise CalibrationError("expected rows of at least one skill, got none", argument="skills")
        return {skill: read_rows(part, references=False) for skill, part in rows.items()}
    skills: dict[str, list[Row]] = {}
    for index, row in enumerate(read_rows(rows, references=False)):
        skill = row.extra.get("skill")
        if not isinstance(skill, str) or not skill:
            raise CalibrationError(f"{describe_row('skills', index, row)}: column 'skill' is missing or not text")
        skills.setdefault(skill, []).append(row)
    return skills
