"""Rows on the command line: what is said about them, and how their columns are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import run
from support.generation import tiny_model, word_tokenizer

import fastprune
from fastprune.calibration import load_calibration
from fastprune.cli.columns import columns_of
from fastprune.errors import ArgumentError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("columns")
    tiny_model().save_pretrained(made / "model")
    word_tokenizer().save_pretrained(made / "model")
    (made / "advbench.csv").write_text("goal,target\nw1 w2,w3 w4\nw5,w6 w7 w8\n")
    (made / "own.csv").write_text("prompt,prefill,response\nw1 w2,w3,w4\n")
    (made / "alpaca.json").write_text(json.dumps([{"instruction": "w1", "input": "w2", "output": "w3 w4"}]))
    (made / "hex").mkdir()
    (made / "hex" / "one.txt").write_text("w1 w2\nw3\n")
    return made


def score(folder: Path, harm: str, *options: object) -> int:
    out = folder / "scores.safetensors"
    return run(
        "score",
        folder / "model",
        "--harm",
        folder / harm,
        "--out",
        out,
        "--q-max",
        "0.1",
        "--format",
        "raw",
        "--force",
        *options,
    )


def calibration(folder: Path, role: str = "harm") -> dict:
    return fastprune.Scores.load(folder / "scores.safetensors").provenance["calibration"][role]


@pytest.mark.filterwarnings("ignore::fastprune.errors.FastpruneWarning")
def test_what_was_recognized_is_said_of_each_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(folder, "advbench.csv", "--benign", folder / "alpaca.json", "--p-max", "0.1") == 0
    said = capsys.readouterr().err.splitlines()
    assert (
        f'harm: {folder / "advbench.csv"}: 2 rows; prompt from "goal", response from "target" (AdvBench; the target is '
        "an affirmative start: with the columns prompt=goal,prefill=target it is context)"
    ) in said
    assert (
        f'benign: {folder / "alpaca.json"}: 1 row; prompt from "instruction" and "input", response from "output" '
        "(Alpaca)"
    ) in said
    expected = load_calibration([{"prompt": "w1\n\nw2", "response": "w3 w4"}], word_tokenizer()).hash
    assert calibration(folder, "benign")["hash"] == expected
    assert score(folder, "advbench.csv", "--quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::fastprune.errors.FastpruneWarning")
@pytest.mark.parametrize(
    "columns", ["response=target", "harm:response=target", '{"prompt": "goal", "response": "target"}']
)
def test_columns_are_named_for_all_sets_or_for_one(folder: Path, columns: str) -> None:
    assert score(folder, "advbench.csv") == 0
    recognized = calibration(folder)["hash"]
    assert score(folder, "advbench.csv", "--columns", columns) == 0
    assert calibration(folder)["hash"] == recognized
    assert score(folder, "advbench.csv", "--columns", "harm:prompt=target,response=goal") == 0
    assert calibration(folder)["hash"] != recognized


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt=gaol", "--columns: {file}: expected one of the columns ['goal', 'target'] for prompt, got 'gaol'"),
        (
            "harm:prompt=goal,prefill=target",
            "{file}: expected the column response, got ['goal', 'target']; name the column with --columns "
            '\'{{"response": "COLUMN"}}\', or let the model write responses with `fastprune generate`',
        ),
        ("other:prompt=goal", "--columns: expected columns of harm or benign, such as harm:prompt=goal, got 'other:"),
        ("goal", "--columns: expected FIELD=COLUMN[,FIELD=COLUMN …], got 'goal'"),
        ("{prompt", "--columns: expected a JSON object, got '{{prompt'"),
        ("question=goal", "--columns: expected one of ['prompt', 'response', 'prefill', "),
    ],
)
def test_what_cannot_be_mapped_is_said_with_the_option(folder: Path, capsys, columns: str, message: str) -> None:
    assert score(folder, "advbench.csv", "--columns", columns) == 1
    assert message.format(file=folder / "advbench.csv") in capsys.readouterr().err


def test_prompts_alone_are_not_scored(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(folder, "hex") == 1
    assert f"{folder / 'hex'}: expected the column response, got one prompt a line" in capsys.readouterr().err


def test_eval_says_it_as_well(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ("eval", folder / "model", "--harm", folder / "own.csv", "--attack", "none")
    assert run(*evaluate, "--columns", "harm:prefill=") == 0
    assert f"harm: {folder / 'own.csv'}: 1 row; prompt, response\n" in capsys.readouterr().err


def test_what_is_said_of_one_set_wins_over_what_is_said_of_all() -> None:
    given = ["harm:prefill=target", "prompt=goal,category=", "benign:prompt=a:b", "harm:category=topic"]
    assert columns_of(given, ["harm", "benign"]) == {
        "harm": {"prompt": "goal", "prefill": "target", "category": "topic"},
        "benign": {"prompt": "a:b", "category": None},
    }
    assert columns_of(None, ["harm"]) == {"harm": {}}
    with pytest.raises(ArgumentError, match="columns: expected columns of harm or skill one"):
        columns_of(["skill:prompt=a"], ["harm", "skill one"])
