"""Configs and other files of a folder that no model can be made of: a clear error, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.architectures import HARM, build
from support.checkpoints import change
from transformers import AutoModelForCausalLM, GPTNeoConfig

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint import built_size
from fastprune.checkpoint.load import load_config, load_model, load_tokenizer
from fastprune.errors import FastpruneError, ModelError, NotFoundError
from fastprune.organism import checkpoint_path

SET = CalibrationSet(HARM)
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


def plan(folder: Path) -> object:
    return fastprune.plan(folder, 8, 16)


def score(folder: Path) -> object:
    return fastprune.score(folder, SET, progress=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    build("Llama").save_pretrained(folder)
    for file in checkpoint_path("aligned").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


NAMED = {
    "num_attention_heads": [0, -4, 10**12],
    "num_key_value_heads": [0],
    "head_dim": [0],
    "hidden_size": [-32, 0, 33, 10**12, "32", [32], 32.0, True],
    "intermediate_size": [10**12, {}],
    "num_hidden_layers": [0, 10**9, [4], None, 4.5],
    "vocab_size": [-1, 10**12, {}],
    "num_labels": [10**9],
    "num_experts": [10**9],
    "sliding_window": [10**30],
    "max_position_embeddings": [10**12, "x"],
    "dtype": ["floaty", [1], 3],
    "torch_dtype": ["nn"],
    "rms_norm_eps": [float("nan"), "x"],
    "attn_implementation": [3, ["sdpa"], "zzz"],
    "tie_word_embeddings": ["x"],
    "rope_parameters": ["x"],
    "layer_types": [["x"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NAMED.items() for value in values])
def test_a_value_that_cannot_be_is_named(key: str, value: object, folder: Path) -> None:
    change(folder, **{key: value})
    words = "hidden size" if value == 33 else "dtype" if key == "torch_dtype" else key
    for call in (plan, score, load_model):
        with pytest.raises(ModelError, match=words):
            call(folder)


OTHER = {
    "activation": {"hidden_act": "nope"},
    "position": {"rope_scaling": {"rope_type": "zzz"}},
    "padding": {"pad_token_id": 10**6},
    "class": {"model_type": "zzz"},
    "class of several": {"model_type": ["llama"]},
    "no causal model": {"model_type": "t5"},
    "code": {"auto_map": {"AutoConfig": 3}},
    "part": {"text_config": 3},
    "property": {"use_return_dict": False},
    "labels": {"id2label": {"a": "b"}},
    "integer dtype": {"dtype": "int8"},
    "eight bits": {"dtype": "float8_e4m3fn"},
    "own sizes": {"per_layer_config": {"0": {"hidden_size": 3}}},
    "depth": {"more": json.loads('{"a":' * 900 + "1" + "}" * 900)},
}


@pytest.mark.parametrize("changes", OTHER.values(), ids=OTHER)
def test_whatever_transformers_raises_is_a_model_error(changes: dict, folder: Path) -> None:
    change(folder, **changes)
    for call in (plan, score, load_model):
        with pytest.raises(ModelError, match=r"^model: "):
            call(folder)


def test_a_config_without_a_class(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    for call in (plan, score, load_model):
        with pytest.raises(ModelError, match="model_type"):
            call(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[1]",
        b"3",
        b'"llama"',
        b'{"model_type": "\xff"}',
        '{"a": 1}'.encode("utf-16"),
        DEEP.encode(),
        b"{",
    ],
    ids=["empty", "null", "list", "number", "text", "not UTF-8", "UTF-16", "deep", "cut"],
)
def test_a_config_that_is_no_object(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    for call in (plan, score, load_model, load_config, load_tokenizer):
        with pytest.raises(ModelError, match=r"config\.json cannot be read as a config"):
            call(folder)


def test_a_config_of_many_megabytes_is_not_parsed(folder: Path) -> None:
    with (folder / "config.json").open("ab") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(ModelError, match="expected at most 16777216 bytes"):
        plan(folder)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 500}, {"vocab_size": 2 * 10**9}, {"head_dim": 10**9}, {"hidden_size": 2 * 10**9}]
)
def test_a_config_that_asks_for_more_than_the_headers_store(changes: dict, folder: Path) -> None:
    """Building it would go on until memory ends."""
    change(folder, **changes)
    for call in (score, load_model):
        with pytest.raises(ModelError, match=r"asks for more weights than it can have.*belong to the weights"):
            call(folder)


def test_building_for_a_plan_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(built_size.build_on_meta, "__defaults__", (30, float("inf")))
    with pytest.raises(ModelError, match="stopped at 31 tensors"):
        plan(folder)


def test_tables_of_positions_are_bounded(tmp_path: Path) -> None:
    """GPT-Neo makes a mask of every position by every other in each block."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 97, "max_position_embeddings": 64}
    config = GPTNeoConfig(attention_types=[[["global"], 2]], **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    change(tmp_path, max_position_embeddings=33_000)
    for call in (score, load_model):
        with pytest.raises(ModelError, match=r"tables that no file holds.*33000, 33000.*positions"):
            call(tmp_path)


TOKENIZER_FILES = {
    "tokenizer.json": [b"", b"{", b"[]", b"\xff", b'{"model": {"type": "BPE", "vocab": 3}}', DEEP.encode()],
    "tokenizer_config.json": [b"{", b"[]", b"\xff", DEEP.encode(), b'{"tokenizer_class": 3}', b'{"auto_map": [3]}'],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, contents in TOKENIZER_FILES.items() for content in contents]
)
def test_broken_tokenizers(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer: .*holds no tokenizer that transformers can read"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"[]", DEEP.encode(), b'{"cache_implementation": "zzz"}'])
def test_a_broken_generation_config(content: bytes, folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load_model(folder)


def as_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize("make", [as_folder, os.mkfifo, lambda file: file.symlink_to(file.name)])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_file_is_not_opened(name: str, make: Callable, folder: Path) -> None:
    """Opening a pipe would wait for its writer for ever."""
    (folder / name).unlink()
    make(folder / name)
    call = load_tokenizer if name == "tokenizer.json" else score
    with pytest.raises(ModelError if name == "tokenizer.json" else NotFoundError):
        call(folder)


def test_a_folder_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def refused(self, *arguments, **options):
        if self.parent == folder:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    for call in (plan, score):
        with pytest.raises(FastpruneError, match="Permission denied"):
            call(folder)
