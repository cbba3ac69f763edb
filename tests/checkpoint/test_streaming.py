"""Checkpoints that are streamed from disk: the same bits as in memory, each weight read at most twice, nothing left."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from support.architectures import BENIGN, CONFIGS, HARM, MOE_CONFIGS, build, slow_except

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint import skeleton, streamed
from fastprune.checkpoint.load import load_model
from fastprune.checkpoint.streamed import Streamed
from fastprune.errors import ArgumentError, ArtifactError, ModelError
from fastprune.model import self_check
from fastprune.model.weights import EMBEDDING, HEAD

SETS = (CalibrationSet(HARM).loader(24), CalibrationSet(BENIGN).loader(24))
CPU = torch.device("cpu")


def save(name: str, folder: Path, **changes: object) -> Path:
    """A tiny checkpoint of many shards."""
    build(name, **changes).save_pretrained(folder, max_shard_size="20KB")
    return folder


def resident(folder: Path, dtype: str | torch.dtype = "auto") -> torch.nn.Module:
    """The model, each weight in memory of torch's own as a streamed one is.

    Transformers maps the files, where a weight begins anywhere: on some processors BLAS rounds otherwise there.
    """
    model = load_model(folder, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def lists(scores: fastprune.Scores) -> dict:
    """Everything that was kept, as plain values."""
    return {
        role: {name: (kept.indices.tolist(), kept.values.tolist()) for name, kept in scores.of(role).items()}
        for role in ("harm", "benign")
    }


def score(model: object, segments: int, **settings: object) -> fastprune.Scores:
    settings = {"p_max": 1.0, "q_max": 1.0, "progress": False, **settings}
    return fastprune.score(model, *SETS, segments=segments, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", slow_except([*CONFIGS, *MOE_CONFIGS], "Llama", "GPT2", "Mixtral"))
def test_streamed_equals_resident_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(name, tmp_path, dtype=dtype)
    model = resident(folder)
    expected = score(model, 1)
    n_blocks = model.config.get_text_config().num_hidden_layers
    for segments in (1, 2, n_blocks):
        found = score(folder, segments)
        assert lists(found) == lists(expected), segments
        assert found.provenance == expected.provenance


@pytest.mark.parametrize("offload", ["device", "host", "disk"])
def test_where_hidden_states_lie_makes_no_difference(offload: str, tmp_path: Path) -> None:
    folder = save("Llama", tmp_path)
    assert lists(score(folder, 3, offload=offload)) == lists(score(resident(folder), 1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("segments", [1, 2, 4])
def test_every_weight_is_read_at_most_twice_for_both_sets(
    segments: int, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("Llama", tmp_path, tie_word_embeddings=tied)
    reads: Counter[tuple] = Counter()
    real = skeleton.read_tensor

    def counted(stored, **options):
        reads[stored.path.name, stored.start] += 1
        return real(stored, **options)

    monkeypatch.setattr(skeleton, "read_tensor", counted)
    score(folder, segments)
    assert set(reads.values()) <= {1, 2}
    names = {(stored.path.name, stored.start): name for name, stored in skeleton.stored_tensors(folder).items()}
    of = {names[key]: count for key, count in reads.items()}
    again = 1 if segments == 1 else 2
    assert of["model.embed_tokens.weight"] == (again if tied else 1)
    assert tied or of["lm_head.weight"] == again  # in the self-check, and when the last block has run
    assert of["model.layers.0.mlp.up_proj.weight"] == again
    assert of["model.layers.3.mlp.up_proj.weight"] == 1  # the last segment runs forward and backward in one
    read = sum(
        stored.numel * 4 * reads[stored.path.name, stored.start] for stored in skeleton.stored_tensors(folder).values()
    )
    config = load_model(folder).config
    planned = fastprune.plan(config, len(HARM) + len(BENIGN), 12, segments=segments)
    assert planned.read_bytes == pytest.approx(read, rel=0.01)


def test_weights_are_there_while_they_are_held_and_not_longer(tmp_path: Path) -> None:
    streamed = Streamed(save("Llama", tmp_path), CPU)
    model = streamed.model
    blocks = model.model.layers

    def there() -> list[bool]:
        owners = (model.model.embed_tokens, *(block.mlp.up_proj for block in blocks), model.lm_head, model.model.norm)
        return [not owner.weight.is_meta for owner in owners]

    assert there() == [False, False, False, False, False, False, True]  # the norm belongs to no group and stays
    with streamed.held((EMBEDDING, 0), then=(0, 1)):
        assert there() == [True, True, False, False, False, False, True]
        loaded = blocks[0].mlp.up_proj.weight
    with streamed.held((0, 1), then=(HEAD,)):
        assert blocks[0].mlp.up_proj.weight.data_ptr() == loaded.data_ptr()  # kept, not read again
        assert there() == [False, True, True, False, False, False, True]
    with pytest.raises(RuntimeError, match="inside"), streamed.held((HEAD, 3)):
        assert there() == [False, False, False, False, True, True, True]
        raise RuntimeError("inside")
    assert not any(there()[:-1])
    streamed.close()


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    streamed = Streamed(save("Llama", tmp_path, tie_word_embeddings=True), CPU)
    with streamed.held((EMBEDDING,)):
        assert streamed.model.lm_head.weight is streamed.model.model.embed_tokens.weight
    streamed.close()


@pytest.mark.slow
@pytest.mark.parametrize("difference", ["everywhere", "one number", "none", "dtype"])
def test_a_tied_model_that_stores_both_weights(difference: str, tmp_path: Path, monkeypatch) -> None:
    """Loading ties them if they are equal, and leaves them apart if not."""
    monkeypatch.setattr(skeleton, "_COMPARED", 1000)
    build("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    file, head = tmp_path / "model.safetensors", "lm_head.weight"
    tensors = load_file(file)
    if difference != "everywhere":
        tensors[head] = tensors["model.embed_tokens.weight"].clone()
    if difference == "one number":
        assert 2001 not in skeleton.sample_positions(tensors[head].numel())
        tensors[head].view(-1)[2001] += 1
    if difference == "dtype":  # equal in memory
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
        tensors[head] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, file, {"format": "pt"})

    loaded = resident(tmp_path)
    streamed = Streamed(tmp_path, CPU)
    with streamed.held((EMBEDDING, HEAD)):
        one, two = streamed.model.model.embed_tokens.weight, streamed.model.lm_head.weight
        assert (one is two) == (difference in ("none", "dtype"))
        assert torch.equal(one, loaded.model.embed_tokens.weight) and torch.equal(two, loaded.lm_head.weight)
    streamed.close()
    for segments in (1, 3):
        assert lists(score(tmp_path, segments)) == lists(score(loaded, 1))


def test_an_expert_that_is_missing_on_disk(tmp_path: Path) -> None:
    build("Mixtral").save_pretrained(tmp_path)
    tensors = load((tmp_path / "model.safetensors").read_bytes())
    missing = {name for name in tensors if "layers.2" in name and ".experts.1." in name}
    assert missing
    save_file({name: tensor for name, tensor in tensors.items() if name not in missing}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.2.*should have the shape.*some are missing"):
        score(tmp_path, 3)


def test_weights_of_another_dtype_than_on_disk(tmp_path: Path) -> None:
    folder = save("Llama", tmp_path)
    expected = score(resident(folder, torch.bfloat16), 2)
    assert lists(score(folder, 2, dtype="bfloat16")) == lists(expected)
    assert expected.provenance["model"]["dtype"] == "bfloat16"


def test_a_checkpoint_of_the_base_model_has_other_names(tmp_path: Path) -> None:
    """Guards names on disk without the prefix that they have in memory, as of the published GPT-2."""
    model = build("GPT2")
    model.transformer.save_pretrained(tmp_path)
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "model.safetensors")
    assert lists(score(tmp_path, 2)) == lists(score(resident(tmp_path), 1))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("truncated", ArtifactError, "truncated"),
        ("missing shard", FileNotFoundError, "does not exist"),
        ("missing weight", ModelError, r"lacks 1 of the weights.*model\.layers\.1\.mlp\.up_proj\.weight"),
        ("other shape", ModelError, r"model\.layers\.1\.mlp\.up_proj\.weight should have the shape \(48, 32\)"),
        ("no weights", FileNotFoundError, "neither"),
        ("integers", ArtifactError, "got I32"),
    ],
)
def test_damaged_checkpoints(damage: str, error: type, message: str, tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "no weights":
        file.unlink()
    elif damage == "missing shard":
        file.unlink()  # it would come before the index
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: "absent.safetensors"}}))
    else:
        changed = {
            "missing weight": None,
            "other shape": tensors[name][1:].clone(),
            "integers": tensors[name].to(torch.int32),
        }[damage]
        tensors = {key: value for key, value in {**tensors, name: changed}.items() if value is not None}
        save_file(tensors, file)
    with pytest.raises(error, match=message):
        score(tmp_path, 2)


def test_a_shard_that_ends_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("Llama", tmp_path)
    real = Streamed.held

    def cut_then_held(self, groups, then=()):
        for shard in folder.glob("model-*.safetensors"):
            shard.write_bytes(b"")
        return real(self, groups, then)

    monkeypatch.setattr(streamed.Streamed, "held", cut_then_held)
    with pytest.raises(ArtifactError, match="ended while it was read"):
        score(folder, 2)


def test_a_model_that_does_not_come_apart_cannot_be_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("Llama", tmp_path)
    monkeypatch.setattr(self_check, "disagreement", lambda *args: "a reason")
    with pytest.raises(ModelError, match=r"a reason.*cannot be streamed; load it"):
        score(folder, 1)


@pytest.mark.parametrize("segments", [1, 2])
def test_blocks_that_are_given_one_container_cannot_be_streamed_in_segments(
    segments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards keys and values that later blocks take over from earlier ones, which the first segment does not show."""
    folder = save("Llama", tmp_path)
    layer = type(build("Llama").model.layers[0])
    forward, shared = layer.forward, {}
    monkeypatch.setattr(layer, "forward", lambda self, *args, cache=None, **kwargs: forward(self, *args, **kwargs))
    prologue = self_check.BlockView.prologue

    def with_container(self, batch):
        hidden, arguments = prologue(self, batch)
        for _, kwargs in arguments.calls:
            kwargs["cache"] = shared
        return hidden, arguments

    monkeypatch.setattr(self_check.BlockView, "prologue", with_container)
    if segments == 1:
        assert score(folder, 1).harm
    else:
        with pytest.raises(ModelError, match=r"given one dict.*cannot be streamed"):
            score(folder, 2)


def test_the_check_covers_the_first_segment_of_a_streamed_model(tmp_path: Path, monkeypatch) -> None:
    folder = save("Llama", tmp_path)
    real, seen = self_check.disagreement, []
    monkeypatch.setattr(self_check, "disagreement", lambda *args: seen.append((args[-1], real(*args))) or seen[-1][1])
    score(folder, 2)
    assert seen == [([range(0, 2)], None)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "warp drive"}, "device"),
        ({"dtype": "int3"}, "dtype.*int3"),
        ({"offload": "cloud"}, "offload.*cloud"),
        ({"memory": "1KiB"}, "memory.*need"),
    ],
)
def test_bad_arguments_of_a_streamed_run(settings: dict, message: str, tmp_path: Path) -> None:
    folder = save("Llama", tmp_path)
    with pytest.raises(ArgumentError, match=message):
        fastprune.score(folder, *SETS, progress=False, **settings)


def test_temporary_files_are_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, scratch = save("Llama", tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    score(folder, 3, offload="disk")
    assert not list(scratch.iterdir())
    monkeypatch.setattr("fastprune.scoring.engine.Pass._one_micro_batch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score(folder, 3, offload="disk")
    assert not list(scratch.iterdir())
    shutil.rmtree(scratch)
