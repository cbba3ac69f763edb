"""``fastprune answer`` and ``generate`` as a user runs them: kills, what is refused at once, what is printed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support.command_line import run

import fastprune
from fastprune.evaluation import Answers
from fastprune.organism import checkpoint_path, export_data

MODEL = checkpoint_path("aligned")
NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (256, 128)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, few = tmp_path_factory.mktemp("rows"), {}
    for name, path in export_data(folder / "all").items():
        few[name] = folder / path.name
        few[name].write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    return few


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    return fastprune.PruneMask({NAME: torch.arange(4000)}, {NAME: SHAPE}).save(tmp_path / "some.safetensors")


def test_kinds_masks_and_attacks_are_answered_and_only_numbers_are_printed(
    rows: dict[str, Path], mask: Path, tmp_path: Path, capsys
) -> None:
    store = tmp_path / "store"
    words = ["answer", MODEL, "--rows", rows["eval_harm"], "--rows", f"skill={rows['eval_skills']}", "--mask", mask]
    words += ["--format", "chat", "--store", store]
    assert run(*words, "--json") == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["store"] == str(store)
    found = {(c["mask"], c["task"], c["attack"]["name"]): c["answers"] for c in facts["counts"]}
    kinds = [("harm", "none"), ("harm", "prefilling"), ("skill", "none")]
    assert found == {(name, *kind): 12 for name in ("none", "some") for kind in kinds}, "a kind that was not named"
    answers = Answers.load(store)
    assert len(answers) == 72
    for text in {a.text for a in answers if len(a.text) > 6} | {row.prompt for row in answers.rows.values()}:
        assert text not in said.out + said.err
    again = capsys.readouterr()
    lines = (store / "answers.jsonl").read_bytes()
    assert run(*words) == 0
    again = capsys.readouterr()
    assert (store / "answers.jsonl").read_bytes() == lines
    assert again.out.splitlines()[0].split() == ["mask", "rows", "attack", "answers", "cut", "unanswered", "tokens"]
    assert f"72 answers in {store}" in again.err
    assert run(*words, "--attack", "prefilling", "--prefill-tokens", "row,1", "--quiet") == 0
    assert len(Answers.load(store)) == 72 + 2 * 24
    assert "texts dropped: 0" not in capsys.readouterr().err
    assert run(*words, "--forget-text") == 0
    assert "texts dropped: 0 answers, which have been judged; 120 keep theirs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "nowhere.csv"], "--rows: expected a file of rows at nowhere.csv, found none"),
        (["--rows", "refusal=no.csv"], "--rows: expected a file of rows at no.csv, found none"),
        (
            ["--max-new-tokens", "rhyme=4"],
            "--max-new-tokens: expected a number of tokens, or KIND=NUMBER with harm",
        ),
        (["--prefill-tokens", "-1"], "--prefill-tokens: expected row, numbers of tokens, or both"),
        (["--device", "cpu", "--device-map", "auto"], "--device: expected --device or --device-map, got both"),
        (["--device", "moon"], "--device: 'moon' cannot be used"),
        (["--store", str(MODEL / "answers")], "--store: expected a folder of its own, got"),
    ],
)
def test_what_can_be_refused_is_before_torch_is_loaded(
    words: list[str], message: str, rows: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("fastprune.checkpoint.load.load_tokenizer", lambda *a: pytest.fail("work was begun"))
    given = ["answer", MODEL, "--store", tmp_path / "store", *words]
    assert run(*given, *([] if "--rows" in words else ["--rows", rows["eval_harm"]])) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature: expected a number from 0 to 100"),
        (["--samples", "2"], "--samples: expected 1 at temperature 0"),
        (["--attack", "none", "--prefill-tokens", "4"], "--prefill-tokens: expected --attack prefilling, got none"),
        (["--rows", "skill=MISSING"], "expected a file of rows"),
    ],
)
def test_other_things_are_refused_by_their_options(
    words: list[str], message: str, rows: dict[str, Path], tmp_path: Path, capsys
) -> None:
    given = ["answer", MODEL, "--rows", rows["eval_harm"], "--format", "chat", "--store", tmp_path / "store", *words]
    assert run(*given) == 1
    assert message in capsys.readouterr().err


def test_a_store_of_another_format_says_so(rows: dict[str, Path], tmp_path: Path, capsys) -> None:
    words = ["answer", MODEL, "--rows", rows["eval_harm"], "--attack", "none", "--store", tmp_path / "store", "--quiet"]
    assert run(*words, "--format", "chat") == 0
    assert run(*words, "--format", "raw") == 1
    assert "--store: expected a store of the same encoding, got" in capsys.readouterr().err


def lines_of(folder: Path) -> dict[str, list[str]]:
    files = [path for path in folder.rglob("*.jsonl") if not path.name.startswith(".")]
    return {path.name: sorted(path.read_text().splitlines()) for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["answer", "generate"])
def test_three_real_kills_change_nothing_in_the_end(command: str, rows: dict[str, Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork

    def start(folder: Path) -> int:
        """The command in a child of its own, forked since imports take longer than its work."""
        folder.mkdir(exist_ok=True)
        drawn = ["--temperature", "1", "--samples", "3", "--batch-size", "2", "--max-new-tokens", "12", "--quiet"]
        if command == "answer":
            given = ["--rows", rows["eval_harm"], "--rows", f"skill={rows['eval_skills']}", "--store", folder / "store"]
        else:
            given = [rows["eval_harm"], "--out", folder / "rows.jsonl"]
        if (child := os.fork()) == 0:
            try:
                os._exit(run(command, MODEL, *given, *drawn, "--format", "chat"))
            finally:
                os._exit(99)
        return child

    def ended(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ended(start(whole)) == 0
    growing = killed / ("store/answers.jsonl" if command == "answer" else ".rows.jsonl.partial")
    seen = 0
    for _ in range(3):
        child, deadline = start(killed), time.monotonic() + 120
        while time.monotonic() < deadline:
            if growing.exists() and growing.read_bytes().count(b"\n") >= seen + 4:
                break
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, "it ended before it was killed"
        seen = growing.read_bytes().count(b"\n")
    assert ended(start(killed)) == 0
    assert lines_of(killed) == lines_of(whole)
    assert sorted(p.name for p in killed.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
