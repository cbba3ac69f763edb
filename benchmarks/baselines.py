"""The two algorithms that fastprune is measured against, written as fairly as their idea allows.

``replay``: what the published code does, one replay of the model for each decoder block at batch size 1, with gradients
asked of that block's weights only. ``naive``: one pass, batch size 1, gradients of all weights by autograd, absolute
value and sum. Both sum in float32 in place, free each gradient at once, and end with the same kept lists as fastprune
(``torch.topk`` on dense scores). Neither pads, so neither wastes work on padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fastprune.calibration import Example
from fastprune.model.eligible import Matrix, eligible_matrices

Kept = dict[str, tuple[torch.Tensor, torch.Tensor]]


def example_loss(model: torch.nn.Module, example: Example) -> torch.Tensor:
    """Mean cross-entropy over the scored tokens of one example."""
    ids = torch.tensor([example.input_ids], device=model.device)
    labels = torch.tensor(example.labels, device=model.device)
    scored = labels[1:] != -100
    positions = scored.nonzero()[:, 0]
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), labels[1:][scored])


def _accumulate(
    model: torch.nn.Module, matrices: Sequence[Matrix], examples: Sequence[Example], add: Callable
) -> dict[str, torch.Tensor]:
    weights = [matrix.module.weight for matrix in matrices]
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for example in examples:
            for total, gradient in zip(totals, torch.autograd.grad(example_loss(model, example), weights), strict=True):
                add(total, gradient)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {matrix.name: total for matrix, total in zip(matrices, totals, strict=True)}


def _top(matrices: Sequence[Matrix], totals: dict[str, torch.Tensor], score: Callable, fraction: float) -> Kept:
    kept = {}
    for matrix in matrices:
        dense = score(matrix.weight.float(), totals[matrix.name]).flatten()
        values, indices = dense.topk(max(math.ceil(fraction * dense.numel()), min(dense.numel(), 16_384)))
        kept[matrix.name] = (indices, values)
    return kept


def _both_sets(
    model: torch.nn.Module, matrices: list[Matrix], harm: list[Example], benign: list[Example]
) -> list[Kept]:
    signed = _accumulate(model, matrices, harm, lambda total, gradient: total.add_(gradient))
    absolute = _accumulate(model, matrices, benign, lambda total, gradient: total.add_(gradient.abs_()))
    return [
        _top(matrices, signed, lambda w, g: -w * g, 1e-3),
        _top(matrices, absolute, lambda w, g: w.abs() * g, 1e-3),
    ]


def naive(model: torch.nn.Module, harm: list[Example], benign: list[Example]) -> list[Kept]:
    """One pass at batch size 1; gradients of every eligible weight."""
    model.requires_grad_(False)
    return _both_sets(model, eligible_matrices(model), harm, benign)


def replay(model: torch.nn.Module, harm: list[Example], benign: list[Example], blocks: int | None = None) -> list[Kept]:
    """One replay of the model for each of the first ``blocks`` decoder blocks (all by default), batch size 1."""
    model.requires_grad_(False)
    matrices = eligible_matrices(model)
    n_blocks = max(matrix.block for matrix in matrices) + 1
    kept: list[Kept] = [{}, {}]
    for block in range(n_blocks if blocks is None else blocks):
        parts = _both_sets(model, [matrix for matrix in matrices if matrix.block == block], harm, benign)
        for whole, part in zip(kept, parts, strict=True):
            whole.update(part)
    return kept
