"""From a model to numbers: harm under attack, refusal, utility, recognition, perplexity.

The names below are imported when they are first used: listing attacks and judges loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastprune import lazily

__all__ = [
    "ATTACKS",
    "JUDGES",
    "Answer",
    "Answers",
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
    "generate_rows",
    "harm",
    "keyword_refusal",
    "perplexity",
    "recognition",
    "refusal",
    "utility",
]

if TYPE_CHECKING:
    from fastprune.evaluation.answers import Answer
    from fastprune.evaluation.attacks import ATTACKS, Attack, NoAttack, Prefilling, attack
    from fastprune.evaluation.generated_rows import generate_rows
    from fastprune.evaluation.generation import generate
    from fastprune.evaluation.judges import JUDGES, Judge, exact_match, keyword_refusal
    from fastprune.evaluation.likelihood import Perplexity, perplexity
    from fastprune.evaluation.measurement import Measurement
    from fastprune.evaluation.metrics import Utility, harm, refusal, utility
    from fastprune.evaluation.questions import Recognition, recognition
    from fastprune.evaluation.results import Evaluation
    from fastprune.evaluation.stored_answers import Answers
    from fastprune.evaluation.suite import EvaluationSuite, evaluate
else:
    _HOME = {
        "Answer": "fastprune.evaluation.answers",
        "Answers": "fastprune.evaluation.stored_answers",
        "ATTACKS": "fastprune.evaluation.attacks",
        "Attack": "fastprune.evaluation.attacks",
        "NoAttack": "fastprune.evaluation.attacks",
        "Prefilling": "fastprune.evaluation.attacks",
        "attack": "fastprune.evaluation.attacks",
        "generate_rows": "fastprune.evaluation.generated_rows",
        "generate": "fastprune.evaluation.generation",
        "JUDGES": "fastprune.evaluation.judges",
        "Judge": "fastprune.evaluation.judges",
        "exact_match": "fastprune.evaluation.judges",
        "keyword_refusal": "fastprune.evaluation.judges",
        "Perplexity": "fastprune.evaluation.likelihood",
        "perplexity": "fastprune.evaluation.likelihood",
        "Measurement": "fastprune.evaluation.measurement",
        "Utility": "fastprune.evaluation.metrics",
        "harm": "fastprune.evaluation.metrics",
        "refusal": "fastprune.evaluation.metrics",
        "utility": "fastprune.evaluation.metrics",
        "Recognition": "fastprune.evaluation.questions",
        "recognition": "fastprune.evaluation.questions",
        "Evaluation": "fastprune.evaluation.results",
        "EvaluationSuite": "fastprune.evaluation.suite",
        "evaluate": "fastprune.evaluation.suite",
    }
    __getattr__, __dir__ = lazily(__name__, _HOME)
