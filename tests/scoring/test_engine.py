"""The one pass against the float64 oracle: statistics, pruned sets, and everything that must not change them."""

from __future__ import annotations

import functools

import pytest
import torch
from support.architectures import BENIGN, CONFIGS, HARM, build, examples, pad, slow_except
from support.statistics import FP32_ERROR, assert_same_set, engine_statistics, kept, relative_error

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.model.block_view import BlockView, tokens_per_chunk
from fastprune.planning.segments import split_blocks
from fastprune.testing.oracle import oracle_score, oracle_select, oracle_statistics


@functools.cache
def truth(name: str, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The oracle's statistics of both sets, computed once an architecture."""
    model = build(name, dtype=dtype)
    return {"harm": oracle_statistics(model, HARM), "benign": oracle_statistics(model, BENIGN)}


def test_the_head_takes_tokens_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles of a GPU's products, and never none."""
    assert [tokens_per_chunk(n, on_gpu=True) for n in (128_256, 1 << 20, 1 << 40)] == [1024, 128, 1]
    assert [tokens_per_chunk(n, on_gpu=False) for n in (128_256, 300_000)] == [256, 111]
    whole = engine_statistics(build("Gemma2"), segments=2, batch_tokens=24)
    monkeypatch.setattr("fastprune.model.block_view.tokens_per_chunk", lambda vocabulary, on_gpu: 3)
    for name, statistics in engine_statistics(build("Gemma2"), segments=2, batch_tokens=24).items():
        for key, value in statistics.items():
            assert relative_error(value, whole[name][key].double()) < FP32_ERROR


def test_hidden_states_may_have_any_strides() -> None:
    plain, turned = build("Llama"), build("Llama")
    turned.model.layers[-1].register_forward_hook(lambda module, args, out: out.mT.contiguous().mT)
    expected = engine_statistics(plain, segments=2, batch_tokens=24)
    for name, statistics in engine_statistics(turned, segments=2, batch_tokens=24).items():
        for key, value in statistics.items():
            assert relative_error(value, expected[name][key].double()) < FP32_ERROR


@pytest.mark.parametrize("segments", [1, 3, 4])
@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_equal_the_oracle(name: str, segments: int) -> None:
    found = engine_statistics(build(name), segments=segments, batch_tokens=24)
    exact = truth(name)["harm"]
    assert list(found) and set(found) == set(exact)
    for matrix, statistics in exact.items():
        for key, value in statistics.items():
            assert relative_error(found[matrix][key], value) < FP32_ERROR, (matrix, key)


def test_float64_statistics_of_a_float64_model_are_exact_to_the_models_own_upcasts() -> None:
    found = engine_statistics(build("Llama", dtype=torch.float64), segments=2, batch_tokens=24, dtype=torch.float64)
    for matrix, statistics in truth("Llama", torch.float64)["harm"].items():
        for key, value in statistics.items():
            assert found[matrix][key].dtype == torch.float64
            assert relative_error(found[matrix][key], value) < 2e-6, (
                matrix,
                key,
            )  # norms and rotary tables stay float32


def test_float64_accumulation_of_a_float32_model() -> None:
    found = engine_statistics(build("Llama"), segments=1, batch_tokens=24, dtype=torch.float64)
    for matrix, statistics in truth("Llama")["harm"].items():
        assert found[matrix]["grad_abs_sum"].dtype == torch.float64
        assert relative_error(found[matrix]["grad_abs_sum"], statistics["grad_abs_sum"]) < FP32_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_have_float32_statistics_near_the_oracle(dtype: torch.dtype) -> None:
    found = engine_statistics(build("Llama", dtype=dtype), segments=2, batch_tokens=24)
    exact = truth("Llama", dtype)["harm"]
    # Activations and dX are rounded to 8 (11) bits in every block; sums of such errors stay within a few units of eps.
    bound = 24 * torch.finfo(dtype).eps
    for matrix, statistics in exact.items():
        assert found[matrix]["grad_abs_sum"].dtype == torch.float32
        assert relative_error(found[matrix]["grad_abs_sum"], statistics["grad_abs_sum"]) < bound, matrix


HARM_CRITERIA = ("signed", "signed_reverse", "abs_of_sum", "fisher", "wanda", "magnitude")
BENIGN_CRITERIA = ("abs", "abs_of_sum", "fisher", "wanda")


@pytest.mark.parametrize("name", slow_except(CONFIGS, "Llama", "GPT2", "Gemma2"))
def test_pruned_sets_equal_the_oracle_for_every_criterion(name: str) -> None:
    model = build(name)
    scores = fastprune.score(
        model,
        [pad(HARM, "left")],
        [pad(BENIGN, "right")],
        harm=HARM_CRITERIA,
        benign=BENIGN_CRITERIA,
        segments=2,
        progress=False,
    )
    exact = truth(name)
    for harm_name in HARM_CRITERIA:
        for benign_name in BENIGN_CRITERIA if harm_name == "signed" else ("abs",):
            dense = [
                {key: oracle_score(model.get_parameter(key), exact[role][key], criterion) for key in exact[role]}
                for role, criterion in (("harm", harm_name), ("benign", benign_name))
            ]
            for p, q in ((0.05, 0.01), (None, 0.02), (0.2, 0.1)):
                mask = scores.select(p, q, harm=harm_name, benign=benign_name)
                pruned = oracle_select(dense[0], dense[1], p, q)
                for key, indices in pruned.items():
                    n = dense[0][key].numel()
                    scored = [(dense[0][key], int(q * n))] + ([(dense[1][key], int(p * n))] if p is not None else [])
                    assert_same_set(mask[key].tolist(), indices, *scored)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_global_scope_equals_the_oracle(name: str) -> None:
    model = build(name)
    scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), q_max=0.2, p_max=0.2, progress=False)
    exact = truth(name)
    keys = list(exact["harm"])
    harm, benign = (
        torch.cat([oracle_score(model.get_parameter(key), exact[role][key], criterion).flatten() for key in keys])
        for role, criterion in (("harm", "signed"), ("benign", "abs"))
    )
    offsets = dict(
        zip(
            keys,
            torch.tensor([0, *[model.get_parameter(key).numel() for key in keys]]).cumsum(0).tolist(),
            strict=False,
        )
    )
    for p, q in ((0.05, 0.01), (None, 0.1), (0.2, 0.2)):
        mask = scores.select(p, q, scope="global")
        found = sorted(offsets[key] + index for key in keys for index in mask[key].tolist())
        chosen = oracle_select({"all": harm}, {"all": benign}, p, q)["all"]
        n = harm.numel()
        assert_same_set(found, chosen, (harm, int(q * n)), *([(benign, int(p * n))] if p is not None else []))


