"""Masks of experts, one tensor in memory, written into checkpoints that store them fused or each on its own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import build
from support.checkpoints import as_bytes, contents, refused
from transformers import AutoModelForCausalLM

import fastprune
from fastprune.artifact import read_artifact
from fastprune.checkpoint import patch
from fastprune.checkpoint.patch import patch_checkpoint
from fastprune.checkpoint.shards import stored_tensors
from fastprune.checkpoint.undo_file import UNDO_NAME
from fastprune.errors import MaskError
from fastprune.masking.apply import matrices_of
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint
from fastprune.model.matrices import eligible_matrices


def test_one_expert_of_a_fused_tensor(tmp_path):
    fused = torch.arange(1.0, 25).reshape(4, 2, 3)
    (tmp_path / "in").mkdir()
    save_file({"m.down_proj": fused}, tmp_path / "in" / "model.safetensors")
    mask = PruneMask({"m.down_proj[2]": torch.tensor([0, 5])}, {"m.down_proj[2]": (2, 3)})
    patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    patched = load_file(tmp_path / "out" / "model.safetensors")["m.down_proj"]
    assert (patched != fused).nonzero().tolist() == [[2, 0, 0], [2, 1, 2]] and patched[2, 0, 0] == 0
    far = PruneMask({"m.down_proj[4]": torch.tensor([0])}, {"m.down_proj[4]": (2, 3)})
    with pytest.raises(MaskError, match="no such expert"):
        patch_checkpoint(tmp_path / "in", far, tmp_path / "far")


def experts_apart(name: str, folder: Path, shard: str = "20KB") -> tuple[torch.nn.Module, PruneMask]:
    """A mixture saved with each expert on its own, and a mask over every matrix of it."""
    model = build(name)
    model.save_pretrained(folder, max_shard_size=shard)
    matrices = eligible_matrices(model)
    assert any(f".experts.{expert}." in there for there in stored_tensors(folder) for expert in range(5))
    generator = torch.Generator().manual_seed(1)
    shapes = {matrix.name: tuple(matrix.weight.shape) for matrix in matrices}
    indices = {
        matrix: torch.randperm(math.prod(shape), generator=generator)[:40].sort().values
        for matrix, shape in shapes.items()
    }
    weights = {matrix.name: matrix.weight for matrix in matrices}
    return model, PruneMask(indices, shapes, {"fingerprint": fingerprint(weights)})


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "Qwen2Moe", "Olmoe", "DeepseekV3"])
def test_experts_that_are_stored_apart(tmp_path, name):
    model, mask = experts_apart(name, tmp_path / "in")
    before = contents(tmp_path / "in")
    patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    mask.apply_(model)
    patched = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(as_bytes(tensor) == as_bytes(patched[key]) for key, tensor in model.state_dict().items())
    patch.undo_patch(tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_experts_alone_and_parts_in_another_order(tmp_path):
    """Nothing but the samples tells gate and up apart, and they do."""
    model, mask = experts_apart("Mixtral", tmp_path / "in")
    shapes = {name: shape for name, shape in mask.shapes.items() if "experts" in name}
    weights = {matrix.name: matrix.weight for matrix in eligible_matrices(model) if matrix.name in shapes}
    experts = PruneMask({name: mask[name] for name in shapes}, shapes, {"fingerprint": fingerprint(weights)})
    patch_checkpoint(tmp_path / "in", experts, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert experts.apply_(model) and fingerprint(matrices_of(loaded, shapes)) == fingerprint(matrices_of(model, shapes))
    swapped = tmp_path / "swapped"
    _, mask = experts_apart("Mixtral", swapped / "in", shard="10GB")
    (file,) = (swapped / "in").glob("*.safetensors")
    other = {".w1.": ".w3.", ".w3.": ".w1."}
    renamed = {re.sub(r"\.w[13]\.", lambda part: other[part[0]], name): part for name, part in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    refused(swapped, MaskError, "was made for a model with the fingerprint", mask)


@pytest.mark.parametrize("apart", ["mlp.experts.3.gate_proj.weight", "block_sparse_moe.experts.3.w1.weight"])
@pytest.mark.parametrize("dense", [True, False])
def test_experts_of_which_a_part_is_missing_are_refused_with_the_reason(tmp_path, apart, dense):
    (tmp_path / "in").mkdir()
    q_proj, fused = "layers.0.self_attn.q_proj.weight", "layers.0.mlp.experts.gate_up_proj[3]"
    tensors = {f"model.layers.0.{apart}": torch.ones(3, 2), f"model.{q_proj}": torch.ones(3, 2)}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    shapes = {**({q_proj: (3, 2)} if dense else {}), fused: (6, 2)}
    mask = PruneMask({name: torch.tensor([0]) for name in shapes}, shapes)
    reason = (
        rf"lacks 1 of the {len(shapes)}.*each expert on its own \(model\.layers\.0\.{apart}\).*make up {fused[:-3]}"
    )
    refused(tmp_path, MaskError, reason + r"\[3\].*save_pretrained", mask)


@pytest.mark.parametrize(
    "name", ["layers.1.w", "layers.0.mlp.experts.gate_up_proj[7]", "layers.0.mlp.experts.up_proj[0]"]
)
def test_what_is_not_there_is_not_put_down_to_how_experts_are_stored(tmp_path, name):
    """No layout stores an up projection alone under ``w1``, which is the gate."""
    (tmp_path / "in").mkdir()
    tensors = {f"model.layers.0.moe.experts.0.{part}.weight": torch.ones(3, 2) for part in ("w1", "w3")}
    tensors |= {f"model.layers.0.{part}": torch.ones(3, 2) for part in ("q", "k")}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    shapes = {"layers.0.q": (3, 2), "layers.0.k": (3, 2), name: (3, 2)}
    mask = PruneMask({name: torch.tensor([0]) for name in shapes}, shapes)
    with pytest.raises(MaskError, match="lacks 1 of the 3 matrices of the mask, the first is ") as caught:
        patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    assert ("each expert on its own" in str(caught.value)) == name.endswith("up_proj[0]")


@pytest.mark.parametrize(("in_mask", "stored"), [("", "model."), ("model.", ""), ("", "")])
def test_names_of_experts_alone_may_differ_by_one_prefix(tmp_path, in_mask, stored):
    (tmp_path / "in").mkdir()
    parts = {
        f"{stored}layers.{i}.mlp.experts.0.{p}_proj.weight": torch.ones(3, 2) for i in "01" for p in ("gate", "up")
    }
    save_file(parts, tmp_path / "in" / "model.safetensors")
    shapes = {f"{in_mask}layers.{i}.mlp.experts.gate_up_proj[0]": (6, 2) for i in "01"}
    patch_checkpoint(tmp_path / "in", PruneMask(dict.fromkeys(shapes, torch.tensor([6])), shapes), tmp_path / "out")
    patched = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in patched.items():
        assert tensor.flatten().tolist() == [float("gate" in name), 1, 1, 1, 1, 1]


@pytest.mark.parametrize("up", [torch.ones(3, 3), torch.ones(3, 2, dtype=torch.bfloat16), torch.ones(2, 2)])
def test_parts_of_an_expert_that_do_not_fit_together_are_refused(tmp_path, up):
    (tmp_path / "in").mkdir()
    parts = {f"m.l.mlp.experts.0.{name}_proj.weight": part for name, part in (("gate", torch.ones(3, 2)), ("up", up))}
    save_file(parts, tmp_path / "in" / "model.safetensors")
    name = "m.l.mlp.experts.gate_up_proj[0]"
    refused(tmp_path, MaskError, "cannot be joined|has the shape", PruneMask({name: torch.tensor([0])}, {name: (6, 2)}))


def test_experts_of_one_tensor_are_undone_together(tmp_path):
    fused = torch.arange(1.0, 25, dtype=torch.float16).reshape(4, 2, 3)
    save_file({"m.down_proj": fused}, tmp_path / "model.safetensors")
    before = contents(tmp_path)
    shapes = {f"m.down_proj[{expert}]": (2, 3) for expert in (3, 0)}
    mask = PruneMask({name: torch.tensor([0, 5]) for name in shapes}, shapes)
    fastprune.patch_in_place(tmp_path, mask)
    tensors, _ = read_artifact(tmp_path / UNDO_NAME, "undo")
    assert tensors["indices:m.down_proj"].tolist() == [0, 5, 18, 23]
    assert load_file(tmp_path / "model.safetensors")["m.down_proj"].flatten().nonzero().numel() == 20
    fastprune.undo_patch(tmp_path)
    assert contents(tmp_path) == before
