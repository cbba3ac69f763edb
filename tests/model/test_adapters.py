"""LoRA around a model: the base weights are scored with the adapters in the forward pass, under their plain names."""

from __future__ import annotations

import contextlib

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.pass_statistics import FP32_ERROR, assert_same_set, engine_statistics, kept, relative_error

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import MaskError, ModelError
from fastprune.model.adapters import unwrap
from fastprune.model.fingerprint import fingerprint
from fastprune.model.identity import identity_of
from fastprune.model.matrices import eligible_matrices
from fastprune.testing.oracle import oracle_score, oracle_select, oracle_statistics

peft = pytest.importorskip("peft")

FP64_ERROR = 2e-6  # the models' norms and rotary tables stay float32
TARGETS = {"Llama": ["q_proj", "v_proj", "up_proj", "down_proj"], "GPT2": ["c_attn", "c_fc"]}


def config(name: str, **changes: object) -> object:
    fan = {"fan_in_fan_out": True} if name == "GPT2" else {}
    settings = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.4, "target_modules": TARGETS[name], **fan}
    return peft.LoraConfig(**{**settings, **changes})


def wrapped(name: str = "Llama", **changes: object):
    """A model with an adapter large enough to matter."""
    model = peft.get_peft_model(build(name), config(name, **changes))
    stir(model)
    return model


def stir(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path:
                parameter.normal_(std=0.3, generator=generator)


def truth(model, rows) -> dict[str, dict[str, torch.Tensor]]:
    """Float64 autograd on the base weights of the whole wrapped model, one example at a time; knows no engine."""
    import copy

    from fastprune.testing.oracle import StayDouble

    model = copy.deepcopy(model).double().eval()
    weights = {path: p for path, p in model.named_parameters() if "base_layer.weight" in path}
    result = {path: {"grad_sum": 0.0, "grad_abs_sum": 0.0, "grad_sq_sum": 0.0} for path in weights}
    for weight in weights.values():
        weight.requires_grad_(True)
    for example in rows:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with StayDouble():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100)
        for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
            result[path]["grad_sum"] += gradient
            result[path]["grad_abs_sum"] += gradient.abs()
            result[path]["grad_sq_sum"] += gradient.square()
    return result


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("segments", [1, 3])
def test_statistics_equal_float64_autograd_through_the_adapter(name: str, segments: int) -> None:
    """Of a float64 model: an adapter this large magnifies float32's roundings differently on every processor."""
    model = wrapped(name).double().train()
    found = engine_statistics(model.get_base_model(), segments=segments, batch_tokens=24, dtype=torch.float64)
    exact = truth(model, HARM)
    assert len(exact) == 4 * len(TARGETS[name]) and all("base_model.model." in path for path in exact)
    for path, statistics in exact.items():
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        for key, value in statistics.items():
            assert relative_error(found[plain][key], value) < FP64_ERROR, (plain, key)
    oracle = oracle_statistics(model, HARM)
    assert set(oracle) == set(found) == {matrix.name for matrix in eligible_matrices(build(name))}
    for plain, statistics in oracle.items():
        for key, value in statistics.items():
            assert relative_error(found[plain][key], value) < FP64_ERROR, (plain, key)


@pytest.mark.parametrize("name", TARGETS)
def test_pruned_sets_and_names(name: str) -> None:
    model = wrapped(name)
    scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)
    plain = fastprune.score(build(name), CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)
    assert scores.names == plain.names and scores.shapes == plain.shapes
    assert scores.provenance["model"]["fingerprint"] == plain.provenance["model"]["fingerprint"]
    assert kept(scores) != kept(plain)  # the adapter is in the forward pass
    exact = {"harm": oracle_statistics(model, HARM), "benign": oracle_statistics(model, BENIGN)}
    weights = build(name)
    dense = [
        {key: oracle_score(weights.get_parameter(key), exact[role][key], criterion) for key in exact[role]}
        for role, criterion in (("harm", "signed"), ("benign", "abs"))
    ]
    mask = scores.select(0.05, 0.01)
    for key, indices in oracle_select(*dense, 0.05, 0.01).items():
        n = dense[0][key].numel()
        assert_same_set(mask[key].tolist(), indices, (dense[0][key], int(0.01 * n)), (dense[1][key], int(0.05 * n)))


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_that_adds_nothing_changes_no_score(name: str) -> None:
    model = peft.get_peft_model(build(name), config(name))  # lora_B starts at zero
    assert kept(fastprune.score(model, CalibrationSet(HARM), progress=False)) == kept(
        fastprune.score(build(name), CalibrationSet(HARM), progress=False)
    )


