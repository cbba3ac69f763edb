"""A checkpoint folder with code in it: none of it is run, whatever is answered, and no pickled file is opened."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.architectures import HARM, build
from support.checkpoints import change
from support.command_line import run

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint.load import load_config, load_model, load_tokenizer
from fastprune.errors import ModelError, NotFoundError
from fastprune.organism import checkpoint_path, load_organism

NAME = "model.layers.0.mlp.up_proj.weight"
SET = CalibrationSet(HARM)


@pytest.fixture(autouse=True)
def yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``yes | fastprune plan FOLDER``."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """A tiny Llama whose config and tokenizer name classes of a module that leaves a mark when it is imported."""
    folder = tmp_path / "model"
    build("Llama").save_pretrained(folder)
    for file in checkpoint_path("aligned").glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "theirs.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
        "from transformers import PreTrainedTokenizerFast as Tokenizer\n"
    )
    change(folder, auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"})
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]})
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "theirs.py", folder / "custom_generate" / "generate.py")
    return folder


CALLS: dict[str, Callable[[Path], object]] = {
    "plan": lambda folder: fastprune.plan(folder, 8, 16),
    "plan of the file": lambda folder: fastprune.plan(folder / "config.json", 8, 16),
    "score": lambda folder: fastprune.score(folder, SET, progress=False),
    "config": load_config,
    "model": load_model,
    "tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_classes_that_only_the_folder_has_are_refused(folder: Path, marker: Path, call: Callable) -> None:
    change(folder, model_type="theirs")
    change(folder, "tokenizer_config.json", tokenizer_class="Theirs")
    with pytest.raises(ModelError, match=r"code of its own \(auto_map\).*load the model yourself and pass it") as error:
        call(folder)
    assert "trust_remote_code" not in str(error.value)  # nobody is told to let it run
    assert not marker.exists()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_classes_that_transformers_has_are_its_own(folder: Path, marker: Path, call: Callable) -> None:
    change(folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    made = call(folder)
    assert type(made).__module__.startswith(("transformers.", "fastprune."))
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["theirs", "llama"])
def test_no_command_runs_code_of_the_folder(kind: str, folder: Path, marker: Path, tmp_path: Path, capsys) -> None:
    change(folder, model_type=kind)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    shape = tuple(load_file(folder / "model.safetensors")[NAME].shape)
    mask = fastprune.PruneMask({NAME: torch.arange(3)}, {NAME: shape}).save(tmp_path / "mask.safetensors")
    statuses = [
        run("plan", folder, "--examples", "8", "--tokens", "16"),
        run("score", folder, "--harm", rows, "--out", tmp_path / "scores.safetensors", "--device", "cpu"),
        run("control", folder, mask, "--out", tmp_path / "control.safetensors"),
        run("eval", folder, "--harm", rows, "--mask", mask, "--out", tmp_path / "report"),
        run("patch", folder, mask, "--out", tmp_path / "patched"),
    ]
    assert not marker.exists(), capsys.readouterr().err
    assert statuses[4] == 0  # a patch is of files, and asks no config
    assert statuses[:4] == [1] * 4 if kind == "theirs" else statuses[0] == statuses[2] == 0


def test_an_organism_of_another_folder(folder: Path, marker: Path) -> None:
    change(folder, model_type="theirs")
    folder.rename(folder.with_name("aligned"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_organism("aligned", root=folder.parent)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "someone/kernel@main:forward"}, "_attn_implementation"),
        ({"attn_implementation": "paged|someone/kernel"}, "attn_implementation"),
        ({"attn_implementation": {"": "sdpa", "text_config": "someone/kernel"}}, "attn_implementation"),
        ({"text_config": {"attn_implementation": {"": {"deep": "someone/kernel"}}}}, r"text_config\.attn_impl"),
        ({"parts": [{}, {"_attn_implementation": "someone/kernel"}]}, r"parts\[1\]\._attn_implementation"),
        ({"experts_implementation": "someone/kernel"}, "experts_implementation"),
        ({"_experts_implementation": {"": "someone/kernel"}}, "_experts_implementation"),
    ],
)
def test_a_repository_of_kernels_is_refused_by_name(changes: dict, place: str, tmp_path: Path) -> None:
    build("Llama").save_pretrained(tmp_path)
    change(tmp_path, **changes)
    for call in (load_config, load_model, CALLS["plan"], CALLS["score"]):
        with pytest.raises(ModelError, match=rf"config\.json: {place}.*someone/kernel.*load the model yourself"):
            call(tmp_path)


def test_an_attention_that_is_not_installed_is_not_downloaded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    build("Llama").save_pretrained(tmp_path)
    change(tmp_path, attn_implementation="flash_attention_2")
    for call in (load_config, load_model, CALLS["plan"], CALLS["score"]):
        with pytest.raises(ModelError, match=r"attn_implementation: .*'flash_attention_2'.*install"):
            call(tmp_path)


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_nothing_is_unpickled(name: str, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "model"
    build("Llama").save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    for call in (load_model, CALLS["score"]):
        with pytest.raises(NotFoundError, match=r"neither model\.safetensors nor .*other formats are not read"):
            call(folder)
    change(folder, transformers_weights=name)
    for call in (load_model, CALLS["score"]):
        with pytest.raises(ModelError, match=r"config\.json: transformers_weights"):
            call(folder)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["transformers_weights", "configuration_files", "fusion_config"])
def test_a_config_that_leads_to_other_files_or_layers_is_refused(key: str, tmp_path: Path) -> None:
    """What is loaded for an evaluation would not be what is scored and patched."""
    build("Llama").save_pretrained(tmp_path)
    value = {"transformers_weights": "other.safetensors", "configuration_files": ["config.1.0.0.json"]}
    change(tmp_path, **{key: value.get(key, {"patch_embeddings": True})})
    for call in (load_model, CALLS["plan"], CALLS["score"]):
        with pytest.raises(ModelError, match=rf"config\.json: {key}: .*remove it"):
            call(tmp_path)


def test_adapters_in_the_folder_are_refused(tmp_path: Path) -> None:
    """transformers adds them where peft is installed; a streamed model has none."""
    build("Llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for call in (load_model, CALLS["plan"], CALLS["score"]):
        with pytest.raises(ModelError, match=r"adapter_config\.json.*merge"):
            call(tmp_path)


def test_a_distributed_checkpoint_beside_the_weights_is_refused(tmp_path: Path) -> None:
    """transformers would read it and leave model.safetensors alone."""
    build("Llama").save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "shard-00000-model-00001-of-00001.safetensors")
    for call in (load_model, CALLS["score"]):
        with pytest.raises(ModelError, match="distributed checkpoint"):
            call(tmp_path)
