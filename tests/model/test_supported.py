"""Models that are quantized or offloaded are refused by name, with the way out; fakes stand for the packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.architectures import HARM, build
from support.pass_statistics import kept
from torch import nn
from transformers import FineGrainedFP8Config, Mxfp4Config

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint import load
from fastprune.errors import ModelError


class Linear4bit(nn.Linear):
    """As bitsandbytes': a Linear whose weight is packed, two numbers a byte, into a column."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Linear8bitLt(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


class FP8Linear(nn.Linear):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(1, 1), requires_grad=False)


class WQLinear(nn.Module):
    """As GPTQ's and AWQ's: no Linear, and all that it has are buffers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features // 8, linear.out_features, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, linear.out_features))


class Mxfp4Experts(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        blocks = torch.zeros(2, linear.out_features, linear.in_features // 32, 16, dtype=torch.uint8)
        self.gate_up_proj_blocks = nn.Parameter(blocks, requires_grad=False)
        self.gate_up_proj_scales = nn.Parameter(blocks[..., 0].clone(), requires_grad=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Linear4bit, r"up_proj\.weight of a Linear4bit is stored as torch\.uint8.*dequantized.*bfloat16"),
        (Linear8bitLt, r"up_proj\.weight of a Linear8bitLt is stored as torch\.int8.*dequantized"),
        (FP8Linear, r"up_proj\.weight of a FP8Linear .*float8_e4m3fn.*FineGrainedFP8Config\(dequantize=True\)"),
        (WQLinear, r"up_proj\.qweight of a WQLinear .*int32.*dequantized"),
        (Mxfp4Experts, r"up_proj\.gate_up_proj_blocks of a Mxfp4Experts .*Mxfp4Config\(dequantize=True\)"),
    ],
)
def test_quantized_weights_are_refused_by_name(kind: type, message: str) -> None:
    model = build("Llama")
    mlp = model.model.layers[2].mlp
    mlp.up_proj = kind(mlp.up_proj)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\." + message):
        fastprune.score(model, CalibrationSet(HARM), progress=False)


def test_a_quantized_head_alone_is_no_matter() -> None:
    """It is not scored; what it computes is the model's business."""
    model = build("Llama")
    model.lm_head.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
    assert fastprune.score(model, CalibrationSet(HARM), progress=False).names


QUANTIZED = [
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "method bitsandbytes.*dtype=torch.bfloat16"),
    ({"quant_method": "gptq", "bits": 4}, "method gptq"),
    ({"quant_method": "fp8"}, r"method fp8.*FineGrainedFP8Config\(dequantize=True\)"),
    ({"quant_method": "mxfp4"}, r"method mxfp4.*Mxfp4Config\(dequantize=True\)"),
    ({"bits": 4}, "method unknown"),
]


@pytest.mark.parametrize(("config", "message"), QUANTIZED)
def test_a_config_that_says_so_is_refused(config: dict, message: str, tmp_path, monkeypatch) -> None:
    model = build("Llama")
    model.save_pretrained(tmp_path)
    model.config.quantization_config = config
    with pytest.raises(ModelError, match=f"model: .*{message}"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)

    file = tmp_path / "config.json"
    plain = json.loads(file.read_text())
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(b"never read")
    for contents in (
        {**plain, "quantization_config": config},
        {**plain, "text_config": {"quantization_config": config}},
    ):
        file.write_text(json.dumps(contents))
        with pytest.raises(ModelError, match=f"model {tmp_path}: .*{message}"):
            load.load_model(tmp_path)
        with pytest.raises(ModelError, match=f"model {tmp_path}: .*{message}"):
            load.load_config(tmp_path)
        with pytest.raises(ModelError, match=message):
            fastprune.score(tmp_path, CalibrationSet(HARM), progress=False)
    file.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load.load_model(tmp_path)


def test_a_checkpoint_that_is_not_whole_is_not_filled_with_random_weights(tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    assert load.load_model(tmp_path) is not None
    whole = safetensors.torch.load(file.read_bytes())  # a copy: the file itself is written below
    less = {name: weight for name, weight in whole.items() if ".layers.1." not in name}
    safetensors.torch.save_file(less, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"^model: {tmp_path} lacks 9 of the weights of a LlamaForCausalLM.*layers\.1"
    ):
        load.load_model(tmp_path)
    other = {name: weight[:, :-1] if "1.mlp.up_proj" in name else weight for name, weight in whole.items()}
    safetensors.torch.save_file({n: w.contiguous() for n, w in other.items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1\.mlp\.up_proj"):
        load.load_model(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="are truncated or no safetensors files"):
        load.load_model(tmp_path)


@pytest.mark.parametrize("config", [Mxfp4Config(), FineGrainedFP8Config()])
def test_configs_of_transformers_are_known(config: object) -> None:
    model = build("Llama")
    model.config.quantization_config = config
    with pytest.raises(ModelError, match=rf"{type(config).__name__}\(dequantize=True\)"):
        fastprune.score(model, CalibrationSet(HARM), progress=False)
    del model.config.quantization_config  # what transformers does when it has dequantized
    fastprune.score(model, CalibrationSet(HARM), progress=False)


ADVICE = "offloaded.*pass the path of the checkpoint folder"


def test_offloaded_models_are_refused_with_the_advice(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    offloads = {
        "cpu": lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
        "disk": lambda model: accelerate.disk_offload(model, tmp_path / "all", torch.device("cpu")),
        "one block": lambda model: dispatch(model, "model.layers.2"),
        "the head": lambda model: dispatch(model, "lm_head"),
        "the embedding": lambda model: dispatch(model, "model.embed_tokens"),
    }

    def dispatch(model: nn.Module, away: str) -> None:
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        device_map = dict.fromkeys([*parts, *[f"model.layers.{index}" for index in range(4)]], "cpu")
        folder = tmp_path / away
        accelerate.dispatch_model(model, {**device_map, away: "disk"}, main_device="cpu", offload_dir=folder)

    for offload in offloads.values():
        model = build("Llama")
        offload(model)
        with pytest.raises(ModelError, match=ADVICE):
            fastprune.score(model, CalibrationSet(HARM), progress=False)


@pytest.mark.parametrize("whole", [True, False])
def test_dispatched_models_that_are_resident_give_the_same_bits(whole: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    reference = kept(fastprune.score(build("Llama"), CalibrationSet(HARM), progress=False))
    model = build("Llama")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {"": "cpu"} if whole else dict.fromkeys([*names, *[f"model.layers.{i}" for i in range(4)]], "cpu")
    accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert hasattr(model, "_hf_hook")
    for segments in (1, 3):
        assert kept(fastprune.score(model, CalibrationSet(HARM), segments=segments, progress=False)) == reference
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.01)
    with mask.applied(model):
        assert model.hf_device_map == device_map
