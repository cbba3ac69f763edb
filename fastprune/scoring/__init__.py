"""From calibration data to the best-scored weights of every matrix. It must not know how weights are removed."""

from fastprune.scoring.plan import Plan, plan
from fastprune.scoring.score import score
from fastprune.scoring.scores import Scores

__all__ = ["Plan", "Scores", "plan", "score"]
