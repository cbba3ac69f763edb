"""Bad input to ``score``: a clear error, and a model that is the same as before to the last bit and flag."""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
import torch
from support.architectures import BENIGN, HARM, VOCAB, Twice, build, pad, stateful
from support.model_state import assert_unchanged, state_of
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet, Example
from fastprune.errors import ArgumentError, CalibrationError, FastpruneError, FastpruneWarning, ModelError
from fastprune.scoring import engine


@pytest.fixture
def model() -> nn.Module:
    model = build("Llama").train()
    model.config.use_cache = True
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    model.model.layers[2].eval()
    return model


def test_a_pass_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before = state_of(model)
    fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), segments=2, progress=False)
    assert_unchanged(model, before)


def broken(**changes: object) -> list[dict[str, torch.Tensor]]:
    batch = pad(HARM, "right")
    batch.update(changes)
    return [{key: value for key, value in batch.items() if value is not None}]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], CalibrationError, "harm_loader"),
        (broken(labels=None), CalibrationError, "labels"),
        (broken(labels=torch.full((2, 3), -100)), CalibrationError, r"\(2, 3\)"),
        (broken(labels=torch.full_like(pad(HARM, "right")["labels"], -100)), CalibrationError, "scored"),
        (broken(input_ids=pad(HARM, "right")["input_ids"] + VOCAB), CalibrationError, str(VOCAB)),
        (broken(input_ids=pad(HARM, "right")["input_ids"].float()), CalibrationError, "int64"),
        (None, FastpruneError, "harm_loader"),
        (3, FastpruneError, "harm_loader"),
    ],
)
def test_bad_loaders(model: nn.Module, loader: object, error: type, message: str) -> None:
    before = state_of(model)
    with pytest.raises(error, match=message):
        fastprune.score(model, loader, progress=False)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segments": 0}, "segments.*1 … 4"),
        ({"segments": 5}, "segments.*got 5"),
        ({"segments": 1.5}, "segments"),
        ({"p_max": 0.0}, "p_max"),
        ({"q_max": 1.1}, "q_max"),
        ({"q_max": True}, "q_max"),
        ({"harm": "sighned"}, "harm.*sighned"),
        ({"harm": "random"}, "random_mask"),
        ({"benign": ()}, "benign"),
        ({"benign": ("abs", "abs")}, "benign"),
        ({"benign": None}, "benign: expected one of signed, .*, got None"),
        ({"harm": (["signed"],)}, r"harm: expected one of signed, .*, got \['signed'\]"),
        ({"statistics_dtype": "int8"}, "statistics_dtype"),
        ({"statistics_dtype": "bfloat16"}, "statistics_dtype: expected one of float32, float64, got 'bfloat16'"),
        ({"memory": "much"}, "memory"),
        ({"memory": "1KiB"}, "memory.*need"),
        ({"resume": "journal"}, "resume: expected a checkpoint folder as the model, got a LlamaForCausalLM in memory"),
        ({"resume": ""}, "resume: expected a path, got ''"),
        ({"resume": 3}, "resume: expected a path, got 3"),
        ({"offload": "moon"}, "offload"),
        ({"device": "cpu"}, "device.*folder"),
        ({"backend": "abacus"}, "backend.*abacus"),
    ],
)
def test_bad_arguments(model: nn.Module, arguments: dict, message: str) -> None:
    before = state_of(model)
    with pytest.raises(ValueError if "backend" not in arguments else FastpruneError, match=message):
        fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False, **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "argument",
    [
        {"harm": "sighned"},
        {"benign": "apbs"},
        {"q_max": 2},
        {"p_max": 0},
        {"statistics_dtype": "int8"},
        {"resume": ""},
        {"dtype": "int4"},
    ],
)
def test_arguments_are_checked_before_the_model_and_the_data_are_read(argument: dict, tmp_path) -> None:
    unread = iter(lambda: pytest.fail("the data were read"), None)
    with pytest.raises(ArgumentError, match=f"^{next(iter(argument))}: expected"):
        fastprune.score(tmp_path / "nowhere", unread, progress=False, **argument)


