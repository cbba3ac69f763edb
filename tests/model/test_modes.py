"""How a model happens to be set up (training, checkpointing, compiled, tied) changes no bit of its scores.

Neither do the caller's modes (gradients off, autocast). What a user has hooked into the model is a part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.architectures import BENIGN, CONFIGS, HARM, build
from support.pass_statistics import FP32_ERROR, engine_statistics, kept, relative_error
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import FastpruneWarning, ModelError
from fastprune.testing.oracle import oracle_statistics

DROPOUT = {
    "GPT2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "OPT": {"dropout": 0.5, "attention_dropout": 0.5},
    "GPTNeoX": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "Phi3": {"resid_pdrop": 0.5, "attention_dropout": 0.5},
}


def scored(model: nn.Module, **options: object) -> dict:
    return kept(fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False, **options))


@pytest.mark.parametrize("name", CONFIGS)
def test_train_mode_with_dropout_gives_the_same_bits(name: str) -> None:
    reference = scored(build(name))
    model = build(name, **DROPOUT.get(name, {"attention_dropout": 0.5})).train()
    assert scored(model, segments=2) == reference
    assert all(module.training for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT", "Gemma2"])
def test_gradient_checkpointing_is_off_while_scoring_and_on_again_after(name: str, reentrant: bool) -> None:
    """Hooks would fire twice in a block that is computed again in the backward pass."""
    reference = scored(build(name))
    model = build(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.config.use_cache = False
    flags = {path: getattr(module, "gradient_checkpointing", None) for path, module in model.named_modules()}
    assert sum(map(bool, flags.values())) >= 4
    calls = []
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            genuine = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = lambda *args, genuine=genuine: calls.append(1) or genuine(*args)
    for segments in (1, 3):
        assert scored(model, segments=segments) == reference
    assert not calls
    assert {p: getattr(module, "gradient_checkpointing", None) for p, module in model.named_modules()} == flags
    model(torch.tensor([[3, 4, 5]]))
    assert calls  # the model itself still uses it


@pytest.mark.parametrize("how", ["wrapped", "in place", "each block in place"])
def test_compiled_models(how: str) -> None:
    reference = scored(build("Llama"))
    model = plain = build("Llama")
    match how:
        case "wrapped":
            model = torch.compile(plain)
        case "in place":
            plain.compile()
        case "each block in place":
            for block in plain.model.layers:
                block.compile()
    assert scored(model, segments=2) == reference
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
    with mask.applied(model):
        key = next(name for name, indices in mask.items() if len(indices))
        assert plain.get_parameter(key).take(mask[key]).abs().max() == 0
        assert fastprune.random_mask(model, like=mask).keys() == mask.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in plain.named_parameters())


MODES: dict[str, Callable] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_callers_modes_make_no_difference(mode: str, tmp_path) -> None:
    reference, model = scored(build("Llama")), build("Llama")
    model.save_pretrained(tmp_path / "model")
    with MODES[mode]():
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert scored(model) == reference
        assert scored(model, segments=3) == reference
        assert scored(tmp_path / "model", segments=2) == reference
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        assert after == modes


def test_a_model_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = build("Llama")
    with pytest.raises(
        ModelError, match=r"q_proj\.weight was made under torch\.inference_mode|embed_tokens\.weight was"
    ):
        fastprune.score(model, CalibrationSet(HARM), progress=False)


def test_a_forward_under_autocast_is_refused() -> None:
    """As ``Accelerator(mixed_precision="bf16").prepare`` wraps it."""
    model = build("Llama")
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    with (
        pytest.warns(FastpruneWarning, match="scored whole"),
        pytest.raises(ModelError, match=r"was given torch\.float32 and returned torch\.bfloat16, as under autocast"),
    ):
        fastprune.score(model, CalibrationSet(HARM), progress=False)


def _ablate(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """Projects a direction out of what a matrix returns."""
    direction = torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)
    direction = direction / direction.norm()
    return output - (output @ direction)[..., None] * direction


def _double_in_place(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    output.mul_(2.0)


@pytest.mark.parametrize("hook", [_ablate, _double_in_place])
@pytest.mark.parametrize("segments", [1, 3])
def test_hooks_of_the_user_are_a_part_of_the_model(hook: Callable, segments: int) -> None:
    model = build("Llama")
    mlp = model.model.layers[1].mlp
    mlp.down_proj.register_forward_hook(hook)
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    found, exact = engine_statistics(model, segments=segments, batch_tokens=24), oracle_statistics(model, HARM)
    for matrix, statistics in exact.items():
        for key, value in statistics.items():
            assert relative_error(found[matrix][key], value) < FP32_ERROR, (matrix, key)


class _Scaled(nn.Linear):
    """A Linear that does more than multiply."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("place", [(0, "down_proj"), (3, "up_proj")])
def test_a_linear_that_does_more_than_multiply_is_refused(place: tuple[int, str]) -> None:
    model = build("Llama")
    block, name = place
    model.model.layers[block].mlp.get_submodule(name).__class__ = _Scaled
    with pytest.raises(ModelError, match=rf"layers\.{block}\.mlp\.{name}\.weight does not multiply .* \(1 such\)"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["Gemma2", "GPT2", "OPT"])
def test_a_head_tied_to_the_embedding(name: str, tmp_path) -> None:
    """It is not scored, it is stored once, and what goes through it reaches the blocks as in any model."""
    model = build(name, tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    found, exact = engine_statistics(model, segments=2, batch_tokens=24), oracle_statistics(model, HARM)
    assert set(found) == set(exact) and not any("head" in key or "embed" in key or "wte" in key for key in found)
    for matrix, statistics in exact.items():
        for key, value in statistics.items():
            assert relative_error(found[matrix][key], value) < FP32_ERROR, (matrix, key)
    model.save_pretrained(tmp_path / "model")
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    assert mask == fastprune.score(tmp_path / "model", CalibrationSet(HARM), progress=False).select(None, 0.01)
    fastprune.patch_checkpoint(tmp_path / "model", mask, tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned")
    with mask.applied(model), torch.no_grad():
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(loaded(ids).logits, model(ids).logits)