@pytest.mark.parametrize("name", TARGETS)
def test_masks_fit_both_ways_and_the_checkpoint(name: str, tmp_path) -> None:
    plain, model = build(name), wrapped(name)
    plain.save_pretrained(tmp_path / "plain")
    from_plain = fastprune.score(plain, CalibrationSet(HARM), progress=False).select(None, 0.01)
    from_wrapped = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    assert from_plain.metadata["fingerprint"] == from_wrapped.metadata["fingerprint"]
    key = next(key for key in from_wrapped if key.split(".")[-2] in TARGETS[name])
    inner = model.get_base_model().get_submodule(key.removesuffix(".weight"))
    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    with from_plain.applied(model) as same:
        assert same is model
        assert inner.base_layer.weight.detach().take(from_plain[key]).abs().max() == 0
        assert fastprune.random_mask(model, like=from_plain) == fastprune.random_mask(plain, like=from_plain)
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())
    undo = from_wrapped.apply_(model)
    with from_wrapped.applied(plain):
        assert torch.equal(inner.base_layer.weight, plain.get_parameter(key))
    undo.restore_(model.get_base_model())
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())
    fastprune.patch_checkpoint(tmp_path / "plain", from_wrapped, tmp_path / "pruned")


def test_a_pass_leaves_the_adapter_as_it_was() -> None:
    model = wrapped().train()
    state = {path: (p.requires_grad, p.detach().clone()) for path, p in model.named_parameters()}
    flags = {path: module.training for path, module in model.named_modules()}
    fastprune.score(model, CalibrationSet(HARM), segments=2, progress=False)
    assert {path: module.training for path, module in model.named_modules()} == flags
    for path, p in model.named_parameters():
        assert p.requires_grad == state[path][0] and torch.equal(p, state[path][1])


def test_several_adapters_and_the_inner_model() -> None:
    """Two active adapters add up; one that is not active has no say."""
    model = wrapped()
    model.add_adapter("second", config("Llama", target_modules=["q_proj", "o_proj"]))
    stir(model)
    one = kept(fastprune.score(model, CalibrationSet(HARM), progress=False))
    model.base_model.set_adapter(["default", "second"])
    both = fastprune.score(model, CalibrationSet(HARM), progress=False)
    assert kept(both) != one
    exact = truth(model, HARM)
    found = engine_statistics(model.get_base_model(), segments=2, batch_tokens=24)
    assert any("o_proj" in path for path in exact)
    for path, statistics in exact.items():
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        assert relative_error(found[plain]["grad_abs_sum"], statistics["grad_abs_sum"]) < FP32_ERROR, plain
    assert kept(fastprune.score(model.get_base_model(), CalibrationSet(HARM), progress=False)) == kept(both)
    assert kept(fastprune.score(torch.compile(model), CalibrationSet(HARM), progress=False)) == kept(both)
    with model.disable_adapter():
        alone = kept(fastprune.score(model, CalibrationSet(HARM), progress=False))
    assert alone == kept(fastprune.score(build("Llama"), CalibrationSet(HARM), progress=False))


def test_merged_adapters_are_refused_by_name_and_unloaded_ones_are_plain() -> None:
    model = wrapped()
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    model.merge_adapter()
    message = r"model\.layers\.0\.self_attn\.q_proj has the adapter 'default' merged.*unmerge_adapter"
    with pytest.raises(ModelError, match=message):
        fastprune.score(model, CalibrationSet(HARM), progress=False)
    with pytest.raises(ModelError, match=message):
        mask.apply_(model, strict=False)
    model.unmerge_adapter()
    with mask.applied(model, strict=False):
        pass
    merged = model.merge_and_unload()
    assert fastprune.score(merged, CalibrationSet(HARM), progress=False).select(None, 0.01).keys() == mask.keys()
    with pytest.raises(MaskError, match="fingerprint"):
        mask.apply_(merged)


def test_what_is_no_plain_lora_is_refused_by_name() -> None:
    def refused(message: str, settings: object) -> None:
        model = peft.get_peft_model(build("Llama"), settings)
        with pytest.raises(ModelError, match=message):
            fastprune.score(model, CalibrationSet(HARM), progress=False)

    refused(
        r"layers\.0\.self_attn\.q_proj: its adapter 'default' is a Dora.*merge_and_unload",
        config("Llama", use_dora=True),
    )
    saved = config("Llama", target_modules=["q_proj"], modules_to_save=["up_proj"])
    refused(r"layers\.0\.mlp\.up_proj is replaced by a trained copy", saved)
    ia3 = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    refused(r"layers\.0\.mlp\.down_proj is wrapped by a peft\.tuners\.ia3\S* adapter, expected LoRA", ia3)
    refused(
        "its adapter 'default' is PROMPT_TUNING", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )


def test_lora_outside_the_blocks_and_a_trained_head_are_no_matter() -> None:
    settings = config("Llama", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(build("Llama"), settings)
    stir(model)
    scores = fastprune.score(model, CalibrationSet(HARM), segments=2, progress=False)
    assert scores.names == tuple(matrix.name for matrix in eligible_matrices(build("Llama")))
    weights = {matrix.name: matrix.weight for matrix in eligible_matrices(build("Llama"))}
    assert scores.provenance["model"]["fingerprint"] == fingerprint(weights)


@pytest.mark.parametrize("change", ["disabled", "scaled"])
def test_adapters_that_are_set_otherwise_make_another_identity(change: str) -> None:
    model = wrapped()
    identity = identity_of(unwrap(model))
    assert identity_of(unwrap(model)) == identity
    with contextlib.ExitStack() as stack:
        if change == "scaled":
            model.base_model.model.model.layers[1].mlp.down_proj.set_scale("default", 3.0)
        else:
            stack.enter_context(model.disable_adapter())
        assert identity_of(unwrap(model)) != identity
