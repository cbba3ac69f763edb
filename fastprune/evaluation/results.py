"""What one evaluation of one model says: rates, and the measurements behind them.

In: measurements. Out: :class:`Evaluation`, numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastprune.evaluation.measurement import Measurement
from fastprune.evaluation.questions import Recognition


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
        attack: Label of the attack behind ``harm``.
        details: The measurements, with n, intervals and categories: ``harm``, ``refusal``, ``recognition``,
            ``skills`` by name, and ``attacks``, which is harm under every attack by label.
    """

    harm: float | None
    utility: float | None
    neighbour: float | None
    recognition: float | None
    refusal: float | None
    skills: dict[str, float]
    attack: str
    details: EvaluationDetails = field(repr=False)

    @property
    def attacks(self) -> dict[str, Measurement]:
        """Harm under every attack, by the attack's label."""
        return self.details.attacks

    def summary(self) -> dict[str, float | None]:
        """The five numbers of a row in a record."""
        return {name: getattr(self, name) for name in ("harm", "utility", "neighbour", "recognition", "refusal")}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        details: dict[str, Any] = {
            name: None if part is None else part.to_dict()
            for name in ("harm", "refusal", "recognition")
            for part in [getattr(self.details, name)]
        }
        for name in ("skills", "attacks"):
            details[name] = {key: part.to_dict() for key, part in getattr(self.details, name).items()}
        return {**self.summary(), "skills": dict(self.skills), "attack": self.attack, "details": details}


@dataclass(frozen=True)
class EvaluationDetails:
    """The measurements behind an :class:`Evaluation`."""

    harm: Measurement | None
    refusal: Measurement | None
    recognition: Recognition | None
    skills: dict[str, Measurement]
    attacks: dict[str, Measurement] = field(default_factory=dict)