def test_a_journal_needs_an_existing_folder(model: nn.Module, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"resume.*existing folder"):
        fastprune.score(tmp_path / "model", CalibrationSet(HARM), resume=tmp_path / "no" / "such", progress=False)


def test_a_benign_criterion_is_checked_without_a_benign_set(model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"benign: expected one of .* got 'fishre'"):
        fastprune.score(model, CalibrationSet(HARM), benign="fishre", progress=False)
    scores = fastprune.score(model, CalibrationSet(HARM), benign="fisher", progress=False)
    assert scores.criteria == {"harm": ("signed",), "benign": ()}


def test_missing_checkpoint_folder_and_not_a_model(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fastprune.score(tmp_path / "nowhere", CalibrationSet(HARM))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fastprune.score(tmp_path, CalibrationSet(HARM))
    with pytest.raises(ModelError, match="Linear"):
        fastprune.score(nn.Linear(2, 2), CalibrationSet(HARM))


def test_checkpoint_folder_gives_the_same_scores(tmp_path) -> None:
    model = build("Llama")
    model.save_pretrained(tmp_path)
    mask = fastprune.score(tmp_path, CalibrationSet(HARM), progress=False).select(None, 0.01)
    assert mask == fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)


def test_meta_and_offloaded_models_are_refused() -> None:
    with torch.device("meta"):
        model = build_on_meta()
    with pytest.raises(ModelError, match="meta device"):
        fastprune.score(model, CalibrationSet(HARM))


def build_on_meta() -> nn.Module:
    import transformers
    from support.architectures import CONFIGS

    return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**CONFIGS["Llama"]))


def test_integer_weights_are_refused_with_the_way_out(model: nn.Module) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="dequantized"):
        fastprune.score(model, CalibrationSet(HARM))


def test_fused_weights_that_follow_no_interface_are_refused_by_name(model: nn.Module) -> None:
    model.model.layers[1].mlp.experts = nn.ParameterDict({"up": torch.zeros(2, 32, 48)})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.up of shape \(2, 32, 48\).*experts interface"):
        fastprune.score(model, CalibrationSet(HARM))


@pytest.mark.parametrize("other", ["0.mlp.up_proj", "1.mlp.gate_proj"])
def test_one_weight_in_two_modules_is_refused(model: nn.Module, other: str) -> None:
    """Of two blocks or of one: the second must not be taken for a part of the first and left out."""
    model.model.layers[1].mlp.up_proj.weight = model.model.layers.get_submodule(other).weight
    with pytest.raises(ModelError, match=rf"{other}\.weight and .*1\.mlp\.up_proj\.weight are one shared weight"):
        fastprune.score(model, CalibrationSet(HARM))


def test_linear_used_twice_is_refused_for_per_example_statistics_only(model: nn.Module) -> None:
    block = model.model.layers[2]
    block.mlp = Twice(block.mlp)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.mlp.*used 2 times"):
        fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)
    assert fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01).total > 0


