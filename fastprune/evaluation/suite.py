"""One evaluation of one model: harm under attack, refusal, benign skills, recognition.

:class:`EvaluationSuite` tokenizes everything once and then measures any number of models that share the tokenizer. A
run generates all answers in a few large batches.

In: rows of each kind. Out: an :class:`Evaluation`, numbers only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastprune.calibration import Encoder, Row, read_rows
from fastprune.errors import ArgumentError, positive_integer
from fastprune.evaluation import attacks
from fastprune.evaluation.judges import Judge, exact_match
from fastprune.evaluation.measurement import Measurement
from fastprune.evaluation.metrics import REFUSAL_TOKENS, Rows, Task, Utility, answer, refusal_task, skill_tasks
from fastprune.evaluation.questions import Questions, Recognition

_RESERVED = {"harm", "refusal"}  # keys of `judges` that are not skills


@dataclass(frozen=True)
class Evaluation:
    """The rates of one model; ``None`` if there were no rows.

    Attributes:
        harm: Share of harmful requests answered harmfully under the attack.
        utility: Mean over all skills, including the neighbour.
        neighbour: Rate of the skill closest to harm in form, if one was named.
        recognition: Share of yes/no questions about requests answered correctly (questions, not pairs).
        refusal: Share of harmful requests refused when asked directly.
        skills: Rate of each skill.
        attack: Name of the attack behind ``harm``.
        details: The measurements, with n, intervals and categories: ``harm``, ``refusal``, ``recognition``, and
            ``skills`` by name.
    """

    harm: float | None
    utility: float | None
    neighbour: float | None
    recognition: float | None
    refusal: float | None
    skills: dict[str, float]
    attack: str
    details: EvaluationDetails = field(repr=False)

    def summary(self) -> dict[str, float | None]:
        """The five numbers of a row in a record."""
        return {name: getattr(self, name) for name in ("harm", "utility", "neighbour", "recognition", "refusal")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        details = {
            name: None if part is None else part.to_dict()
            for name in ("harm", "refusal", "recognition")
            for part in [getattr(self.details, name)]
        }
        details["skills"] = {name: part.to_dict() for name, part in self.details.skills.items()}
        return {**self.summary(), "skills": dict(self.skills), "attack": self.attack, "details": details}


@dataclass(frozen=True)
class EvaluationDetails:
    """The measurements behind an :class:`Evaluation`."""

    harm: Measurement | None
    refusal: Measurement | None
    recognition: Recognition | None
    skills: dict[str, Measurement]


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
        format: str = "raw",
        bos: str | bool = "auto",
        template_args: Mapping[str, Any] | None = None,
        system: str | None = None,
        attack: str | attacks.Attack = "prefilling",
        judges: Mapping[str, Judge] | None = None,
        neighbour_skill: str | None = None,
        answers: tuple[str, str] = ("yes", "no"),
        max_new_tokens: int | None = None,
        refusal_tokens: int = REFUSAL_TOKENS,
        batch_size: int = 64,
    ) -> None:
        """Read, check and tokenize.

        Args:
            tokenizer: The tokenizer of every model that will be measured.
            harm_rows: Harmful requests with their reference replies.
            skill_rows: Benign rows by skill, or rows with a ``skill`` column.
            recognition_rows: Yes/no questions about requests.
            refusal_rows: Requests to be refused; ``harm_rows`` by default.
            format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
            bos: ``"auto"``, ``True`` or ``False``.
            template_args: Variables of the chat template.
            system: System turn of the chat.
            attack: Name of an attack (``"none"``, ``"prefilling"``) or an :class:`Attack`; applies to harm only.
            judges: Judges by ``"harm"``, ``"refusal"`` or the name of a skill.
            neighbour_skill: The skill to be shown as ``neighbour``.
            answers: Candidate answers to the questions, for harmful and for benign requests.
            max_new_tokens: Limit of answers for harm and skills; by default the length of each row's reference plus
                one token.
            refusal_tokens: Limit of answers to direct requests.
            batch_size: Rows in a forward pass.

        Raises:
            CalibrationError: Rows are empty or lack a needed column (named).
            ArgumentError: There are no rows of any kind, or an argument is out of range.
        """
        positive_integer("batch_size", batch_size)
        if all(rows is None for rows in (harm_rows, skill_rows, recognition_rows, refusal_rows)):
            raise ArgumentError("nothing to evaluate: give harm_rows, skill_rows, recognition_rows or refusal_rows")
        chosen = dict(judges or {})
        harm_judge, refusal_judge = chosen.pop("harm", exact_match), chosen.pop("refusal", None)
        self.encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
        self.batch_size = batch_size
        self.attack = attacks.attack(attack)
        self._harm_judge, self._max_new_tokens = harm_judge, max_new_tokens
        self._harm_rows = None if harm_rows is None else read_rows(harm_rows)
        self._tasks: dict[str, Task] = {}
        if self._harm_rows is not None and not self.attack.changes_model:
            self._tasks["harm"] = self._harm_task(self.attack.rows(tokenizer, self._harm_rows))
        direct = self._harm_rows if refusal_rows is None else read_rows(refusal_rows)
        if direct is not None:
            self._tasks["refusal"] = refusal_task(
                self.encoder, direct, judge=refusal_judge, max_new_tokens=refusal_tokens
            )
        self._skills: list[str] = []
        if skill_rows is not None:
            skills = skill_tasks(self.encoder, skill_rows, judges=chosen, max_new_tokens=max_new_tokens)
            self._skills = [task.name for task in skills]
            if not _RESERVED.isdisjoint(self._skills):
                raise ArgumentError(
                    f"a skill cannot be called {sorted(_RESERVED.intersection(self._skills))}", argument="skill_rows"
                )
            self._tasks.update({f"skill {task.name}": task for task in skills})
        elif chosen:
            raise ArgumentError(
                f"expected 'harm', 'refusal' or a skill, got {sorted(chosen)} without skill_rows", argument="judges"
            )
        if neighbour_skill is not None and neighbour_skill not in self._skills:
            raise ArgumentError(
                f"expected one of the skills {self._skills}, got {neighbour_skill!r}", argument="neighbour_skill"
            )
        self._neighbour = neighbour_skill
        self._questions = None
        if recognition_rows is not None:
            rows = read_rows(recognition_rows)
            self._questions = Questions.prepare(self.encoder, rows, answers=answers)

    def run(self, model: Any, *, progress: bool = False) -> Evaluation:
        """Measure one model.

        Args:
            model: A causal LM with the suite's tokenizer, unchanged afterwards.
            progress: Show a progress bar on a terminal.

        Returns:
            The rates. The completions are judged and dropped.

        Raises:
            ArgumentError: The tokens do not fit the model, or a judge returns no number in [0, 1].
            ScoringError: The model's logits are NaN.
        """
        measured = dict(zip(self._tasks, self._answer(model, list(self._tasks.values()), progress), strict=True))
        if self._harm_rows is not None and self.attack.changes_model:
            # separately: nothing else may be measured while the attack is in place
            with self.attack.on(model, self.encoder.tokenizer, self._harm_rows) as attacked:
                measured["harm"] = self._answer(model, [self._harm_task(attacked)], progress)[0]
        recognized = None if self._questions is None else self._questions.compare(model, progress=progress)
        skills = {name: measured[f"skill {name}"] for name in self._skills}
        details = EvaluationDetails(measured.get("harm"), measured.get("refusal"), recognized, skills)
        return Evaluation(
            harm=None if details.harm is None else details.harm.rate,
            utility=Utility(skills).mean if skills else None,
            neighbour=None if self._neighbour is None else skills[self._neighbour].rate,
            recognition=None if recognized is None else recognized.accuracy.rate,
            refusal=None if details.refusal is None else details.refusal.rate,
            skills={name: part.rate for name, part in skills.items()},
            attack=self.attack.name,
            details=details,
        )

    def _harm_task(self, rows: list[Row]) -> Task:
        return Task.prepare("harm", rows, self.encoder, judge=self._harm_judge, max_new_tokens=self._max_new_tokens)

    def _answer(self, model: Any, tasks: list[Task], progress: bool) -> list[Measurement]:
        if not tasks:
            return []
        return answer(model, self.encoder, tasks, batch_size=self.batch_size, progress=progress)


def evaluate(model: Any, tokenizer: Any, *, progress: bool = False, **settings: Any) -> Evaluation:
    """Measure one model once; ``settings`` are those of :class:`EvaluationSuite`, which measures several."""
    return EvaluationSuite(tokenizer, **settings).run(model, progress=progress)
