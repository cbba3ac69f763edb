"""What the command line says beside its results: what it took for granted, and what was probably meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastprune
from fastprune.cli import main
from fastprune.organism import checkpoint_path, export_data

MODEL = checkpoint_path("aligned")


def run(*words: object) -> int:
    """The exit status of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows of each kind."""
    files = export_data(tmp_path_factory.mktemp("data"))
    for path in files.values():
        path.write_text("\n".join(path.read_text().splitlines()[:4]))
    return files


def test_score_says_what_it_scores(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: a misspelt `prefill` left the context out of every row, and nothing showed it."""
    rows = [json.loads(line) for line in data["harm"].read_text().splitlines()]
    misspelt = tmp_path / "harm.jsonl"
    misspelt.write_text("\n".join(json.dumps({"prefil": row.pop("prefill"), **row}) for row in rows))
    score = ("score", MODEL, "--benign", data["benign"], "--format", "chat", "--out", tmp_path / "s.safetensors")

    assert run(*score, "--harm", data["harm"]) == 0
    said = capsys.readouterr()
    assert "harm: 4 rows, 4 of them with a prefill\nbenign: 4 rows, 0 of them with a prefill\n" in said.out
    assert "note:" not in said.err

    assert run(*score, "--harm", misspelt) == 0
    said = capsys.readouterr()
    assert "harm: 4 rows, 0 of them with a prefill\n" in said.out
    assert f"fastprune: note: {misspelt}: column 'prefil' is not used; did you mean 'prefill'?\n" in said.err


def test_a_format_that_was_not_asked_for_is_said_and_kept(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: forgetting `--format chat` left no trace, neither on the terminal nor in the files."""
    scores, mask = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    note = f"fastprune: note: {MODEL} has a chat template, and --format is raw by default"
    for options, formats, noted in (((), "raw", 1), (("--format", "raw"), "raw", 0), (("--format", "chat"), "chat", 0)):
        assert run("score", MODEL, "--harm", data["harm"], "--out", scores, *options) == 0
        assert capsys.readouterr().err.count(note) == noted
        assert fastprune.Scores.load(scores).provenance["calibration"]["harm"]["format"] == formats
        assert run("select", scores, "-q", 1e-3, "--out", mask) == 0
        assert fastprune.PruneMask.load(mask).metadata["calibration"]["harm"]["format"] == formats
        assert run("eval", MODEL, "--harm", data["eval_harm"], *options) == 0
        assert capsys.readouterr().err.count(note) == noted