def test_segments_give_the_same_bits() -> None:
    model = build("Qwen3")
    results = [
        fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), segments=segments, progress=False)
        for segments in (1, 2, 3, 4)
    ]
    for other in results[1:]:
        assert kept(other) == kept(results[0])
        assert other.select(0.05, 0.01) == results[0].select(0.05, 0.01)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT"])
def test_padding_side_missing_mask_and_order_of_examples_give_the_same_bits(name: str) -> None:
    model = build(name)
    same_length = examples([(4, 5)] * 4, seed=5)
    reference = kept(fastprune.score(model, [pad(HARM, "right")], progress=False))
    assert kept(fastprune.score(model, [pad(HARM, "left")], progress=False)) == reference
    assert kept(fastprune.score(model, [pad(HARM[::-1], "left")], progress=False)) == reference
    assert kept(fastprune.score(model, iter([pad([row], "left") for row in HARM]), progress=False)) == reference
    unmasked = fastprune.score(model, [pad(same_length, "right", with_mask=False)], progress=False)
    assert kept(unmasked) == kept(fastprune.score(model, CalibrationSet(same_length), progress=False))


def test_micro_batching_does_not_change_the_pruned_set() -> None:
    model = build("Llama")
    masks = [
        fastprune.score(
            model, CalibrationSet(HARM).loader(tokens), CalibrationSet(BENIGN).loader(tokens), progress=False
        ).select(0.05, 0.01)
        for tokens in (1, 20, 4096)
    ]
    exact = truth("Llama")
    for name in masks[0]:
        for mask in masks[1:]:
            score = oracle_score(build("Llama").get_parameter(name), exact["harm"][name], "signed")
            benign = oracle_score(build("Llama").get_parameter(name), exact["benign"][name], "abs")
            n = score.numel()
            assert_same_set(
                mask[name].tolist(), masks[0][name].tolist(), (score, int(0.01 * n)), (benign, int(0.05 * n))
            )


def test_forward_only_criteria_need_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Llama")
    expected = kept(fastprune.score(model, CalibrationSet(HARM), harm=("wanda", "signed"), progress=False))
    view_losses = BlockView.losses_and_gradient
    calls = []
    monkeypatch.setattr(
        BlockView, "losses_and_gradient", lambda self, *args: calls.append(1) or view_losses(self, *args)
    )
    assert kept(fastprune.score(model, CalibrationSet(HARM), harm="wanda", progress=False)) == expected
    assert len(calls) == 1  # the self-check's


def test_train_mode_frozen_parameters_and_checkpointing_make_no_difference() -> None:
    model = build("Llama", attention_dropout=0.5)
    reference = kept(fastprune.score(model, CalibrationSet(HARM), progress=False))
    model.train()
    model.requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert kept(fastprune.score(model, CalibrationSet(HARM), progress=False)) == reference


def test_compiled_models_are_unwrapped() -> None:
    model = build("Llama")
    reference = kept(fastprune.score(model, CalibrationSet(HARM), progress=False))
    assert kept(fastprune.score(torch.compile(model), CalibrationSet(HARM), progress=False)) == reference


@pytest.mark.parametrize(("blocks", "segments"), [(1, 1), (5, 1), (5, 2), (5, 5), (32, 7)])
def test_split_blocks_covers_all_blocks_evenly(blocks: int, segments: int) -> None:
    parts = split_blocks(blocks, segments)
    assert [index for part in parts for index in part] == list(range(blocks))
    assert len(parts) == segments
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
