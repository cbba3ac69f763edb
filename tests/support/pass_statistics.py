"""Sums and selections of the pass, and how closely they have to agree with the oracle's."""

from __future__ import annotations

import torch

from fastprune.calibration import CalibrationSet
from fastprune.model.block_view import BlockView
from fastprune.model.frozen import frozen_eval
from fastprune.model.matrices import decoder_blocks
from fastprune.model.self_check import checked_view
from fastprune.model.weights import Resident
from fastprune.planning.segments import split_blocks
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.engine import Pass
from fastprune.scoring.journal import NullJournal
from fastprune.scoring.processes import Processes
from support.architectures import HARM

STATISTICS = ("grad_sum", "grad_abs_sum", "grad_sq_sum", "act_sq_sum")


# Norm-wise relative error of float32 statistics per matrix. Forward and backward of a few blocks carry some tens of
# roundings of 6e-8 each; the rotary tables and norms of the models add as much again.
FP32_ERROR = 1e-5


class _Statistics(dict):
    """A sink that keeps the statistics of each matrix by its name."""

    def add(self, role, final):
        for matrix, statistics in final.items():
            self[matrix.name] = {name: value.clone() for name, value in statistics.items()}

    def add_losses(self, role, losses):
        pass


def engine_statistics(model, *, segments: int, batch_tokens: int, dtype=torch.float32, rows=HARM):
    """Statistics of the engine itself, before any score is formed."""
    kept = _Statistics()
    weights, hidden = Resident(model), ActivationStore("device", torch.device("cpu"))
    with frozen_eval(model):
        parts = split_blocks(len(decoder_blocks(model)[1]), segments)
        view = checked_view(weights, parts, segments)
        assert isinstance(view, BlockView)
        loaders, wanted = {"harm": CalibrationSet(rows).loader(batch_tokens)}, {"harm": STATISTICS}
        stores = {"boundaries": hidden, "gradients": hidden, "processes": Processes()}
        Pass(view, weights, loaders, wanted, parts, dtype=dtype, progress=False, **stores).run(kept, NullJournal())
    return kept


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return float((value.double() - exact.view_as(value)).norm() / exact.norm())


def assert_same_set(found: list[int], exact: list[int], *scored: tuple[torch.Tensor, int]) -> None:
    """Equal, except for weights within 1e-5 (relative) of one of the thresholds of the exact scores."""
    for index in set(found) ^ set(exact):
        near = []
        for score, k in scored:
            flat = score.flatten()
            threshold = float(flat.topk(k).values[-1])
            near.append(abs(float(flat[index]) - threshold) <= 1e-5 * abs(threshold))
        assert any(near), f"weight {index} is on one side only and not near a threshold"


def kept(scores) -> dict[str, tuple[list[int], list[float]]]:
    return {name: (scores.harm[name].indices.tolist(), scores.harm[name].values.tolist()) for name in scores.names}
