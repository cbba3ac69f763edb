"""Linears without weights, as pruning whole features leaves them: nothing is scored in them, and nothing fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastprune
from fastprune.masking.controls import largest_magnitude_mask
from fastprune.ops.criteria import CRITERIA

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SCORED = {f"model.layers.{block}.self_attn.{name}_proj.weight" for block in (0, 1) for name in "qkvo"}


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def narrow() -> LlamaForCausalLM:
    """No layer has features between its up and its down projection."""
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=0))


@pytest.mark.parametrize("criterion", ["signed", "fisher", "wanda", "magnitude"])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_matrix_of_no_weights_is_left_out(narrow, segments: int, criterion: str) -> None:
    scores = fastprune.score(narrow, [batch(0)], [batch(1)], harm=criterion, segments=segments, progress=False)
    for scope in ("matrix", "global"):
        assert set(scores.select(p=0.05, q=0.05, scope=scope)) == SCORED


def test_others_have_the_scores_that_they_have_without_it(narrow) -> None:
    """What an MLP without features gives is its bias, here none: a layer whose MLP adds 0 is the same model."""

    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    one = fastprune.score(narrow, [batch(0)], [batch(1)], progress=False).select(p=0.05, q=0.05)
    for block in narrow.model.layers:
        block.mlp = Nothing()
    assert one == fastprune.score(narrow, [batch(0)], [batch(1)], progress=False).select(p=0.05, q=0.05)


def test_one_narrow_layer_among_others(model) -> None:
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (nn.Linear(*sizes, bias=False) for sizes in ((16, 0), (16, 0), (0, 16)))
    mask = fastprune.score(model, [batch(0)], [batch(1)], progress=False).select(p=0.05, q=0.05)
    assert set(mask) == SCORED | {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}


def test_masks_controls_plans_and_files(narrow, tmp_path: Path) -> None:
    narrow.save_pretrained(tmp_path / "in")
    scores = fastprune.score(narrow, [batch(0)], [batch(1)], progress=False)
    mask = scores.select(p=0.05, q=0.05)
    streamed = fastprune.score(tmp_path / "in", [batch(0)], [batch(1)], segments=2, progress=False)
    assert streamed.select(p=0.05, q=0.05) == mask
    before = {name: weight.clone() for name, weight in narrow.state_dict().items()}
    for control in (fastprune.random_mask(narrow, mask), largest_magnitude_mask(narrow, mask)):
        assert control.counts == mask.counts
        with control.applied(narrow):
            pass
    assert all(torch.equal(weight, before[name]) for name, weight in narrow.state_dict().items())
    assert f"{sum(weight.numel() for weight in before.values()):,} parameters" in str(fastprune.plan(narrow, 4, 30))
    fastprune.patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    with mask.applied(narrow):
        assert all(torch.equal(weight, patched[name]) for name, weight in narrow.state_dict().items())


def test_a_mask_may_name_a_matrix_of_no_weights(narrow, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    mask = fastprune.PruneMask({name: torch.tensor([], dtype=torch.int64)}, {name: (0, 16)})
    assert fastprune.PruneMask.load(mask.save(tmp_path / "mask.safetensors")) == mask
    mask.apply_(narrow).restore_(narrow)
    assert fastprune.random_mask(narrow, mask) == mask == mask & mask


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (0,)], ids=str)
@pytest.mark.parametrize("criterion", fastprune.ops.CRITERIA)
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_operations_on_no_weights(backend: str, criterion: str, shape: tuple[int, ...]) -> None:
    if fastprune.ops.available_backends()[backend] != "available":
        pytest.skip("the C++ extension was not built")
    weight = torch.zeros(shape)
    indices, values = fastprune.ops.top_scores(
        weight, None if CRITERIA[criterion].statistic is None else torch.zeros(shape), criterion, 3, backend=backend
    )
    assert indices.shape == values.shape == (0,) and indices.dtype == torch.int64
    none = torch.tensor([], dtype=torch.int64)
    old = fastprune.ops.apply_sparse_(weight, none, 0.5, backend=backend)
    fastprune.ops.restore_sparse_(weight, none, old, backend=backend)
