"""The two algorithms that fastprune is measured against, written as fairly as their idea allows.

``replay``: what the published code does, one replay of the model for each decoder block at batch size 1, with gradients
asked of that block's weights only. ``naive``: one pass, batch size 1, gradients of all weights by autograd, absolute
value and sum. Both sum in float32 in place, free an example's gradients at once, and end with the same kept lists as
fastprune (``torch.topk`` on dense scores). Neither pads, so neither wastes work on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from fastprune.calibration import Example
from fastprune.model.matrices import Matrix, eligible_matrices

TopScores = dict[str, tuple[torch.Tensor, torch.Tensor]]
NOT_TIMED = nullcontext()


def example_loss(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """Mean cross-entropy over the scored tokens of one example."""
    ids = torch.tensor([example.input_ids], device=model.device)
    labels = torch.tensor(example.labels, device=model.device)
    scored = labels[1:] != -100
    positions = scored.nonzero()[:, 0]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels[1:][scored])


def _totals(
    model: torch.nn.Module,
    matrices: Sequence[Matrix],
    examples: Sequence[Example],
    add: Callable,
    per_example: AbstractContextManager,
) -> list[torch.Tensor]:
    weights = [matrix.module.weight for matrix in matrices]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with per_example:
            for example in examples:
                for total, gradient in zip(
                    totals, torch.autograd.grad(example_loss(model, example), weights), strict=True
                ):
                    add(total, gradient)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return totals


def _top(matrices: Sequence[Matrix], totals: Sequence[torch.Tensor], score: Callable, fraction: float) -> TopScores:
    kept = {}
    for matrix, total in zip(matrices, totals, strict=True):
        dense = score(matrix.weight.float(), total).flatten()
        values, indices = dense.topk(max(math.ceil(fraction * dense.numel()), min(dense.numel(), 16_384)))
        kept[matrix.name] = (indices, values)
    return kept


def _both_sets(
    model: torch.nn.Module,
    matrices: list[Matrix],
    harm: list[Example],
    benign: list[Example],
    per_example: AbstractContextManager,
) -> list[TopScores]:
    """One set after the other: next to a large model, a GPU has memory for one set of float32 sums, not for two."""
    sets = (
        (harm, lambda total, gradient: total.add_(gradient), lambda w, g: -w * g),
        (benign, lambda total, gradient: total.add_(gradient.abs_()), lambda w, g: w.abs() * g),
    )
    return [
        _top(matrices, _totals(model, matrices, examples, add, per_example), score, 1e-3)
        for examples, add, score in sets
    ]


def naive(
    model: torch.nn.Module,
    harm: list[Example],
    benign: list[Example],
    per_example: AbstractContextManager = NOT_TIMED,
) -> list[TopScores]:
    """One pass at batch size 1; gradients of every eligible weight. The part for each example is in ``per_example``."""
    model.requires_grad_(False)
    return _both_sets(model, eligible_matrices(model), harm, benign, per_example)


def replay(
    model: torch.nn.Module,
    harm: list[Example],
    benign: list[Example],
    n_replays: int | None = None,
    per_example: AbstractContextManager = NOT_TIMED,
) -> list[TopScores]:
    """One replay of the model for each decoder block, or for ``n_replays`` of them, at batch size 1.

    A replay goes back to its block and no further, so those few lie evenly between the first and the last block.
    """
    model.requires_grad_(False)
    matrices = eligible_matrices(model)
    n_blocks = max(matrix.block for matrix in matrices) + 1
    n_replays = n_blocks if n_replays is None else n_replays
    kept: list[TopScores] = [{}, {}]
    for block in ((2 * i + 1) * n_blocks // (2 * n_replays) for i in range(n_replays)):
        of_block = [matrix for matrix in matrices if matrix.block == block]
        for whole, part in zip(kept, _both_sets(model, of_block, harm, benign, per_example), strict=True):
            whole.update(part)
    return kept
