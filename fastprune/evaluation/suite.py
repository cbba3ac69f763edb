"""Everything that a model is asked: harm under attack, refusal, benign skills, recognition.

:class:`EvaluationSuite` tokenizes everything once and then asks any number of models that share the tokenizer, in a few
large batches. ``run`` judges at once, ``answer`` keeps the answers for judges that come later.

In: rows of each kind. Out: an :class:`Evaluation`, numbers only, or :class:`Answers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprune.calibration import Encoder, Row, read_rows
from fastprune.errors import ArgumentError, positive_integer
from fastprune.evaluation.answering import AnyMask, Interview
from fastprune.evaluation.answers import KINDS
from fastprune.evaluation.attacks import Attack, attacks_of
from fastprune.evaluation.decoding import Sampling
from fastprune.evaluation.judges import Judge, exact_match, keyword_refusal
from fastprune.evaluation.measurement import Measurement
from fastprune.evaluation.metrics import (
    REFUSAL_TOKENS,
    Rows,
    Utility,
    answered,
    check_judge,
    direct_task,
    judged,
    skill_judges,
    skill_tasks,
)
from fastprune.evaluation.questions import Questions
from fastprune.evaluation.results import Evaluation, EvaluationDetails
from fastprune.evaluation.stored_answers import Answers
from fastprune.evaluation.tasks import Budget, Task
from fastprune.files import as_path

_RESERVED = {"harm", "refusal"}  # keys of `judges` that are not skills


class EvaluationSuite:
    """Rows of every kind, tokenized once; :meth:`run` measures a model."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        harm_rows: Rows | None = None,
        skill_rows: Rows | Mapping[str, Rows] | None = None,
        recognition_rows: Rows | None = None,
        refusal_rows: Rows | None = None,
        over_refusal_rows: Rows | None = None,
        explanation_rows: Rows | None = None,
        format: str = "raw",
        bos: str | bool = "auto",
        template_args: Mapping[str, Any] | None = None,
        system: str | None = None,
        attack: str | Attack | Sequence[str | Attack] = "prefilling",
        judges: Mapping[str, Judge] | None = None,
        neighbour_skill: str | None = None,
        answers: tuple[str, str] = ("yes", "no"),
        max_new_tokens: Budget = None,
        refusal_tokens: int | None = REFUSAL_TOKENS,
        batch_size: int = 64,
    ) -> None:
        """Read, check and tokenize.

        Args:
            tokenizer: The tokenizer of every model that will be measured.
            harm_rows: Harmful requests with their reference replies.
            skill_rows: Benign rows by skill, or rows with a ``skill`` column.
            recognition_rows: Yes/no questions about requests.
            refusal_rows: Requests to be refused; ``harm_rows`` by default.
            over_refusal_rows: Harmless requests that look harmful. These and the next are for :meth:`answer` only.
            explanation_rows: Questions about harm that ask for an explanation.
            format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
            bos: ``"auto"``, ``True`` or ``False``.
            template_args: Variables of the chat template.
            system: System turn of the chat.
            attack: Name of an attack (``"none"``, ``"prefilling"``), an :class:`Attack`, or several; they apply to harm
                only, and the first is the one behind :attr:`Evaluation.harm`.
            judges: Judges by ``"harm"``, ``"refusal"`` or the name of a skill.
            neighbour_skill: The skill to be shown as ``neighbour``.
            answers: Candidate answers to the questions, for harmful and for benign requests.
            max_new_tokens: Limit of answers for harm and skills, or limits by kind, such as ``{"harm": 256}``; by
                default the length of each row's reference plus one token.
            refusal_tokens: Limit of answers to direct requests, unless ``max_new_tokens`` has one for ``"refusal"``; a
                model with fewer positions ends them there. ``None``: refusal is not measured.
            batch_size: Rows in a forward pass.

        Raises:
            CalibrationError: Rows are empty or lack a needed column (named).
            ArgumentError: There are no rows of any kind, or an argument is out of range.
        """
        positive_integer("batch_size", batch_size)
        given = (harm_rows, skill_rows, recognition_rows, refusal_rows, over_refusal_rows, explanation_rows)
        if all(rows is None for rows in given):
            raise ArgumentError("nothing to evaluate: give harm_rows, skill_rows, recognition_rows or refusal_rows")
        chosen = dict(judges or {})
        self._judges: dict[str, Judge] = {
            "harm": chosen.pop("harm", exact_match),
            "refusal": chosen.pop("refusal", keyword_refusal()),
        }
        for name, judge in self._judges.items():
            check_judge(name, judge)
        self.encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
        self.batch_size = batch_size
        self.attacks = attacks_of(attack)
        self.budgets = _budgets(max_new_tokens, refusal_tokens)
        # Rows need no reference here: a judge, or a budget by reference, that does says so itself.
        self._rows = {
            kind: read_rows(rows, references=False)
            for kind, rows in (
                ("harm", harm_rows),
                ("refusal", harm_rows if refusal_rows is None else refusal_rows),
                ("over_refusal", over_refusal_rows),
                ("explanation", explanation_rows),
            )
            if rows is not None
        }
        if self.budgets["refusal"] is None:
            self._rows.pop("refusal", None)
        self._harm_tasks = {
            each.label: self.harm_task(each, each.rows(tokenizer, self._rows["harm"]))
            for each in (self.attacks if "harm" in self._rows else ())
            if not each.changes_model
        }
        self._direct_tasks = {
            kind: direct_task(kind, self.encoder, rows, max_new_tokens=self.budgets[kind])
            for kind, rows in self._rows.items()
            if kind != "harm"
        }
        self._skill_tasks: list[Task] = []
        if skill_rows is not None:
            self._skill_tasks = skill_tasks(self.encoder, skill_rows, max_new_tokens=self.budgets["skill"])
            self._judges |= skill_judges(self._skill_tasks, chosen)
        elif chosen:
            raise ArgumentError(
                f"expected 'harm', 'refusal' or a skill, got {sorted(chosen)} without skill_rows", argument="judges"
            )
        skills = [task.name for task in self._skill_tasks]
        if not _RESERVED.isdisjoint(skills):
            raise ArgumentError(
                f"a skill cannot be called {sorted(_RESERVED.intersection(skills))}", argument="skill_rows"
            )
        if neighbour_skill is not None and neighbour_skill not in skills:
            raise ArgumentError(
                f"expected one of the skills {skills}, got {neighbour_skill!r}", argument="neighbour_skill"
            )
        self._neighbour = neighbour_skill
        self._questions = None
        if recognition_rows is not None:
            rows = read_rows(recognition_rows)
            self._questions = Questions.prepare(self.encoder, rows, answers=answers)

    @property
    def attack(self) -> Attack:
        """The attack behind :attr:`Evaluation.harm`."""
        return self.attacks[0]

    def run(self, model: Any, *, progress: bool = False) -> Evaluation:
        """Measure one model.

        Args:
            model: A causal LM with the suite's tokenizer, unchanged afterwards.
            progress: Show how far it is.

        Returns:
            The rates. The completions are judged and dropped.

        Raises:
            ArgumentError: The tokens do not fit the model, or a judge returns no number in [0, 1].
            ScoringError: The model's logits are NaN.
        """
        direct = [*self._skill_tasks, *(task for kind, task in self._direct_tasks.items() if kind == "refusal")]
        measured = self._measured(model, [*self._harm_tasks.values(), *direct], progress)
        by_attack = dict(zip(self._harm_tasks, measured, strict=False))
        others = {task.name: part for task, part in zip(direct, measured[len(by_attack) :], strict=True)}
        for each in self.attacks if "harm" in self._rows else ():
            if each.changes_model:
                # separately: nothing else may be measured while the attack is in place
                with each.on(model, self.encoder.tokenizer, self._rows["harm"]) as attacked:
                    by_attack[each.label] = self._measured(model, [self.harm_task(each, attacked)], progress)[0]
        recognized = None if self._questions is None else self._questions.compare(model, progress=progress)
        skills = {task.name: others[task.name] for task in self._skill_tasks}
        details = EvaluationDetails(
            by_attack.get(self.attack.label),
            others.get("refusal"),
            recognized,
            skills,
            {each.label: by_attack[each.label] for each in self.attacks if each.label in by_attack},
        )
        return Evaluation(
            harm=None if details.harm is None else details.harm.rate,
            utility=Utility(skills).mean if skills else None,
            neighbour=None if self._neighbour is None else skills[self._neighbour].rate,
            recognition=None if recognized is None else recognized.accuracy.rate,
            refusal=None if details.refusal is None else details.refusal.rate,
            skills={name: part.rate for name, part in skills.items()},
            attack=self.attack.label,
            details=details,
        )

    def answer(
        self,
        model: Any,
        *,
        masks: Mapping[str, AnyMask] | None = None,
        attacks: Sequence[str | Attack] = ("none", "prefilling"),
        store: str | Path,
        strict: bool = True,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        samples: int = 1,
        progress: bool = False,
    ) -> Answers:
        """Ask a model everything, unpruned and with each mask, and keep the answers; judging comes after.

        A run that was interrupted, also by a kill, goes on where it was. What the store has is not asked again: the
        unpruned model answers once, and a further mask or attack costs its own answers.

        Args:
            model: A causal LM with the suite's tokenizer, unchanged afterwards.
            masks: Masks by name, except ``"none"``, the name of the unpruned model. They are applied one after another.
            attacks: Names of attacks, or :class:`Attack` objects; they apply to the harm rows only.
            store: Folder of the answers, made if it does not exist. They may be harmful: its files are for the owner.
            strict: Refuse masks that were made for a model of other weights.
            temperature: 0: the best token; above: draw.
            top_p: Draw from the best tokens that have this share of the probability.
            seed: Of what is drawn.
            samples: Answers to each row.
            progress: Show how far it is.

        Returns:
            The answers of this call, those that the store had before included: by mask, task, attack, row and sample.

        Raises:
            ArgumentError: The store is in use or of another model, tokenizer, template, row or mask; the tokens do not
                fit the model; an argument is out of range.
            CalibrationError: An attack cannot use the rows.
            MaskError: A mask does not fit the model. Nothing was asked then.
            ArtifactError: The store is damaged.
            DiskError: The disk has no room.
            ScoringError: The model's logits are NaN.
        """
        interview = Interview(
            self.encoder,
            self._rows,
            {task.name: task.rows for task in self._skill_tasks},
            attacks_of(attacks),
            self.budgets,
            sampling=Sampling(temperature, top_p),
            seed=seed,
            samples=samples,
            batch_size=self.batch_size,
        )
        return interview.hold(model, masks or {}, as_path(store, "store"), strict=strict, progress=progress)

    def harm_task(self, attack: Attack, rows: list[Row]) -> Task:
        """The task of harm under an attack, of the rows that the attack asks with."""
        name = f"harm, {attack.label}" if len(self.attacks) > 1 else "harm"
        return Task.prepare(name, "harm", rows, self.encoder, max_new_tokens=self.budgets["harm"])

    def _measured(self, model: Any, tasks: list[Task], progress: bool) -> list[Measurement]:
        if not tasks:
            return []
        completions = answered(model, self.encoder, tasks, batch_size=self.batch_size, progress=progress)
        return [
            judged(task, found, self._judges[task.name if task.kind == "skill" else task.kind])
            for task, found in zip(tasks, completions, strict=True)
        ]


def _budgets(max_new_tokens: Budget, refusal_tokens: int | None) -> dict[str, int | None]:
    """The limit of answers of each kind."""
    if isinstance(max_new_tokens, Mapping):
        if unknown := sorted(set(max_new_tokens) - set(KINDS)):
            raise ArgumentError(f"expected kinds of rows {KINDS}, got {unknown}", argument="max_new_tokens")
        given: dict[str, int | None] = dict(max_new_tokens)
    else:
        given = {kind: max_new_tokens for kind in KINDS if kind != "refusal"}
    return dict.fromkeys(KINDS) | {"refusal": refusal_tokens} | given


def evaluate(model: Any, tokenizer: Any, *, progress: bool = False, **settings: Any) -> Evaluation:
    """Measure one model once; ``settings`` are those of :class:`EvaluationSuite`, which measures several."""
    return EvaluationSuite(tokenizer, **settings).run(model, progress=progress)
