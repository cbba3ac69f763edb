"""Losses and gradients that are not finite: the error names example and block, the model stays as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.architectures import HARM, build, stateful
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import FastpruneWarning, ScoringError


@pytest.fixture
def model() -> nn.Module:
    return build("Llama")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_the_example(model: nn.Module, poison: float) -> None:
    token = HARM[2].input_ids[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = poison
    owners = [index for index, example in enumerate(HARM) if token in example.input_ids]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ScoringError, match=rf"harm example ({'|'.join(map(str, owners))}) \(id row-"):
        fastprune.score(model, CalibrationSet(HARM).loader(1), progress=False, segments=2)
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(), model.state_dict()[name].nan_to_num())


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, row):
        ctx.row = row
        return hidden.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[ctx.row] = float("nan")
        return gradient, None


def test_gradient_that_is_not_finite_names_example_and_block(model: nn.Module) -> None:
    culprit = max(range(len(HARM)), key=lambda index: len(HARM[index]))

    def poison(module, args, output):
        rows, tokens = output.shape[:2]
        return _PoisonGradient.apply(output, rows - 1) if tokens > 6 else output  # not in the self-check's six tokens

    handle = model.model.layers[1].register_forward_hook(poison)
    try:
        with pytest.raises(ScoringError, match=rf"harm example {culprit} \(id row-{culprit}\).*block 1"):
            fastprune.score(model, CalibrationSet(HARM), progress=False)
    finally:
        handle.remove()


@pytest.mark.parametrize("segments", [1, 3])
def test_gradient_that_is_not_finite_inside_an_expert_names_example_and_block(segments: int) -> None:
    """The expert saw few of the tokens: looked at is the next matrix below it that saw them all."""
    model = build("Mixtral")
    module = model.model.layers[1].mlp.experts
    real = module._apply_gate
    # More tokens than the self-check has; row 0 is a token of the first example that the expert was given.
    module._apply_gate = lambda product: _PoisonGradient.apply(real(product), 0) if len(product) > 12 else real(product)
    with pytest.raises(ScoringError, match=r"harm example \d+ .*block 1 \(model\.layers\.1\.self_attn\.o_proj"):
        fastprune.score(model, CalibrationSet(HARM), harm="abs", segments=segments, progress=False)


@pytest.mark.parametrize("whole, segments", [(False, 1), (False, 4), (True, 1)])
def test_gradient_that_is_not_finite_in_the_last_place_that_is_looked_at(model, whole, segments) -> None:
    """Inside the lowest block, behind the one matrix of it that is checked: only the block's input shows it."""
    model = stateful(model) if whole else model
    attention = getattr(model.model.layers[0], "block", model.model.layers[0]).self_attn

    def poison(module, args, output):
        return _PoisonGradient.apply(output, 0) if output.shape[1] > 6 else output

    handle = attention.q_proj.register_forward_hook(poison, prepend=True)
    try:
        with warnings.catch_warnings(), pytest.raises(ScoringError, match=r"harm example \d+ .*input of block 0"):
            warnings.simplefilter("ignore", FastpruneWarning)
            fastprune.score(model, CalibrationSet(HARM), segments=segments, progress=False)
    finally:
        handle.remove()
