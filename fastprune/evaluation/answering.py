"""Asking one model everything, unpruned and with each mask, into a store.

In: rows by kind, attacks, masks and a store. Out: the answers, each kept as soon as its batch is done. Batches are a
function of what is asked, and random numbers of an answer's key, so a run that was killed ends as one that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fastprune.calibration import Encoder, Row
from fastprune.calibration.rows import describe_row
from fastprune.calibration.tokens import tokenizer_hash
from fastprune.errors import ArgumentError, positive_integer, setting
from fastprune.evaluation.answers import UNPRUNED, Answer, StoredRow
from fastprune.evaluation.attacks import Attack, NoAttack
from fastprune.evaluation.decoding import Sampling
from fastprune.evaluation.estimate import answering_time
from fastprune.evaluation.metrics import direct_task
from fastprune.evaluation.store import AnswerStore, open_store
from fastprune.evaluation.stored_answers import Answers
from fastprune.evaluation.tasks import Completion, Question, Task, ask, budgets_of, queries_of, questions_of
from fastprune.model.fingerprint import weights_digest
from fastprune.progress import announce


class AnyMask(Protocol):
    """What is asked of a mask here; :class:`fastprune.PruneMask` is one."""

    @property
    def digest(self) -> str:
        """Hash of its weights."""

    @property
    def total(self) -> int:
        """Number of its weights."""

    def applied(self, model: Any, *, strict: bool = True) -> AbstractContextManager[Any]:
        """The model without these weights, for the length of the context."""


@dataclass(frozen=True)
class _Asked:
    """A task under an attack."""

    task: Task
    attack: Attack


class Interview:
    """What is asked, and how; :meth:`hold` asks it.

    Args:
        encoder: Turns rows into tokens.
        rows: Rows by kind, without skills.
        skills: Rows by skill.
        attacks: Attacks on the harm rows.
        budgets: Limit of new tokens by kind; ``None``: the length of the reference plus one.
        sampling: How tokens are chosen.
        seed: Of what is drawn.
        samples: Answers to each row.
        batch_size: Questions in a forward pass.

    Raises:
        ArgumentError: Rows of one kind share an id, or a number is out of range.
        CalibrationError: An attack cannot use the rows.
    """

    def __init__(
        self,
        encoder: Encoder,
        rows: Mapping[str, list[Row]],
        skills: Mapping[str, list[Row]],
        attacks: Sequence[Attack],
        budgets: Mapping[str, int | None],
        *,
        sampling: Sampling,
        seed: int,
        samples: int,
        batch_size: int,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"expected a whole number, got {seed!r}", argument="seed")
        positive_integer("samples", samples)
        if sampling.is_greedy and samples > 1:
            raise ArgumentError(
                f"expected 1 at temperature 0, at which all answers to a row are the same, got {samples}; see "
                f"{setting('temperature')}",
                argument="samples",
            )
        self._encoder, self._sampling, self._seed, self._samples = encoder, sampling, seed, samples
        self._batch_size = batch_size
        self._budgets, self._attacks = budgets, attacks
        self._stored: list[StoredRow] = []
        named = {kind: self._named(kind, None, part) for kind, part in rows.items()}
        self._harm = named.pop("harm", [])
        self._together: list[_Asked] = [  # all that can be asked in one go
            *(_Asked(self._harm_task(each, each.rows(encoder.tokenizer, self._harm)), each) for each in self._plain()),
            *(
                _Asked(direct_task(kind, encoder, part, max_new_tokens=budgets[kind]), NoAttack())
                for kind, part in named.items()
            ),
            *(
                _Asked(
                    Task.prepare(
                        skill, "skill", self._named("skill", skill, part), encoder, max_new_tokens=budgets["skill"]
                    ),
                    NoAttack(),
                )
                for skill, part in skills.items()
            ),
        ]

    def hold(
        self, model: Any, masks: Mapping[str, AnyMask], folder: Path, *, strict: bool = True, progress: bool = False
    ) -> Answers:
        """Ask the model, unpruned and with each mask; as :meth:`EvaluationSuite.answer`."""
        if UNPRUNED in masks:
            raise ArgumentError(
                f"{UNPRUNED!r} is the name of the unpruned model, expected another one for a mask", argument="masks"
            )
        for each in masks.values():  # one that does not fit is refused before anything is asked
            with each.applied(model, strict=strict):
                pass
        digest = weights_digest(model)
        facts = {
            "model": {"digest": digest, "architecture": type(model).__name__},
            "tokenizer": tokenizer_hash(self._encoder.tokenizer),
            "encoding": self._encoder.facts,
        }
        known = {name: {"digest": mask.digest, "weights": mask.total} for name, mask in masks.items()}
        keys: list[str] = []
        with open_store(folder, facts, known) as store:
            self._begin(store, model, 1 + len(masks), progress)
            store.add_rows(self._stored)
            passes: dict[str, AnyMask | None] = {UNPRUNED: None, **masks}
            for name, mask in passes.items():
                # its fingerprint was compared above, and later masks are compared with the model without this one
                with contextlib.nullcontext() if mask is None else mask.applied(model, strict=False):
                    for asked in self._rounds(model):
                        keys += self._ask(model, asked, store, digest, name, mask, progress)
            return Answers([store.answers[key] for key in keys], store.rows.values())

    def _rounds(self, model: Any) -> Iterator[list[_Asked]]:
        """What is asked in one go: everything, and then each attack that changes the model, while it does."""
        if self._together:
            yield self._together
        for attack in self._attacks if self._harm else ():
            if attack.changes_model:
                with attack.on(model, self._encoder.tokenizer, self._harm) as attacked:
                    yield [_Asked(self._harm_task(attack, attacked), attack)]

    def _ask(
        self,
        model: Any,
        asked: Sequence[_Asked],
        store: AnswerStore,
        digest: str,
        name: str,
        mask: AnyMask | None,
        progress: bool,
    ) -> list[str]:
        """Ask what the store does not have; returns the keys of all."""
        questions = questions_of([each.task for each in asked], self._samples)
        attack_of = {id(each.task): each.attack for each in asked}
        contents = {(row.task, row.id): row.content for row in self._stored}
        budgets = budgets_of(model, questions)
        keys = []
        for question, budget in zip(questions, budgets, strict=True):
            kind, row = question.task.kind, str(question.row.id)
            parts = [
                contents[kind, row],
                *(row, kind, digest, None if mask is None else mask.digest),
                *(attack_of[id(question.task)].facts, question.context, self._sampling.facts),
                *(self._seed, budget, question.sample),
            ]
            keys.append(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32])

        def keep(batch: Mapping[int, Completion]) -> None:
            for index, completion in batch.items():
                question = questions[index]
                attack = attack_of[id(question.task)]
                store.add(self._answer(keys[index], question, attack, digest, name, completion))

        ask(
            model,
            self._encoder,
            questions,
            states=keys,
            sampling=self._sampling,
            batch_size=self._batch_size,
            finished={index for index, key in enumerate(keys) if key in store.answers},
            on_batch=keep,
            progress=progress,
        )
        return keys

    def _answer(
        self, key: str, question: Question, attack: Attack, digest: str, mask: str, completion: Completion
    ) -> Answer:
        return Answer(
            key=key,
            row=str(question.row.id),
            task=question.task.kind,
            model=digest,
            mask=mask,
            attack=attack.facts,
            sampling=self._sampling.facts,
            seed=self._seed,
            sample=question.sample,
            prefill=question.row.prefill,
            text=completion.text,
            thought=completion.thought,
            finish=completion.finish,
            new_tokens=completion.new_tokens,
            unanswered=completion.is_unanswered,
        )

    def _begin(self, store: AnswerStore, model: Any, passes: int, progress: bool) -> None:
        """Look at the disk's room, and say how long it may take: at the most, as answers may end before their limit."""
        questions = questions_of([each.task for each in self._together], self._samples)
        if not questions:
            return
        queries = queries_of(model, questions)
        missing = max(0, len(queries) * passes - len(store.answers))
        share = missing / len(queries)
        store.check_room(missing, int(sum(query.budget for query in queries) * share))
        if progress and (text := answering_time(model, queries, batch_size=self._batch_size, share=share)):
            announce(f"answering takes {text}, the unpruned model and {passes - 1} masks")

    def _plain(self) -> list[Attack]:
        return [each for each in (self._attacks if self._harm else ()) if not each.changes_model]

    def _harm_task(self, attack: Attack, rows: list[Row]) -> Task:
        return Task.prepare(f"harm, {attack.label}", "harm", rows, self._encoder, max_new_tokens=self._budgets["harm"])

    def _named(self, kind: str, skill: str | None, rows: Sequence[Row]) -> list[Row]:
        """The rows under the ids that the store knows them by; a row that is there twice is asked once."""
        contents: dict[str, StoredRow] = {}
        named = []
        for index, row in enumerate(rows):
            stored = StoredRow.of(row, kind, skill)
            known = contents.setdefault(stored.id, stored)
            if known.content != stored.content:
                raise ArgumentError(
                    f"{describe_row(kind, index, row)}: expected an id of its own, got that of another row; give ids "
                    "that differ, or none",
                    argument="rows",
                )
            if known is stored:
                named.append(replace(row, id=stored.id))
        self._stored += contents.values()
        return named
