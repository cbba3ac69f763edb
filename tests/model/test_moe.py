"""Mixtures of experts: statistics and pruned sets against the float64 oracle, and what experts alone can get wrong."""

from __future__ import annotations

import functools
import sys

import pytest
import torch
import transformers
from support.architectures import BENIGN, HARM, MOE_CONFIGS, Twice, build, examples, pad, slow_except
from support.model_state import assert_unchanged, state_of
from support.pass_statistics import FP32_ERROR, STATISTICS, assert_same_set, engine_statistics, kept, relative_error
from torch import nn
from transformers.integrations import moe

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError
from fastprune.experiments import heat_map
from fastprune.model import experts
from fastprune.model.block_view import BlockView
from fastprune.model.fingerprint import fingerprint
from fastprune.model.hooks import Capture
from fastprune.model.matrices import eligible_matrices
from fastprune.testing.oracle import oracle_score, oracle_select, oracle_statistics

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


@functools.cache
def truth(name: str) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The oracle's statistics of both sets, computed once an architecture."""
    return {"harm": oracle_statistics(build(name), HARM), "benign": oracle_statistics(build(name), BENIGN)}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {matrix.name: matrix.weight for matrix in eligible_matrices(model)}


def assert_near(found: dict, exact: dict) -> None:
    """Every statistic norm-wise, and exactly zero where no token was."""
    assert set(found) == set(exact)
    for name, statistics in exact.items():
        for key in STATISTICS:
            if not statistics[key].any():
                assert not found[name][key].any(), (name, key)
            else:
                assert relative_error(found[name][key], statistics[key]) < FP32_ERROR, (name, key)


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("batch_tokens", [1, 24, 4096])
@pytest.mark.parametrize("name", slow_except(MOE_CONFIGS, "Mixtral", "GptOss"))
def test_statistics_equal_the_oracle(name: str, batch_tokens: int, segments: int) -> None:
    found = engine_statistics(build(name), segments=segments, batch_tokens=batch_tokens)
    assert_near(found, truth(name)["harm"])


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_every_expert_is_a_matrix_in_the_order_of_the_model(name: str) -> None:
    model = build(name)
    matrices = eligible_matrices(model)
    parameters = dict(model.named_parameters())
    places = list(parameters)
    order = [places.index(matrix.name.split("[")[0]) for matrix in matrices]
    ranks = [(place, matrix.expert or 0) for place, matrix in zip(order, matrices, strict=True)]
    assert ranks == sorted(ranks)
    for matrix in matrices:
        if matrix.expert is None:
            continue
        fused = parameters[matrix.name.split("[")[0]]
        assert matrix.name.endswith(f"[{matrix.expert}]")
        assert matrix.input_major == (name == "GptOss")
        assert matrix.weight.data_ptr() == fused[matrix.expert].data_ptr() and not matrix.weight.requires_grad
        assert matrix.weight.shape == fused.shape[1:]
    scored = {places[place] for place in order}
    left_out = {place.split(".", 3)[-1] for place in places if ".layers." in place} - {
        place.split(".", 3)[-1] for place in scored
    }
    routers = {"mlp.gate.weight", "mlp.router.weight", "mlp.shared_expert_gate.weight"}
    routers_and_biases = {*routers, "mlp.router.bias", "self_attn.sinks"}
    for place in left_out:
        assert place in routers_and_biases or "norm" in place or place.endswith("bias"), place
    assert not routers & {place.split(".", 3)[-1] for place in scored}


def test_a_weight_is_looked_up_in_its_module_each_time() -> None:
    """A streamed block's parameters are replaced while its matrices are in use."""
    model = build("Mixtral")
    matrix = next(matrix for matrix in eligible_matrices(model) if matrix.expert == 2)
    replaced = nn.Parameter(torch.ones_like(matrix.parameter), requires_grad=False)
    setattr(matrix.module, matrix.attribute, replaced)
    assert matrix.parameter is replaced and matrix.weight.data_ptr() == replaced[2].data_ptr()


CRITERIA = ("signed", "abs", "fisher", "wanda")


@pytest.mark.parametrize("name", slow_except(MOE_CONFIGS, "Mixtral", "GptOss"))
def test_pruned_sets_equal_the_oracle(name: str) -> None:
    model = build(name)
    scores = fastprune.score(
        model, [pad(HARM, "left")], [pad(BENIGN, "right")], harm=CRITERIA, benign="abs", segments=2, progress=False
    )
    weights = weights_of(model)
    benign = {key: oracle_score(weights[key], truth(name)["benign"][key], "abs") for key in weights}
    for criterion in CRITERIA:
        harm = {key: oracle_score(weights[key], truth(name)["harm"][key], criterion) for key in weights}
        for p, q in ((0.05, 0.01), (None, 0.02), (0.2, 0.1)):
            mask = scores.select(p, q, harm=criterion)
            for key, indices in oracle_select(harm, benign, p, q).items():
                n = weights[key].numel()
                scored = [(harm[key], int(q * n))] + ([(benign[key], int(p * n))] if p is not None else [])
                assert_same_set(mask[key].tolist(), indices, *scored)


