"""A patch taken out again: the same bytes back, whatever stopped it, and only from the weights that it was made of."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import contents, mask_for
from transformers import AutoModelForCausalLM

import fastprune
from fastprune.artifact import read_artifact, write_artifact
from fastprune.checkpoint import byte_edits, patch
from fastprune.checkpoint.undo_file import UNDO_NAME
from fastprune.errors import ArgumentError, ArtifactError, FastpruneWarning, MaskError, NotFoundError
from fastprune.masking.mask import PruneMask


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("shard", ["10GB", "6KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_place", [True, False])
def test_patch_and_undo_give_the_same_bytes(model, tmp_path, shard, dtype, in_place):
    model.to(dtype).save_pretrained(tmp_path / "model", max_shard_size=shard)
    before, mask = contents(tmp_path / "model"), mask_for(model)
    fastprune.patch_checkpoint(tmp_path / "model", mask, tmp_path / "copy", scale=0.3)
    patched = tmp_path / "copy"
    if in_place:
        assert fastprune.patch_in_place(str(tmp_path / "model"), mask, scale=0.3) == tmp_path / "model"
        one, other = contents(tmp_path / "model"), contents(tmp_path / "copy")
        del one[UNDO_NAME], other[UNDO_NAME]  # safetensors writes its metadata in any order
        assert one == other
        patched = tmp_path / "model"

    with mask.applied(model, scale=0.3), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(patched, dtype=dtype)
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert contents(patched) != before
    assert fastprune.undo_patch(str(patched)) == patched
    assert contents(patched) == before


def test_what_the_undo_file_says(model, folder):
    mask, original = mask_for(model), {path.name: path.read_bytes() for path in shards(folder)}
    fastprune.patch_in_place(folder, mask, scale=0.5)
    tensors, content = read_artifact(folder / UNDO_NAME, "undo")
    assert content["mask"] == mask.digest and content["scale"] == 0.5
    weights = model.state_dict()
    for name, indices in mask.items():
        assert (f"indices:{name}" in tensors) == (len(indices) > 0)
        if len(indices):
            assert torch.equal(tensors[f"indices:{name}"], indices)
            assert torch.equal(tensors[f"old:{name}"], weights[name].take(indices))
    changed = {name for name, data in original.items() if (folder / name).read_bytes() != data}
    assert set(content["shards"]) == changed and 1 < len(changed) < len(original)
    for name, entry in content["shards"].items():
        assert entry["original"] == hashlib.sha256(original[name]).hexdigest()
        assert entry["patched"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_bytes_across_windows_and_at_odd_offsets(tmp_path, monkeypatch):
    """Elements that straddle two windows, in a file whose header has an odd length and names the later tensor first."""
    monkeypatch.setattr(byte_edits, "_WINDOW_BYTES", 7)
    monkeypatch.setattr(byte_edits, "_STREAM_BYTES", 11)
    values = torch.randn(90, dtype=torch.float64)
    entries = {"v": {"dtype": "F64", "shape": [9, 5]}, "w": {"dtype": "F64", "shape": [9, 5]}}
    entries["v"]["data_offsets"], entries["w"]["data_offsets"] = [360, 720], [0, 360]
    header = json.dumps(entries).encode()
    header += b" " * (1 - len(header) % 2)
    assert len(header) % 2 == 1
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    before = contents(tmp_path)
    every_other = torch.arange(0, 45, 2)
    fastprune.patch_in_place(tmp_path, PruneMask({"v": every_other, "w": every_other[:3]}, {"v": (9, 5), "w": (9, 5)}))
    found = torch.frombuffer(bytearray(file.read_bytes()[8 + len(header) :]), dtype=values.dtype)
    values[45::2], values[0:6:2] = 0, 0
    assert torch.equal(found, values)
    fastprune.undo_patch(tmp_path)
    assert contents(tmp_path) == before


def test_a_mask_of_no_weights(model, folder):
    mask = PruneMask({"lm_head.weight": torch.empty(0, dtype=torch.int64)}, {"lm_head.weight": (20, 16)})
    before = contents(folder)
    fastprune.patch_in_place(folder, mask)
    fastprune.undo_patch(folder)
    assert contents(folder) == before


def test_a_second_patch(model, folder, tmp_path):
    mask = mask_for(model)
    more = PruneMask({"lm_head.weight": torch.arange(7)}, {"lm_head.weight": (20, 16)})
    fastprune.patch_in_place(folder, mask)
    once = contents(folder)
    with pytest.raises(ArgumentError, match=f"holds {UNDO_NAME}: .* undo that first"):
        fastprune.patch_in_place(folder, more)
    assert contents(folder) == once
    fastprune.patch_checkpoint(folder, more, tmp_path / "copy")
    assert contents(folder) == once
    assert read_artifact(tmp_path / "copy" / UNDO_NAME, "undo")[1]["mask"] == more.digest
    fastprune.undo_patch(tmp_path / "copy")
    del once[UNDO_NAME]  # back to the folder that was copied, and no further
    assert contents(tmp_path / "copy") == once


def test_only_one_patches_or_undoes_at_a_time(model, folder, monkeypatch):
    """The second would take what the first has written for the original weights."""
    mask, write, refused = mask_for(model), patch.scatter, []

    def and_another(path, offsets, values):
        for second in (lambda: fastprune.patch_in_place(folder, mask), lambda: fastprune.undo_patch(folder)):
            with pytest.raises(ArgumentError, match="another process is patching it") as caught:
                second()
            refused.append(caught)
        write(path, offsets, values)

    before = contents(folder)
    monkeypatch.setattr(patch, "scatter", and_another)
    fastprune.patch_in_place(folder, mask)
    monkeypatch.undo()
    assert refused and contents(folder) != before
    assert contents(fastprune.undo_patch(folder)) == before


def test_a_copy_of_a_half_patched_folder_is_refused(model, folder, tmp_path):
    mask = mask_for(model)
    original = contents(folder)
    fastprune.patch_in_place(folder, mask)
    changed = next(name for name in original if contents(folder)[name] != original[name])
    (folder / changed).write_bytes(original[changed])
    with pytest.raises(ArtifactError, match=rf"{changed} is not as .*interrupted"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "copy", strict=False)
    assert not (tmp_path / "copy").exists()
    fastprune.undo_patch(folder)
    assert contents(folder) == original


def assert_refused(folder: Path, error: type[Exception], message: str) -> None:
    before = contents(folder)
    with pytest.raises(error, match=message):
        fastprune.undo_patch(folder)
    assert contents(folder) == before


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_changed_shards_are_refused_by_name(model, folder):
    fastprune.patch_in_place(folder, mask_for(model))
    tensors, content = read_artifact(folder / UNDO_NAME, "undo")
    last = folder / max(content["shards"])
    whole, old = last.read_bytes(), next(iter(content["tensors"].values()))
    for offset in (len(whole) - 1, 20):  # a weight; a letter of the header
        flip(last, offset)
        assert_refused(folder, ArtifactError, rf"{last.name} is")
        last.write_bytes(whole)
    # a masked weight that is neither the old nor the new one
    name = next(name for name, entry in content["tensors"].items() if entry["shard"] == last.name)
    stored = patch.stored_tensors(folder)[name]
    flip(last, stored.start + 4 * int(tensors[f"indices:{name}"][0]))
    assert_refused(folder, ArtifactError, f"{last.name} is not as the patch left it")
    for content_now in (whole[:-1], whole[: len(whole) // 2], b""):
        last.write_bytes(content_now)
        assert_refused(folder, ArtifactError, f"{last.name} is")
    save_file({"other": torch.ones(2)}, last)
    assert_refused(folder, ArtifactError, f"{last.name} is not as the patch left it: {name}")
    last.unlink()
    assert_refused(folder, NotFoundError, f"names the shard {last.name}, which does not exist")
    last.write_bytes(whole)
    fastprune.undo_patch(folder)
    assert old["dtype"] == "F32"


def test_damaged_undo_files_are_refused(model, folder):
    fastprune.patch_in_place(folder, mask_for(model))
    file = folder / UNDO_NAME
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], b"no artifact"):
        file.write_bytes(damaged)
        assert_refused(folder, ArtifactError, f"{UNDO_NAME} is truncated")
    for offset in (len(whole) - 1, whole.index(b"model-0")):  # an old value or an index; a fact
        file.write_bytes(whole)
        flip(file, offset)
        assert_refused(folder, ArtifactError, f"{UNDO_NAME}: this undo file is damaged")
    file.write_bytes(whole)
    tensors, content = read_artifact(file, "undo")
    for old, new in (("model-0", "../el-0"), ("original", "origina1"), ("F32", "F99")):
        facts = json.dumps(content)
        assert old in facts
        write_artifact(file, "undo", tensors, json.loads(facts.replace(old, new)))
        assert_refused(folder, ArtifactError, UNDO_NAME if old != "F32" else "should be F99")
    file.unlink()
    assert_refused(folder, NotFoundError, f"holds no {UNDO_NAME}")
    with pytest.raises(NotFoundError, match="does not exist"):
        fastprune.undo_patch(folder / "nowhere")


def test_links_are_not_written_through(model, folder, tmp_path):
    mask, linked = mask_for(model), tmp_path / "linked"
    for link in (os.symlink, os.link):
        linked.mkdir()
        for path in folder.iterdir():
            link(path, linked / path.name)
        before = contents(tmp_path)
        with pytest.raises(ArgumentError, match="shares its bytes with another name"):
            fastprune.patch_in_place(linked, mask)
        assert contents(tmp_path) == before
        for path in linked.iterdir():
            path.unlink()
        linked.rmdir()


def test_a_mask_that_does_not_fit_changes_nothing(model, folder):
    mask, before = mask_for(model), contents(folder)
    foreign = PruneMask(mask, mask.shapes, {"fingerprint": "0"})
    for error, message, call in (
        (MaskError, "fingerprint", lambda: fastprune.patch_in_place(folder, foreign, backup=True)),
        (ArgumentError, r"PruneMask\.load\('m'\)", lambda: fastprune.patch_in_place(folder, "m", backup=True)),
        (ArgumentError, "scale: expected", lambda: fastprune.patch_in_place(folder, mask, scale=math.nan)),
        (NotFoundError, "folder .*none does not", lambda: fastprune.patch_in_place(folder / "none", mask)),
    ):
        with pytest.raises(error, match=message):
            call()
    assert contents(folder) == before


def test_backups(model, folder, tmp_path):
    mask, before = mask_for(model), contents(folder)
    fastprune.patch_in_place(folder, mask, backup=True)
    changed = {name for name in before if contents(folder)[name] != before[name]}
    assert changed and {path.name for path in folder.glob("*.bak")} == {f"{name}.bak" for name in changed}
    assert all((folder / f"{name}.bak").read_bytes() == before[name] for name in changed)
    AutoModelForCausalLM.from_pretrained(folder)
    with pytest.warns(FastpruneWarning, match=r"left out .*\.safetensors\.bak"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "copy", strict=False)
    assert not list((tmp_path / "copy").glob("*.bak"))
    fastprune.undo_patch(folder)
    assert {name: data for name, data in contents(folder).items() if not name.endswith(".bak")} == before
    fastprune.patch_in_place(folder, mask, backup=True)  # the backups that are there are the right ones
    fastprune.undo_patch(folder)
    other = folder / f"{min(changed)}.bak"
    other.write_bytes(b"mine")
    with pytest.raises(ArgumentError, match=f"{other.name} exists and is no copy"):
        fastprune.patch_in_place(folder, mask, backup=True)
    assert other.read_bytes() == b"mine" and not (folder / UNDO_NAME).exists()


def test_other_copies_of_the_weights_are_pointed_out(model, folder):
    (folder / "pytorch_model.bin").write_text("x")
    with pytest.warns(FastpruneWarning, match=r"not pruned: pytorch_model\.bin"):
        fastprune.patch_in_place(folder, mask_for(model))


def test_a_warning_that_is_an_error_comes_before_the_first_byte(model, folder, tmp_path):
    mask = mask_for(model)
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    before = contents(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastpruneWarning)
        with pytest.raises(FastpruneWarning, match="not pruned"):
            fastprune.patch_in_place(folder, mask, backup=True)
        with pytest.raises(FastpruneWarning, match="not pruned"):
            fastprune.patch_checkpoint(folder, mask, tmp_path / "copy")
    assert contents(folder) == before and not (tmp_path / "copy").exists()


@pytest.mark.parametrize("path", [None, "", 3, b"folder"])
def test_what_is_no_path_is_named(model, folder, tmp_path, path):
    mask = mask_for(model)
    for argument, call in (
        ("in_dir", lambda: fastprune.patch_checkpoint(path, mask, tmp_path / "copy")),
        ("out_dir", lambda: fastprune.patch_checkpoint(folder, mask, path)),
        ("folder", lambda: fastprune.patch_in_place(path, mask)),
        ("folder", lambda: fastprune.undo_patch(path)),
        ("path", lambda: mask.save(path)),
        ("path", lambda: PruneMask.load(path)),
    ):
        with pytest.raises(ArgumentError, match=f"^{argument}: expected a path, got "):
            call()
