"""What a command writes never costs an input, and is refused before the work if it cannot be written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.command_line import run

import fastprune
from fastprune.organism import checkpoint_path, export_data


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes time ends the test."""

    def work(*arguments: object, **options: object) -> None:
        raise AssertionError("work was begun")

    for place in (
        "fastprune.checkpoint.load.load_model",
        "fastprune.checkpoint.load.load_tokenizer",
        "fastprune.experiments.run_demo",
        "fastprune.organism.train_organism",
        "fastprune.organism.export_data",
        "fastprune.Scores.load",
        "fastprune.score",
    ):
        monkeypatch.setattr(place, work)


def small_mask(path: Path, metadata: dict | None = None) -> Path:
    """40 weights of the organism's first block."""
    name, shape = "model.layers.0.mlp.up_proj.weight", (384, 128)
    return fastprune.PruneMask({name: torch.arange(40)}, {name: shape}, metadata).save(path)


def commands(model: Path, rows: Path, mask: Path) -> dict[str, tuple[object, ...]]:
    return {
        "score": ("score", model, "--harm", rows),
        "select": ("select", mask, "-q", 0.1),
        "control": ("control", model, mask),
        "eval": ("eval", model, "--harm", rows, "--mask", mask),
        "demo": ("demo",),
        "export": ("organism", "export"),
        "train": ("organism", "train"),
    }


FILES, FOLDERS = ("score", "select", "control"), ("eval", "demo", "export", "train")


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", FILES + FOLDERS)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(name: str, tmp_path: Path, capsys) -> None:
    """Regression: tracebacks of the file system, for `eval` after everything was evaluated."""
    rows, mask, taken = tmp_path / "rows.jsonl", small_mask(tmp_path / "mask.safetensors"), tmp_path / "taken"
    words = commands(checkpoint_path("aligned"), rows, mask)[name]
    taken.mkdir() if name in FILES else taken.write_text("")
    before = sorted(tmp_path.rglob("*"))
    for out in (taken, Path("/proc/x") if name in FOLDERS else Path("/proc/x/y")):
        assert run(*words, "--out", out) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"fastprune: error: --out: expected a {'file' if name in FILES else 'folder'}")
        assert str(out) in error
        assert "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.usefixtures("no_work")
def test_an_output_is_never_an_input(tmp_path: Path, capsys) -> None:
    """Regression: `select s.safetensors --out s.safetensors` replaced hours of scoring by a mask."""
    mask, other = small_mask(tmp_path / "mask.safetensors"), small_mask(tmp_path / "other.safetensors")
    rows, benign, model = tmp_path / "rows.jsonl", tmp_path / "benign.jsonl", tmp_path / "model"
    rows.write_text("{}\n")
    benign.write_text("{}\n")
    shutil.copytree(checkpoint_path("aligned"), model)
    (tmp_path / "link").symlink_to(rows)
    score = ("score", model, "--harm", rows, "--benign", benign)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, out in (
        (score, rows),
        (score, benign),
        (score, tmp_path / "model" / ".." / "rows.jsonl"),
        (score, tmp_path / "link"),
        (score, model / "model.safetensors"),
        (("select", mask, "-q", 0.1), mask),
        (("select", mask, "-q", 0.1, "--protect", other), other),
        (("control", model, mask), mask),
        (("control", model, mask), model / "model.safetensors"),
    ):
        assert run(*words, "--out", out) == 1, words
        assert "which would be overwritten" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("no_work")
def test_nothing_joins_the_weights_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Regression: scores could lie beside the weights, where some loaders read every safetensors file."""
    mask, model = small_mask(tmp_path / "mask.safetensors"), tmp_path / "model"
    shutil.copytree(checkpoint_path("aligned"), model)
    before = sorted(model.iterdir())
    score = ("score", model, "--harm", tmp_path / "rows.jsonl")
    for words in (score, ("control", model, mask)):
        assert run(*words, "--out", model / "new.safetensors") == 1
        assert f"out: expected a file outside of {model}, where some loaders would" in capsys.readouterr().err
    monkeypatch.chdir(model)
    assert run("score", ".", "--harm", "rows.jsonl") == 1
    assert "out: expected a file outside of ., where some loaders would" in capsys.readouterr().err
    assert run(*score, "--out", tmp_path / "scores.safetensors", "--resume", model) == 1
    assert "resume: expected a folder of its own, got the model's" in capsys.readouterr().err
    assert sorted(model.iterdir()) == before


def test_a_trial_leaves_nothing_behind(tmp_path: Path, capsys) -> None:
    mask = small_mask(tmp_path / "mask.safetensors")
    assert run("eval", tmp_path / "nowhere", "--harm", "x.jsonl", "--mask", mask, "--out", tmp_path / "a" / "b") == 1
    assert "nowhere" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [mask]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("-q", 0),
            "q: expected a fraction from 3.1e-05 (one weight of the organism's largest matrix) to 0.5, got 0.0",
        ),
        (("-q", 1.5), "q: expected"),
        (("-p", "nan"), "p: expected"),
        (("-q", 1e-9), "q: expected"),
        (("--seed", -1), "seed: expected"),
        (("--seed", 2**32), "seed: expected"),
        (("--checkpoints", "nowhere"), "expected a checkpoint folder at nowhere/base"),
    ],
)
def test_a_demo_that_cannot_run_writes_nothing(
    words: tuple, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Regression: the rows, or an empty folder, were there when the error came."""
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--out", "demo", *words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_file_system_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastprune.organism.data.json.dumps", full)
    assert run("organism", "export", "--out", tmp_path / "data") == 1
    error = capsys.readouterr().err
    assert error.startswith("fastprune: error: cannot write ") and error.count("\n") == 1
    assert "its disk is full, or a quota is met (No space left on device)" in error


def test_export_still_writes_where_it_may(tmp_path: Path) -> None:
    assert run("organism", "export", "--out", tmp_path / "a" / "data") == 0
    assert run("organism", "export", "--out", tmp_path / "a" / "data") == 0
    expected = export_data(tmp_path / "b")
    assert {path.name for path in (tmp_path / "a" / "data").iterdir()} == {path.name for path in expected.values()}