class _Unseen(nn.Module):
    """Multiplies by its Linear's weight without calling the Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.inner.weight.T


def test_weight_that_no_hook_sees_is_an_error(model: nn.Module) -> None:
    model.model.layers[3].mlp = _Unseen(32)
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.inner\.weight"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)


class _InPlace(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden * 1.0
        output = self.mlp.down_proj(torch.tanh(self.mlp.up_proj(hidden)) * torch.tanh(self.mlp.gate_proj(hidden)))
        hidden.mul_(2.0)
        return output


def test_input_changed_in_place_is_refused(model: nn.Module) -> None:
    block = model.model.layers[1]
    block.mlp = _InPlace(block.mlp)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp.*in place"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)


def test_model_that_does_not_come_apart_is_scored_whole_with_a_warning(model: nn.Module) -> None:
    model = stateful(model)
    with pytest.raises(ModelError, match="segments=1"):
        fastprune.score(model, CalibrationSet(HARM), segments=2, progress=False)
    with pytest.warns(FastpruneWarning, match="scored whole") as caught:
        scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)
    assert caught[0].filename == __file__
    from fastprune.testing.oracle import oracle_score, oracle_select, oracle_statistics

    copy = stateful(build("Llama"))
    exact = oracle_statistics(copy, HARM)
    dense = {name: oracle_score(copy.get_parameter(name), exact[name], "signed") for name in exact}
    found = scores.select(None, 0.01)
    for name, indices in oracle_select(dense, None, None, 0.01).items():
        assert found[name].tolist() == indices, name


@pytest.mark.parametrize(("stage", "at"), [("_prologue", 1), ("_forward", 1), ("_one_micro_batch", 3)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_interruption_leaves_the_model_as_it_was(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, stage: str, at: int, error: BaseException
) -> None:
    before = state_of(model)
    real, calls = getattr(engine.Pass, stage), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(engine.Pass, stage, interrupted)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        fastprune.score(model, CalibrationSet(HARM).loader(8), CalibrationSet(BENIGN), segments=2, progress=False)
    assert len(calls) == at
    assert_unchanged(model, before)


def test_a_real_ctrl_c_leaves_the_model_as_it_was(model: nn.Module) -> None:
    before = state_of(model)
    rows = CalibrationSet(HARM * 200)
    # A runner that was started in the background ignores SIGINT, and Python then installs no handler of its own.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):  # the signal falls somewhere into one of these passes
                fastprune.score(model, rows.loader(64), rows.loader(64), segments=3, progress=False)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, handler)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("name", "limit"), [("GPT2", "n_positions"), ("OPT", "max_position_embeddings")])
def test_an_example_beyond_the_models_positions_is_named(name: str, limit: str) -> None:
    model = build(name, **{limit: 14})
    with pytest.raises(CalibrationError, match=r"^harm_loader, example 4: 17 tokens, .* has positions for 14; nothing"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)
    fastprune.score(model, CalibrationSet(HARM[:4]), progress=False)
    rotary = build("Llama", max_position_embeddings=14)
    fastprune.score(rotary, CalibrationSet(HARM), progress=False)


def test_a_model_without_a_head_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"expected a causal language model with its head, .*, got LlamaModel"):
        fastprune.score(model.model, CalibrationSet(HARM), progress=False)


def test_numbers_of_numpy_are_numbers(model: nn.Module, tmp_path) -> None:
    fractions = {"p_max": np.float32(0.25), "q_max": np.float64(0.5)}
    scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False, **fractions)
    plain = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False, p_max=0.25, q_max=0.5)
    loaded = fastprune.Scores.load(scores.save(tmp_path / "scores.safetensors"))
    assert loaded.select(0.1, 0.2) == plain.select(0.1, 0.2)
    sizes = (
        fastprune.plan(model, np.int64(3), np.int32(70_000), segments=2),
        fastprune.plan(model, 3, 70_000, segments=2),
    )
    assert sizes[0] == sizes[1]


def test_examples_beyond_the_trained_length_are_pointed_out(model: nn.Module) -> None:
    """Rotary positions have no end; what lies beyond is counted, and said."""
    model.config.max_position_embeddings = 8
    rows = [Example(tuple(range(3, 3 + length)), (-100, *range(4, 3 + length))) for length in (5, 9, 12)]
    note = "harm_loader: 2 examples, the first is example 1, .* than the 8 tokens"
    with pytest.warns(FastpruneWarning, match=note) as caught:
        fastprune.score(model, CalibrationSet(rows), progress=False)
    assert caught[0].filename == __file__


def test_a_head_may_be_a_module_of_several(model: nn.Module) -> None:
    expected = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.05)
    head = model.lm_head
    model.lm_head = nn.Sequential(nn.Identity(), head)
    assert fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.05) == expected
