"""Models that are spread over devices: what is refused before a weight is read, and that nothing is offloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support.architectures import build

from fastprune.checkpoint.load import load_model
from fastprune.errors import ArgumentError, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("Llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="the model would be on a GPU")
@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential"])
def test_without_a_gpu_all_of_it_is_on_the_cpu(folder: Path, device_map: str) -> None:
    model, expected = load_model(folder, device_map=device_map), load_model(folder)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_maps_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match=r"device_map: expected one of auto, balanced, .*, got 'cpu'"):
        load_model(folder, device_map="cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"device_map: 'auto' needs accelerate; pip install .fastprune\[acc"):
        load_model(folder, device_map="auto")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], free[index]))


def test_gpus_without_room_are_said_before_a_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *a, **b: pytest.fail("read"))
    pretend_gpus(monkeypatch, size // 2, size // 3)
    with pytest.raises(ModelError, match=r"device_map: expected room for the 0\.0 GiB of .* on 2 GPUs; .*dtype="):
        load_model(folder, device_map="auto")


def test_transformers_is_given_the_gpus_alone_and_an_offloaded_model_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {}

    def loaded(path: str, **options: object):
        given.update(options)
        model = build("Llama")
        model.hf_device_map = {"model.embed_tokens": 0, "model.layers.3": "cpu"}
        return model, {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loaded)
    pretend_gpus(monkeypatch, 10**9, 2 * 10**9)
    with pytest.raises(ModelError, match=r"device_map: .* did not fit the GPUs, and part of it is on the cpu"):
        load_model(folder, device_map="auto")
    assert given["max_memory"] == {0: 9 * 10**8, 1: 18 * 10**8} and given["device_map"] == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_over_two_gpus_a_model_says_the_same(folder: Path) -> None:
    model, expected = load_model(folder, torch.float64, "balanced"), load_model(folder, torch.float64)
    assert len({parameter.device for parameter in model.parameters()}) == 2
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(model(ids.cuda()).logits.cpu(), expected(ids).logits, atol=1e-6)