@pytest.mark.parametrize("name", slow_except(MOE_CONFIGS, "Qwen2Moe", "GptOss"))
def test_segments_and_padding_side_give_the_same_bits(name: str) -> None:
    # Three experts a token, which the model's own loop adds in another order: the forward sweep must not use that.
    model = build(name, num_experts_per_tok=3)
    model.set_experts_implementation("eager")
    reference = kept(fastprune.score(model, [pad(HARM, "right")], harm="abs", progress=False))
    for segments in (1, 2, 3):
        scores = fastprune.score(model, [pad(HARM, "left")], harm="abs", segments=segments, progress=False)
        assert kept(scores) == reference


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_each_implementation_of_the_user_works_and_comes_back(name: str, implementation: str) -> None:
    model = build(name)
    reference = kept(fastprune.score(model, CalibrationSet(HARM), progress=False))
    model.set_experts_implementation(implementation)
    before, registered = state_of(model), list(moe.ALL_EXPERTS_FUNCTIONS)
    assert kept(fastprune.score(model, CalibrationSet(HARM), segments=2, progress=False)) == reference
    assert_unchanged(model, before)
    assert model.config._experts_implementation == implementation
    assert list(moe.ALL_EXPERTS_FUNCTIONS) == registered and not experts._watchers


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_an_exception_inside_an_expert_leaves_everything_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = build("Mixtral")
    model.set_experts_implementation("batched_mm")
    before, registered = state_of(model), list(moe.ALL_EXPERTS_FUNCTIONS)
    # Past the self-check, so that nothing but the pass itself is there to clean up.
    monkeypatch.setattr(
        sys.modules["fastprune.scoring.run"],
        "checked_view",
        lambda weights, *_: BlockView(weights.anatomy, weights.device),
    )
    real, calls = experts._product, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 20:
            raise error
        return real(*args)

    monkeypatch.setattr(experts, "_product", interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        fastprune.score(model, CalibrationSet(HARM), progress=False)
    assert len(calls) == 20
    assert_unchanged(model, before)
    assert model.config._experts_implementation == "batched_mm"
    assert list(moe.ALL_EXPERTS_FUNCTIONS) == registered and not experts._watchers


def test_an_expert_that_no_token_reaches_has_zero_statistics() -> None:
    model = build("GptOss", num_local_experts=12)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.router.bias[[0, 7, 11]] = -1e4
    found = engine_statistics(model, segments=2, batch_tokens=4096)
    assert_near(found, oracle_statistics(model, HARM))
    for name, statistics in found.items():
        if name.endswith(("[0]", "[7]", "[11]")):
            assert not any(statistics[key].any() for key in STATISTICS), name
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    assert mask.total > 0
    assert not any(len(mask[name]) for name in found if name.endswith(("[0]", "[7]", "[11]")))


def test_padding_in_an_experts_tokens_is_left_out_of_the_inputs() -> None:
    """One long and many short rows: most of what reaches an expert is padding."""
    rows = examples([(20, 4), *[(1, 1)] * 5], seed=3)
    model = build("Olmoe")
    assert_near(engine_statistics(model, segments=1, batch_tokens=4096, rows=rows), oracle_statistics(model, rows))


class _Bypassed(nn.Module):
    """Multiplies by the fused weights of an experts module without calling it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.experts.down_proj.mean(0) @ self.experts.down_proj.mean(0).T


def test_experts_that_are_bypassed_are_an_error() -> None:
    model = build("Mixtral")
    model.model.layers[1].mlp = _Bypassed(model.model.layers[1].mlp.experts)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj\[0\].*without its module"):
        fastprune.score(model, CalibrationSet(HARM), segments=1, progress=False)


def test_experts_used_twice_are_refused_for_per_example_statistics_only() -> None:
    model = build("Mixtral")
    model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.mlp\.experts\.gate_up_proj\[0\] is used 2 times"):
        fastprune.score(model, CalibrationSet(HARM), harm="abs", segments=1, progress=False)
    # The self-check asks for per-example statistics of the first experts module only.
    scores = fastprune.score(model, CalibrationSet(HARM), progress=False)
    weights, exact = weights_of(model), oracle_statistics(model, HARM)
    dense = {name: oracle_score(weights[name], exact[name], "signed") for name in exact}
    for name, indices in oracle_select(dense, None, None, 0.01).items():
        assert_same_set(
            scores.select(None, 0.01)[name].tolist(), indices, (dense[name], int(0.01 * dense[name].numel()))
        )


def test_an_input_changed_in_place_is_refused() -> None:
    model = build("Mixtral")
    module = model.model.layers[1].mlp.experts
    # What the gate returns is the input of down_proj; autograd does not save it, so it does not see the change.
    real, given = module._apply_gate, []

    def apply_gate(product: torch.Tensor) -> torch.Tensor:
        given.append(1.0 * real(product))
        return given[-1]

    module._apply_gate = apply_gate

    def scale(*_: object) -> None:
        for state in given:
            state.detach().mul_(2.0)

    model.model.layers[1].mlp.register_forward_hook(scale)
    with pytest.raises(
        ModelError, match=r"input of model\.layers\.1\.mlp\.experts\.down_proj\[\d\] was changed in place"
    ):
        fastprune.score(model, CalibrationSet(HARM), segments=1, progress=False)


def test_experts_whose_gradient_is_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits and the gradient of every Linear are right: the self-check has to look at an expert to see it."""
    real = Capture.product

    def halved(self, module, name, expert, x, y, tokens):
        real(self, module, name, expert, 0.5 * x, y, tokens)

    monkeypatch.setattr(Capture, "product", halved)
    with pytest.raises(ModelError, match=r"gradient of model\.layers\.0\.mlp\.experts\.gate_up_proj\[\d\] differs"):
        fastprune.score(build("Mixtral"), CalibrationSet(HARM), segments=2, progress=False)


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_bfloat16_models_run_and_have_the_fingerprint_of_float32(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    mask = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False).select(0.05, 0.01)
    assert mask.total > 0
    assert fingerprint(weights_of(model)) == fingerprint(weights_of(build(name)))
    # Made on the bfloat16 model, it fits the float32 one; experts alone do not make two models alike.
    with mask.applied(build(name)):
        pass
    other = build(name)
    with torch.no_grad():
        next(m for m in eligible_matrices(other) if m.expert == 1).weight.mul_(2.0)
    with pytest.raises(fastprune.FastpruneError, match="fingerprint"):
        mask.apply_(other)


@pytest.mark.parametrize("name", ["DeepseekV3", "GptOss"])
def test_masks_scores_and_controls_of_experts(name: str, tmp_path) -> None:
    model = build(name)
    scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)
    scores.save(tmp_path / "scores.safetensors")
    assert kept(fastprune.Scores.load(tmp_path / "scores.safetensors")) == kept(scores)
    mask = scores.select(0.05, 0.01)
    assert mask.counts["model.layers.1.mlp.experts.down_proj[1]"] > 0
    mask.save(tmp_path / "mask.safetensors")
    assert fastprune.PruneMask.load(tmp_path / "mask.safetensors") == mask
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for control in (mask, fastprune.random_mask(model, mask), fastprune.random_mask(model, mask, match="magnitude")):
        assert control.counts == mask.counts
        with control.applied(model):
            changed = sum(int((tensor != before[key]).sum()) for key, tensor in model.state_dict().items())
            assert changed == control.total
            for key, indices in control.items():
                assert not weights_of(model)[key].reshape(-1)[indices].any(), key
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    by_layer = scores.select(0.05, 0.01, layers=[2], scope="global")
    assert {key.split(".")[2] for key, indices in by_layer.items() if len(indices)} == {"2"}
    chart = heat_map(name, mask, scores.provenance["block_of"])
    assert sum(map(sum, chart["counts"])) == mask.total
    assert sum(map(sum, chart["sizes"])) == sum(weight.numel() for weight in weights_of(model).values())
    assert "experts.down_proj" in chart["matrices"] and not any("[" in kind for kind in chart["matrices"])


@pytest.mark.parametrize("name", MOE_CONFIGS)
def test_planning_counts_the_experts_that_a_token_passes(name: str) -> None:
    model = build(name)
    config = getattr(transformers, f"{name}Config")(**MOE_CONFIGS[name])
    planned = fastprune.plan(config, 10, 20, segments=1)
    resident = fastprune.plan(model, 10, 20, segments=1)
    assert (planned.flops, planned.activation_bytes) == (resident.flops, resident.activation_bytes)
    matrices = eligible_matrices(model)
    assert planned.eligible == sum(matrix.weight.numel() for matrix in matrices)
    passed = sum(
        matrix.weight.numel() * (1 if matrix.expert is None else 2 / len(matrix.parameter)) for matrix in matrices
    )
    assert planned.flops == pytest.approx(2 * 3 * 200 * passed)  # forward, dX, dW
