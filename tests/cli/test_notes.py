"""What the command line says beside its results: what it took for granted, and what was probably meant."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from support.command_line import run

import fastprune
from fastprune.cli.app import program
from fastprune.cli.wording import Wording
from fastprune.errors import ArgumentError, FastpruneWarning, setting
from fastprune.organism import checkpoint_path, export_data

MODEL = checkpoint_path("aligned")


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
    score += ("--force",)

    assert run(*score, "--harm", data["harm"]) == 0
    said = capsys.readouterr()
    assert "harm: 4 rows, 4 of them with a prefill\nbenign: 4 rows, 0 of them with a prefill\n" in said.err
    assert "note:" not in said.err

    assert run(*score, "--harm", misspelt) == 0
    said = capsys.readouterr()
    assert "harm: 4 rows, 0 of them with a prefill\n" in said.err
    assert f"fastprune: note: {misspelt}: column 'prefil' is not used; did you mean 'prefill'?\n" in said.err


def test_a_format_that_was_not_asked_for_is_said_and_kept(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: forgetting `--format chat` left no trace, neither on the terminal nor in the files."""
    scores, mask = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    note = f"fastprune: note: {MODEL} has a chat template, and --format is raw by default"
    for options, formats, noted in (((), "raw", 1), (("--format", "raw"), "raw", 0), (("--format", "chat"), "chat", 0)):
        assert run("score", MODEL, "--harm", data["harm"], "--out", scores, "--force", *options) == 0
        assert capsys.readouterr().err.count(note) == noted
        assert fastprune.Scores.load(scores).provenance["calibration"]["harm"]["format"] == formats
        assert run("select", scores, "-q", 1e-3, "--out", mask, "--force") == 0
        assert fastprune.PruneMask.load(mask).metadata["calibration"]["harm"]["format"] == formats
        assert run("eval", MODEL, "--harm", data["eval_harm"], *options) == 0
        assert capsys.readouterr().err.count(note) == noted


def test_commands_to_go_on_with_can_be_pasted_into_a_shell(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: paths were not quoted."""
    folder = tmp_path / "my files"
    shutil.copytree(MODEL, folder / "model")
    scores, mask, other = (folder / name for name in ("s.safetensors", "m.safetensors", "c.safetensors"))
    for words, following in (
        (("organism", "export", "--out", folder), ["score", str(MODEL), "--harm", str(folder / "harm.jsonl")]),
        (("score", MODEL, "--harm", data["harm"], "--out", scores), ["select", str(scores), "-q", "1e-4"]),
        (("select", scores, "-q", 1e-3, "--out", mask), ["patch", "MODEL", str(mask), "--out", "PRUNED_MODEL"]),
        (("control", folder / "model", mask, "--out", other), ["eval", str(folder / "model"), "--mask", str(mask)]),
        (("patch", folder / "model", mask, "--in-place"), ["patch", "--undo", str(folder / "model")]),
    ):
        assert run(*words) == 0
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith(("next: ", "undo: ")))
        assert shlex.split(line)[1 : len(following) + 2] == ["fastprune", *following]


def test_protecting_nothing_or_what_is_pruned_is_noted(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: both were done without a word."""
    scores, mask = tmp_path / "s.safetensors", tmp_path / "m.safetensors"
    same = "fastprune: note: harm_loader and benign_loader hold the same examples"
    nothing = "fastprune: note: nothing is protected without -p, although the scores hold a benign set\n"
    score = ("score", MODEL, "--harm", data["harm"], "--format", "chat", "--force", "--out", scores)
    select = ("select", scores, "-q", 1e-3, "--force", "--out")
    for words, notes in (
        ((*score, "--benign", data["harm"]), same),
        ((*score, "--benign", data["benign"]), ""),
        ((*select, mask), nothing),
        ((*select, tmp_path / "x", "-p", 1e-3), ""),
        ((*select, tmp_path / "x", "--protect", mask), ""),
        (score, ""),
        ((*select, mask), ""),
    ):
        assert run(*words) == 0
        error = "".join(line for line in capsys.readouterr().err.splitlines(True) if "note: " in line)
        assert error.startswith(notes) if notes else "protect" not in error, words


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (f"…; {setting('strict', False)} applies it", "…; --no-strict applies it"),
        (
            f"{setting('q', 0.5)} and {setting('slice', 1)} needs; score again with {setting('q_max', 1e-5)} or",
            "-q 0.5 and --slice 1 needs; score again with --q-max 1e-05 or",
        ),
        (f"{setting('p', 0.5)}; {setting('p_max', 1.0)}", "-p 0.5; --p-max 1.0"),
        (f"select with {setting('p', None)}", "select with no -p"),
        (f"give more, or {setting('offload', 'disk')}", "give more, or --offload disk"),
        (f"({setting('resume')}, TMPDIR)", "(--resume, TMPDIR)"),
        (f"longer than {setting('max_length', 6)} tokens", "longer than --max-length 6 tokens"),
        (f"use {setting('format', 'raw')} or set x.y", "use --format raw or set x.y"),
        (
            f"pass {setting('template_args', {'enable_thinking': False})}; or",
            "pass --template-args '{\"enable_thinking\": false}'; or",
        ),
        (f"give {setting('finish', 'length')} (or a column finish)", "give --finish length (or a column finish)"),
        (f"{setting('bos', False)}, {setting('system', '')}", "--bos false, --system ''"),
        (f"{setting('n_bits', 4)}", "n_bits=4"),  # no option
        ("/runs/q=0.1/a.safetensors and step=1 stay", "/runs/q=0.1/a.safetensors and step=1 stay"),
    ],
)
def test_messages_are_in_the_words_of_the_command_line(message: str, said: str) -> None:
    """Regression: they told the user of arguments that no command takes."""
    commands = typer.main.get_command(program()).commands
    wording = Wording(parameter for command in commands.values() for parameter in command.params)
    for kind in (ArgumentError, FastpruneWarning):
        assert wording.text(kind(message)) == said
        assert wording.text(kind(message, argument="segments")) == f"--segments: {said}"


def test_messages_and_lists_of_criteria_at_the_command_line(tmp_path: Path, data: dict[str, Path], capsys) -> None:
    """Regression: a space after the comma was part of the criterion's name."""
    scores = tmp_path / "s.safetensors"
    score = ("score", MODEL, "--harm", data["harm"], "--format", "chat", "--force", "--out", scores)
    assert run(*score, "--harm-criterion", "signed, abs", "--q-max", 0.01) == 0
    assert fastprune.Scores.load(scores).criteria["harm"] == ("signed", "abs")
    assert run(*score, "--max-length", 1) == 1
    assert "longer than --max-length 1 tokens" in capsys.readouterr().err
    assert run("select", scores, "-q", 1e-9, "--out", tmp_path / "m") == 1
    assert "error: -q 1e-09 rounds to 0 weights" in capsys.readouterr().err
    for words, option in (
        (("--harm-criterion", "bogus"), "--harm-criterion"),
        (("--segments", 99), "--segments"),
        (("--p-max", 3), "--p-max"),
        (("--batch-tokens", 0), "--batch-tokens"),
        (("--memory", "3"), "--memory"),
        (("--bos", "true"), "--bos"),
    ):
        assert run(*score, *words) == 1
        assert f"error: {option}: " in capsys.readouterr().err
    assert run("eval", MODEL) == 1
    assert "nothing to evaluate: give --harm, --skills or --recognition" in capsys.readouterr().err
