"""Tasks and their answers: what a model is asked, in which way, and what it says.

A :class:`Task` is rows that are asked in one way. Questions of many tasks are asked together, so that small tasks fill
a few large batches. Judging comes after, and elsewhere: an answer does not depend on who reads it.

In: a model, an encoder and rows. Out: :class:`Completion` objects, which hold the model's text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastprune.calibration import Encoder, Row
from fastprune.calibration.rows import describe_row
from fastprune.errors import ArgumentError, CalibrationError, positive_integer
from fastprune.evaluation.decoding import Continuation, Query, Sampling, continue_queries
from fastprune.evaluation.generation import encode_contexts, stop_ids
from fastprune.evaluation.thoughts import read_reply
from fastprune.model.positions import trained_length

Budget = int | Mapping[str, int] | None
"""Limit of new tokens: for all kinds of rows, or by kind; ``None``: the length of a row's reference plus one token."""


@dataclass(frozen=True)
class Task:
    """Rows that are tokenized once and asked in one way.

    Attributes:
        name: Its name in messages, such as that of a skill.
        kind: One of :data:`fastprune.evaluation.answers.KINDS`.
        rows: The rows as the model is asked them.
        contexts: Token ids of each row's ``prompt | prefill``.
        budgets: Limit of new tokens for each row.
        by_reference: Whether the budgets are the lengths of the references, so that most answers end there.
    """

    name: str
    kind: str
    rows: list[Row]
    contexts: list[list[int]]
    budgets: list[int]
    by_reference: bool

    @classmethod
    def prepare(cls, name: str, kind: str, rows: list[Row], encoder: Encoder, *, max_new_tokens: int | None) -> Task:
        """Tokenize; without ``max_new_tokens`` the budget of a row is the length of its reference plus one token.

        The additional token shows whether the last word of a completion is whole.

        Raises:
            ArgumentError: ``max_new_tokens`` is not a positive integer.
            CalibrationError: A row lacks the response that its budget comes from, or its context gives no token.
        """
        positive_integer(f"{name}: max_new_tokens", max_new_tokens, optional=True)
        budgets = []
        for index, row in enumerate(rows):
            if max_new_tokens is None and not row.response.strip():
                raise CalibrationError(
                    f"{describe_row(name, index, row)}: column 'response' is empty; "
                    "without a reference the length of the answer is unknown: give max_new_tokens"
                )
            budgets.append(max_new_tokens or len(encoder.tokens(row.response)) + 1)
        contexts = encode_contexts(encoder, rows, name=name)
        return cls(name, kind, rows, contexts, budgets, by_reference=max_new_tokens is None)

    def room(self, model: Any) -> list[int]:
        """The budgets for this model: an answer ends, at the latest, where the model's positions do.

        Its finish is ``"length"`` then, and it counts as cut. A budget by reference is not shortened, since a shorter
        answer could not be the right one; :func:`ask` refuses it.
        """
        longest = None if self.by_reference else trained_length(model)
        if longest is None:
            return self.budgets
        return [
            max(1, min(budget, longest - len(context)))
            for budget, context in zip(self.budgets, self.contexts, strict=True)
        ]


@dataclass(frozen=True)
class Question:
    """One row of a task, asked once.

    Attributes:
        task: The task.
        index: The row's number in it.
        sample: Number of the answer, from 0, where a row is asked several times.
    """

    task: Task
    index: int
    sample: int = 0

    @property
    def row(self) -> Row:
        """The row as the model is asked it."""
        return self.task.rows[self.index]

    @property
    def context(self) -> list[int]:
        """Token ids that the model continues."""
        return self.task.contexts[self.index]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return describe_row(self.task.name, self.index, self.row)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after the context.

    Attributes:
        text: The answer, without a thought before it. It may be harmful: it belongs in no message, record or log.
        thought: What the model thought first, or ``None`` if it did not; an answer that never began leaves ``text``
            empty.
        finish: ``"stop"`` if the model ended by itself, ``"length"`` if the budget did.
        new_tokens: Number of tokens generated.
    """

    text: str = field(repr=False)
    thought: str | None = field(repr=False)
    finish: str
    new_tokens: int

    @property
    def is_unanswered(self) -> bool:
        """Whether the model thought and came to no answer."""
        return self.thought is not None and not self.text.strip()


def questions_of(tasks: Iterable[Task], samples: int = 1) -> list[Question]:
    """Every row of every task, ``samples`` times."""
    positive_integer("samples", samples)
    return [
        Question(task, index, sample) for task in tasks for index in range(len(task.rows)) for sample in range(samples)
    ]


def budgets_of(model: Any, questions: Sequence[Question]) -> list[int]:
    """Limit of new tokens of each question, for this model; see :meth:`Task.room`."""
    tasks = {id(question.task): question.task for question in questions}
    rooms = {key: task.room(model) for key, task in tasks.items()}
    return [rooms[id(question.task)][question.index] for question in questions]


def queries_of(model: Any, questions: Sequence[Question], states: Sequence[str] | None = None) -> list[Query]:
    """The questions as the token loop takes them; ``states`` as for :func:`ask`."""
    return [
        Query(question.context, budget, question.name, state)
        for question, budget, state in zip(
            questions, budgets_of(model, questions), states or [""] * len(questions), strict=True
        )
    ]


def ask(
    model: Any,
    encoder: Encoder,
    questions: Sequence[Question],
    *,
    states: Sequence[str] | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008  # frozen
    batch_size: int = 64,
    finished: Collection[int] = (),
    on_batch: Callable[[Mapping[int, Completion]], None] | None = None,
    progress: bool = False,
) -> dict[int, Completion]:
    """Ask a model.

    Args:
        model: A causal LM, unchanged afterwards.
        encoder: The encoder behind the tasks.
        questions: What to ask; batches are a function of all of them.
        states: Texts that the random numbers of each question are a function of, such as keys; needed for sampling.
        sampling: How tokens are chosen.
        batch_size: Questions in a forward pass.
        finished: Indices of questions that have an answer already.
        on_batch: Takes the new answers of each batch, by index of the question, as soon as it is done.
        progress: Show how far it is.

    Returns:
        The new answers, by index of the question.

    Raises:
        ArgumentError: The tokens do not fit the model, or samples that would all be the same are asked for.
        ScoringError: The model's logits are NaN.
    """
    if sampling.is_greedy and any(question.sample for question in questions):
        raise ArgumentError(
            "expected 1 at temperature 0, at which all samples of a row are the same; give a temperature above 0",
            argument="samples",
        )
    queries = queries_of(model, questions, states)

    def completions(continuations: Mapping[int, Continuation]) -> dict[int, Completion]:
        return {index: _completion(encoder, questions[index].row, each) for index, each in continuations.items()}

    continued = continue_queries(
        model,
        queries,
        stop_ids(model, encoder),
        sampling=sampling,
        batch_size=batch_size,
        finished=finished,
        on_batch=None if on_batch is None else lambda batch: on_batch(completions(batch)),
        progress=progress,
    )
    return completions(continued)


def content_state(question: Question, seed: int) -> str:
    """A state for :func:`ask` that depends on what is asked alone: the context, the number of the sample and a seed."""
    asked = ",".join(map(str, question.context))
    return f"{seed} {question.sample} {hashlib.sha256(asked.encode()).hexdigest()}"


def _completion(encoder: Encoder, row: Row, continuation: Continuation) -> Completion:
    reply = read_reply(encoder.tokenizer, continuation.ids, row.prefill)
    return Completion(reply.text, reply.thought, continuation.finish, continuation.new_tokens)
