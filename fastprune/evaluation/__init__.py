"""From a model to numbers: harm under attack, refusal, utility, recognition, perplexity. It must not know scoring."""

from fastprune.evaluation.attacks import Attack, NoAttack, Prefilling, attack
from fastprune.evaluation.generation import generate
from fastprune.evaluation.judges import Judge, exact_match, keyword_refusal
from fastprune.evaluation.likelihood import Perplexity, perplexity
from fastprune.evaluation.measurement import Measurement
from fastprune.evaluation.metrics import Utility, harm, refusal, utility
from fastprune.evaluation.questions import Recognition, recognition
from fastprune.evaluation.suite import Evaluation, EvaluationSuite, evaluate

__all__ = [
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
