"""A mask written into a checkpoint folder: what it does to the resident model, and every other byte as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import as_bytes, contents, mask_for, refused
from transformers import AutoModelForCausalLM

from fastprune.checkpoint import changes, patch
from fastprune.checkpoint.patch import patch_checkpoint, patch_in_place, undo_patch
from fastprune.checkpoint.undo_file import UNDO_NAME
from fastprune.errors import ArgumentError, ArtifactError, FastpruneWarning, MaskError, NotFoundError
from fastprune.masking.mask import PruneMask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shard", ["10GB", "6KB"])
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_a_patched_folder_holds_the_masked_model(model, tmp_path, dtype, shard, scale):
    model.to(dtype).save_pretrained(tmp_path / "in", max_shard_size=shard)
    (tmp_path / "in" / "tokenizer").mkdir()
    (tmp_path / "in" / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    before, mask = contents(tmp_path / "in"), mask_for(model)
    assert (len([name for name in before if name.endswith(".safetensors")]) > 1) == (shard == "6KB")

    assert patch_checkpoint(tmp_path / "in", mask, tmp_path / "out", scale=scale) == tmp_path / "out"

    after = contents(tmp_path / "out")
    assert contents(tmp_path / "in") == before and after.keys() == before.keys() | {UNDO_NAME}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    patched = {}
    for name in before:
        if not name.endswith(".safetensors"):
            assert after[name] == before[name]
            continue
        patched |= load_file(tmp_path / "out" / name)
        with safe_open(tmp_path / "in" / name, "pt") as one, safe_open(tmp_path / "out" / name, "pt") as other:
            assert one.metadata() == other.metadata()
    with mask.applied(model, scale=scale):
        for name, tensor in model.state_dict().items():
            assert as_bytes(patched[name]) == as_bytes(tensor), name
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    differing = sum(
        int((a != b).sum())
        for name in before
        if name.endswith(".safetensors")
        for a, b in zip(
            load_file(tmp_path / "in" / name).values(), load_file(tmp_path / "out" / name).values(), strict=True
        )
    )
    assert differing == mask.total == 30


def test_a_scale_of_numpy_is_a_number(model, tmp_path):
    model.save_pretrained(tmp_path / "in")
    mask = mask_for(model)
    for name, scale in (("numpy", np.float32(0.5)), ("python", 0.5)):
        patch_checkpoint(tmp_path / "in", mask, tmp_path / name, scale=scale)
    assert contents(tmp_path / "numpy") == contents(tmp_path / "python")
    assert undo_patch(patch_in_place(tmp_path / "in", mask, scale=np.float64(1))) == tmp_path / "in"


def test_zero_is_plus_zero_and_odd_bits_elsewhere_stay(tmp_path):
    weight = torch.tensor([[-0.0, math.nan, -1.0, math.inf]])
    weight[0, 1:2].view(torch.int32).fill_(0x7FC12345)
    (tmp_path / "in").mkdir()
    save_file({"x": torch.ones(3, dtype=torch.uint8), "w": weight}, tmp_path / "in" / "model.safetensors")
    patch_checkpoint(tmp_path / "in", PruneMask({"w": torch.tensor([2])}, {"w": (1, 4)}), tmp_path / "out")
    patched = load_file(tmp_path / "out" / "model.safetensors")["w"]
    weight[0, 2] = 0.0
    assert as_bytes(patched) == as_bytes(weight)


@pytest.mark.parametrize(
    ("on_disk", "in_mask"),
    [("m.l.0.w", "l.0.w"), ("l.0.w", "m.l.0.w"), ("a.b.l.0.w", "l.0.w"), ("a.b.l.0.w", "b.a.l.0.w")],
)
def test_names_may_differ_by_one_prefix(tmp_path, on_disk, in_mask):
    (tmp_path / "in").mkdir()
    save_file({on_disk: torch.ones(2, 2), "other.w": torch.ones(2, 2)}, tmp_path / "in" / "model.safetensors")
    patch_checkpoint(tmp_path / "in", PruneMask({in_mask: torch.tensor([3])}, {in_mask: (2, 2)}), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")[on_disk].view(-1).tolist() == [1, 1, 1, 0]


def test_names_that_could_mean_two_tensors_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    tensors = {f"{half}.{name}": torch.ones(2, 2) for half in ("encoder", "decoder") for name in ("l.w", "l.v")}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    shapes = {"l.w": (2, 2), "l.v": (2, 2)}
    mask = PruneMask({name: torch.tensor([0]) for name in shapes}, shapes)
    with pytest.raises(MaskError, match="fit 2 sets of tensors in the checkpoint"):
        patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    del tensors["encoder.l.v"]  # now the second name tells which of the two is meant
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["encoder.l.w"].min() == 1


def test_other_copies_of_the_weights_are_left_out(model, tmp_path):
    model.save_pretrained(tmp_path / "in")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "original/a.pth"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in" / ".cache").mkdir()
    (tmp_path / "in" / ".cache" / "x").write_text("x")
    with pytest.warns(
        FastpruneWarning, match=r"left out .*: consolidated\.safetensors, original/a\.pth, pytorch_model\.bin"
    ):
        patch_checkpoint(tmp_path / "in", mask_for(model), tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        "config.json",
        UNDO_NAME,
        "generation_config.json",
        "model.safetensors",
    ]


def test_only_the_masked_numbers_are_read(model, tmp_path, monkeypatch):
    """Neither safetensors nor torch loads a tensor: what is read are samples and the masked numbers."""
    model.save_pretrained(tmp_path / "in")
    mask, sizes = mask_for(model), []
    genuine = changes.ops.apply_sparse_

    def spy(weight, indices, scale):
        sizes.append(weight.numel())
        return genuine(weight, indices, scale)

    monkeypatch.setattr(changes.ops, "apply_sparse_", spy)
    patch_checkpoint(tmp_path / "in", mask, tmp_path / "out")
    assert sizes == [5] * 6


def test_checkpoints_that_the_mask_does_not_fit_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "in")
    mask = mask_for(model)
    name = "model.layers.0.mlp.up_proj.weight"
    refused(
        tmp_path, MaskError, "made for a model with the fingerprint", PruneMask(mask, mask.shapes, {"fingerprint": "0"})
    )
    odd = PruneMask({name: mask[name]}, {name: (16, 24)})
    refused(tmp_path, MaskError, r"up_proj.weight has the shape \(24, 16\) in the checkpoint and \(16, 24\)", odd)
    refused(tmp_path, MaskError, r"up_proj.weight has the shape", odd, strict=False)
    missing = PruneMask({"h.0.w": torch.tensor([0])}, {"h.0.w": (2, 2)})
    refused(tmp_path, MaskError, r"lacks 1 of the 1 matrices of the mask, the first is h\.0\.w", missing, strict=False)
    refused(tmp_path, MaskError, "over no matrices", PruneMask({}, {}))
    for file in ("a.mask", Path("a.mask")):
        load = r"mask: expected a PruneMask, got (str|PosixPath); fastprune\.PruneMask\.load\('a.mask'\) reads one"
        refused(tmp_path, ArgumentError, load, file)
    refused(tmp_path, ArgumentError, "mask: expected a PruneMask, got dict$", dict(mask))
    for scale in (math.nan, math.inf, "0", True):
        refused(tmp_path, ArgumentError, "scale: expected a finite number", mask, scale=scale)
    patch_checkpoint(
        tmp_path / "in", PruneMask(mask, mask.shapes, {"fingerprint": "0"}), tmp_path / "out", strict=False
    )


def test_weights_that_are_no_plain_floats_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "in" / "model.safetensors")
    mask = PruneMask({"w": torch.tensor([0])}, {"w": (2, 2)})
    refused(tmp_path, MaskError, r"expected weights of a type in \['BF16', 'F16', 'F32', 'F64'\], got I8", mask)


def test_damaged_checkpoints_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "in", max_shard_size="6KB")
    mask, shard = mask_for(model), sorted((tmp_path / "in").glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}}).encode()
    wrong = len(header).to_bytes(8, "little") + header + bytes(8)
    for content in (b"", whole[:7], whole[:40], whole[:-1], whole + b"x", b"not a safetensors file", wrong):
        shard.write_bytes(content)
        refused(tmp_path, ArtifactError, rf"{shard.name} is truncated or no safetensors file", mask)
    shard.unlink()
    refused(tmp_path, NotFoundError, f"names the shard {shard.name}, which does not exist", mask)
    index = tmp_path / "in" / "model.safetensors.index.json"
    for content in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(content)
        refused(tmp_path, ArtifactError, "is not an index of safetensors shards", mask)
    index.write_text('{"weight_map": {"w": "../in/config.json"}}')
    refused(tmp_path, ArtifactError, "names a shard outside the folder", mask)
    index.unlink()
    refused(tmp_path, NotFoundError, r"holds neither model\.safetensors nor model\.safetensors\.index\.json", mask)


def test_folders_are_checked(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "in")
    mask = mask_for(model)
    with pytest.raises(NotFoundError, match=r"in_dir .*none does not exist"):
        patch_checkpoint(tmp_path / "none", mask, tmp_path / "out")
    with pytest.raises(NotFoundError, match=r"out_dir: the folder .*deep does not exist"):
        patch_checkpoint(tmp_path / "in", mask, tmp_path / "deep" / "out")
    for target in (tmp_path / "in", tmp_path / "in" / "config.json"):
        before = contents(tmp_path)
        with pytest.raises(ArgumentError, match="expected a new or an empty folder"):
            patch_checkpoint(tmp_path / "in", mask, target)
        assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    for target in (tmp_path / "link", "."):
        with pytest.raises(ArgumentError, match=r"got .*, a link or the current folder"):
            patch_checkpoint(tmp_path / "in", mask, target)
    monkeypatch.chdir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "in", "link"]
    patch_checkpoint(str(tmp_path / "in"), mask, str(tmp_path / "empty"))
    assert (tmp_path / "empty" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupt_leaves_no_folder_behind(model, tmp_path, monkeypatch, error):
    model.save_pretrained(tmp_path / "in", max_shard_size="6KB")
    calls = []

    genuine = patch.hashes

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        return genuine(*args, **kwargs)

    monkeypatch.setattr(patch, "hashes", fail)  # reads and writes one shard
    refused(tmp_path, error, None, mask_for(model))
    assert len(calls) == 3
