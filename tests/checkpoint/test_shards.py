"""Which files of a checkpoint folder are the checkpoint, and which tensors, where there are more than one needs."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from safetensors.torch import load, save_file
from support.architectures import HARM, build
from support.pass_statistics import kept
from transformers import AutoModelForCausalLM

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint.patch import patch_in_place, undo_patch
from fastprune.errors import FastpruneWarning, ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One model in shards, and another one in a single file, with a folder for each."""
    build("Llama", seed=1).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    build("Llama").save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


@pytest.mark.parametrize("stale", ["index and shards", "index"])
def test_a_single_file_comes_before_an_index_as_in_transformers(folder: Path, stale: str, tmp_path: Path) -> None:
    if stale == "index":
        for shard in folder.glob("model-*.safetensors"):
            shard.unlink()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = kept(fastprune.score(loaded, CalibrationSet(HARM), progress=False))
    scores = fastprune.score(folder, CalibrationSet(HARM), progress=False)
    assert kept(scores) == expected == kept(fastprune.score(build("Llama"), CalibrationSet(HARM), progress=False))

    mask = scores.select(None, 0.01)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FastpruneWarning)
        patched = [fastprune.patch_checkpoint(folder, mask, tmp_path / "copy"), patch_in_place(folder, mask)]
    ours = [str(warning.message) for warning in caught if warning.category is FastpruneWarning]
    assert sum("not pruned: model-00001-of-" in message for message in ours) == (0 if stale == "index" else 2)
    for place in patched:
        pruned = AutoModelForCausalLM.from_pretrained(place)
        for name, indices in mask.items():
            assert not pruned.get_parameter(name).detach().view(-1)[indices].any()
    undo_patch(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_two_tensors_for_one_weight_are_named(tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    tensors = load((tmp_path / "model.safetensors").read_bytes())
    stripped = {name.removeprefix("model."): tensor.clone() for name, tensor in tensors.items() if "layers.1." in name}
    save_file({**tensors, **stripped}, tmp_path / "model.safetensors", {"format": "pt"})
    one = r"(?:model\.)?layers\.1\.input_layernorm\.weight"
    with pytest.raises(ModelError, match=rf"holds both {one} and {one}, each of which is model\.layers\.1\.input"):
        fastprune.score(tmp_path, CalibrationSet(HARM), progress=False)
