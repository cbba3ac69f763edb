"""From a model to numbers: harm under attack, refusal, utility, recognition, perplexity.

The names below are imported when they are first used: listing attacks and judges loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastprune.evaluation.attacks import ATTACKS, Attack, NoAttack, Prefilling, attack
    from fastprune.evaluation.generation import generate
    from fastprune.evaluation.judges import JUDGES, Judge, exact_match, keyword_refusal
    from fastprune.evaluation.likelihood import Perplexity, perplexity
    from fastprune.evaluation.measurement import Measurement
    from fastprune.evaluation.metrics import Utility, harm, refusal, utility
    from fastprune.evaluation.questions import Recognition, recognition
    from fastprune.evaluation.suite import Evaluation, EvaluationSuite, evaluate

_HOME = {
    "ATTACKS": "attacks",
    "Attack": "attacks",
    "NoAttack": "attacks",
    "Prefilling": "attacks",
    "attack": "attacks",
    "generate": "generation",
    "JUDGES": "judges",
    "Judge": "judges",
    "exact_match": "judges",
    "keyword_refusal": "judges",
    "Perplexity": "likelihood",
    "perplexity": "likelihood",
    "Measurement": "measurement",
    "Utility": "metrics",
    "harm": "metrics",
    "refusal": "metrics",
    "utility": "metrics",
    "Recognition": "questions",
    "recognition": "questions",
    "Evaluation": "suite",
    "EvaluationSuite": "suite",
    "evaluate": "suite",
}

__all__ = [
    "ATTACKS",
    "JUDGES",
    "Attack",
    "Evaluation",
    "EvaluationSuite",
    "Judge",
    "Measurement",
    "NoAttack",
    "Perplexity",
    "Prefilling",
    "Recognition",
    "Utility",
    "attack",
    "evaluate",
    "exact_match",
    "generate",
    "harm",
    "keyword_refusal",
    "perplexity",
    "recognition",
    "refusal",
    "utility",
]


def __getattr__(name: str) -> object:
    """Import an exported name from the file it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
