"""What overflows float16 is called that, with the first block where it did; NaN keeps its own words."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from support.architectures import HARM, build, stateful
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import FastpruneWarning, ScoringError

FORWARD = r"harm example \d \(id row-\d\): its activations overflowed float16 in {}, first of all; run the model in bfl"


def hot(block: int, dtype: torch.dtype = torch.float16) -> nn.Module:
    """The MLP of one block gives up to a million; all weights are finite."""
    model = build("Llama", dtype=dtype)
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            getattr(model.model.layers[block].mlp, name).weight.mul_(2000.0)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    return model


def score(model: nn.Module | Path, **options: object) -> fastprune.Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastpruneWarning)
        return fastprune.score(model, CalibrationSet(HARM), progress=False, **options)


@pytest.mark.parametrize("segments", [1, 2, 4])
@pytest.mark.parametrize("block", [0, 2, 3])
def test_an_overflow_names_the_first_block(block: int, segments: int) -> None:
    """Regression: only a loss of NaN was reported, and the weights were blamed."""
    model = hot(block)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ScoringError, match=FORWARD.format(f"block {block}")):
        score(model, segments=segments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_way_out_works(dtype: torch.dtype) -> None:
    assert score(hot(2, dtype)).harm


def test_of_a_checkpoint_folder(tmp_path: Path) -> None:
    hot(1).save_pretrained(tmp_path)
    with pytest.raises(ScoringError, match=FORWARD.format("block 1")):
        score(tmp_path, segments=4)
    assert score(tmp_path, segments=4, dtype="bfloat16").harm


def test_of_a_model_that_runs_whole() -> None:
    with pytest.raises(ScoringError, match=FORWARD.format("block 2")):
        score(stateful(hot(2)))


@pytest.mark.parametrize("segments", [1, 4])
def test_where_inputs_alone_are_summed(segments: int) -> None:
    """Regression: infinite inputs went into the sums of squares, to be found as NaN in some score, or not at all."""
    with pytest.raises(ScoringError, match=FORWARD.format("block 3")):
        score(hot(3), segments=segments, harm="wanda")


def test_in_the_head() -> None:
    model = build("Llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.fill_(30000.0)
    with pytest.raises(ScoringError, match=FORWARD.format("the final norm or the head")):
        score(model)


@pytest.mark.parametrize("segments", [1, 4])
def test_of_a_gradient(segments: int) -> None:
    model = build("Llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight.mul_(5000.0)
    message = (
        r"the gradient that reached block 3 \(model\.layers\.3\.\S+\) overflowed float16; run the model in bfloat16"
    )
    with pytest.raises(ScoringError, match=message):
        score(model, segments=segments)
    assert score(model.bfloat16(), segments=segments).harm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.mlp.down_proj", "norm"])
def test_weights_that_are_not_finite_are_no_overflow(where: str, dtype: torch.dtype) -> None:
    model = build("Llama", dtype=dtype)
    with torch.no_grad():
        model.model.get_submodule(where).weight[...] = float("nan")
    with pytest.raises(ScoringError, match="its loss is nan; the model gives its response no finite probability"):
        score(model)
    if where == "norm":  # behind the last input
        return
    with pytest.raises(ScoringError, match=r"what leaves block \d is not finite \(look at the weights for NaN"):
        score(model, harm="wanda", segments=4)
