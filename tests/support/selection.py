"""Scores as the engine keeps them, made from dense matrices."""

from __future__ import annotations

import pytest
import torch

from fastprune.planning import list_lengths
from fastprune.scoring.scores import Scores
from fastprune.scoring.top_scores import TopScores, TopScoresCollector

Dense = dict[str, torch.Tensor]


def keep_lists(dense: Dense, fraction: float) -> dict[str, TopScores]:
    """What the engine would keep, small matrices included; with weight -1 the statistic is the score."""
    patch = pytest.MonkeyPatch()
    patch.setattr(list_lengths, "SMALL_MATRIX", 0)
    keeper = TopScoresCollector({name: scores.numel() for name, scores in dense.items()}, fraction, n_lists=2)
    for name in reversed(dense):
        keeper.add({name: (-torch.ones_like(dense[name]), dense[name])}, "signed")
    patch.undo()
    return keeper.finish()


def make_scores(harm: Dense, benign: Dense | None = None, p_max: float = 1.0, q_max: float = 1.0) -> Scores:
    """Two matrices a block."""
    shapes = {name: tuple(scores.shape) for name, scores in harm.items()}
    blocks = {name: position // 2 for position, name in enumerate(harm)}
    provenance = {"model": {"id": "toy", "revision": None, "fingerprint": "f" * 64}, "block_of": blocks}
    lists = {} if benign is None else {"abs": keep_lists(benign, p_max)}
    return Scores({"signed": keep_lists(harm, q_max)}, lists, shapes, provenance, p_max, q_max)


def random_dense(*sizes: int, seed: int = 0) -> Dense:
    generator = torch.Generator().manual_seed(seed)
    return {f"m{i}": torch.randn(10, n // 10, generator=generator) for i, n in enumerate(sizes)}
