"""Models in memory whose parts lie on several devices, or are driven by accelerate's hooks."""

from __future__ import annotations

import accelerate
import pytest
import torch
import transformers
from support.architectures import build
from support.devices import masks, spread

import fastprune
from fastprune.calibration import CalibrationSet, Example

gpu = pytest.mark.gpu


@pytest.mark.parametrize("offload", ["device", "host", "disk"])
@pytest.mark.parametrize(
    "devices",
    [
        ("cpu", "cpu"),
        pytest.param(("cuda:0", "cpu"), marks=gpu),
        pytest.param(("cpu", "cuda:0"), marks=gpu),
        pytest.param(("cuda:0", "cuda:1"), marks=gpu),
    ],
    ids="-".join,
)
def test_a_model_on_two_devices_has_the_same_pruned_sets(devices: tuple[str, str], offload: str) -> None:
    if "cuda:1" in devices and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device on this machine")
    # In float64 nothing that two devices round differently comes near a threshold.
    model = build("Llama", dtype=torch.float64)
    expected = masks(model, statistics_dtype="float64")
    assert masks(spread(model, *devices), statistics_dtype="float64", offload=offload) == expected


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Mixtral"])
def test_accelerates_hooks_make_no_difference(name: str) -> None:
    model = build(name)
    expected = masks(model)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert sum(hasattr(module, "_hf_hook") for module in model.modules()) > len(expected)
    forwards = {module: module.__dict__.get("forward") for module in model.modules()}
    assert masks(model) == expected
    assert {module: module.__dict__.get("forward") for module in model.modules()} == forwards


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_bfloat16_scores_have_no_backends_mark(device: str) -> None:
    """Wide enough for the kernels' largest tiles and the tensor cores; the other tests' models are 32 wide."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300)
    # attention whose backward has one order of additions, or two runs would differ before any statistic is formed
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    model.to(device).eval()
    rows = [Example(ids := tuple(torch.randint(300, (n,)).tolist()), (-100, *ids[1:])) for n in (20, 150, 64, 31, 97)]
    settings = {
        "harm": ("signed", "abs_of_sum"),
        "benign": ("abs", "fisher"),
        "p_max": 1,
        "q_max": 1,
        "progress": False,
    }
    ours, plain = (
        fastprune.score(model, CalibrationSet(rows[:3]), CalibrationSet(rows[2:]), backend=backend, **settings)
        for backend in (None, "torch")
    )
    for role in ("harm", "benign"):
        for criterion in settings[role]:
            for name, expected in plain.of(role, criterion).items():
                found = ours.of(role, criterion)[name]
                dense = torch.zeros(2, expected.numel, dtype=torch.float64)
                for row, kept in zip(dense, (expected, found), strict=True):
                    row[kept.indices] = kept.values.double()
                assert (dense[1] - dense[0]).norm() <= 1e-4 * dense[0].norm(), (criterion, name)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_map_over_two_gpus() -> None:
    model = build("Llama", dtype=torch.float64)
    expected = masks(model, statistics_dtype="float64")
    upper = [f"model.layers.{index}" for index in (2, 3)]
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
    places |= dict.fromkeys([*upper, "model.norm", "lm_head"], 1)
    assert masks(accelerate.dispatch_model(model, places), statistics_dtype="float64") == expected
