"""What commands never cost: other people's files, files of other kinds, results that took long."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.command_line import run

import fastprune
from fastprune.artifact import kind_of
from fastprune.errors import ArgumentError
from fastprune.organism import checkpoint_path, export_data, load_organism
from fastprune.planning.list_lengths import stored_bytes
from fastprune.reporting import write_report
from fastprune.scoring.scores import Scores


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few rows, their scores and a mask."""
    folder = tmp_path_factory.mktemp("made")
    rows = export_data(folder / "data")["harm"].read_text().splitlines(keepends=True)[:4]
    (folder / "harm.jsonl").write_text("".join(rows))
    model, tokenizer = load_organism("aligned")
    harm = fastprune.load_calibration(folder / "harm.jsonl", tokenizer, format="chat")
    scores = fastprune.score(model, harm, q_max=1e-2, progress=False)
    scores.save(folder / "scores.safetensors")
    scores.select(None, 3e-3).save(folder / "mask.safetensors")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "work")
    shutil.copytree(checkpoint_path("aligned"), tmp_path / "work" / "model")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


SELECT = ("select", "scores.safetensors", "-q", 3e-3)
SCORE = ("score", "model", "--harm", "harm.jsonl", "--format", "chat", "--q-max", 1e-2)


@pytest.mark.parametrize(
    ("words", "out", "message"),
    [
        (SELECT, "model/mask.safetensors", "outside of .*model, where some loaders would take it for weights"),
        (SELECT, "model/model.safetensors", "outside of .*model, where some loaders"),
        (SCORE, "model/deep/scores.safetensors", "outside of model, where some loaders"),
        (("control", "model", "mask.safetensors"), "model/deep/control.safetensors", "outside of model"),
        (SELECT, "model/config.json", "mask file to replace, got model/config.json, which fastprune did not write"),
        (SELECT, "thesis.txt", "a new name, or a mask file to replace, got thesis.txt, which fastprune did not write"),
        (SELECT, "other.safetensors", "a mask file to replace, got other.safetensors, a scores file"),
        (SCORE, "mask.safetensors", "a scores file to replace, got mask.safetensors, a mask file"),
        (SELECT, "hard.safetensors", "another file than the inputs"),
        (SELECT, "link.safetensors", "another file than the inputs"),
        (SELECT, "pipe", "a mask file to replace, got pipe, which fastprune did not write"),
        ((*SCORE, "--resume", "journal"), "journal/scores.safetensors", "outside of the journal journal"),
        ((*SCORE, "--resume", "journal"), "through/scores.safetensors", "outside of the journal journal"),
    ],
)
def test_an_output_costs_nothing(words: tuple, out: str, message: str, work: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("fastprune.score", lambda *args, **kwargs: pytest.fail("the pass was begun"))
    (work / "model" / "deep").mkdir()
    (work / "journal").mkdir()
    (work / "through").symlink_to("journal")
    (work / "thesis.txt").write_text("chapter 1")
    shutil.copy("scores.safetensors", "other.safetensors")
    os.link("scores.safetensors", "hard.safetensors")
    (work / "link.safetensors").symlink_to("scores.safetensors")
    os.mkfifo("pipe")  # as /dev/null: no regular file, and a rename would take its place
    before = contents(work)
    assert run(*words, "--out", out) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastprune: error: --out: expected ")
    assert re.search(message, error), error
    assert contents(work) == before and Path("pipe").is_fifo()


def test_a_finished_command_can_run_again(work: Path) -> None:
    Path("empty.safetensors").touch()
    Path("dangling.safetensors").symlink_to("new.safetensors")
    for out in ("mask.safetensors", "mask.safetensors", "empty.safetensors", "dangling.safetensors"):
        assert run(*SELECT, "--out", out, *(("--force",) if out == "mask.safetensors" else ())) == 0
        assert fastprune.PruneMask.load(out).total > 0
    assert Path("dangling.safetensors").is_symlink() and kind_of(Path("new.safetensors")) == "mask"
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("folder", ["model", "model/deep", "through"])
def test_a_journal_stays_out_of_a_checkpoint(folder: str, work: Path, capsys) -> None:
    (work / "through").symlink_to("model")
    before = contents(work)
    assert run(*SCORE, "--resume", folder) == 1
    assert "resume: expected a folder of its own, got the model's" in capsys.readouterr().err
    assert contents(work) == before


HOLDING = """
import sys
import fastprune.checkpoint.load
from fastprune.cli import main
def hold(*args):
    print("holding", flush=True)
    sys.stdin.readline()
    sys.exit(7)
fastprune.Scores.load = hold
main(sys.argv[1:])
"""


def test_two_commands_do_not_write_one_file(work: Path, capsys) -> None:
    """Regression: the second to finish replaced what the first had written, without a word."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fastprune.__file__).parent.parent)}
    words = [sys.executable, "-c", HOLDING, *map(str, SELECT), "--out", "new.safetensors"]
    first = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert first.stdout.readline() == b"holding\n"
    assert run(*SELECT, "--out", "new.safetensors") == 1
    error = capsys.readouterr().err
    assert "out: expected a name that nobody else is writing to" in error and "another process is writing now" in error
    assert not Path("new.safetensors").exists()
    assert run(*SELECT, "--out", "other.safetensors") == 0
    first.communicate(b"\n", timeout=60)
    assert first.returncode == 7
    assert run(*SELECT, "--out", "new.safetensors") == 0
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_two_commands_do_not_write_one_folder(work: Path, monkeypatch, capsys) -> None:
    def second(*args: object, **kwargs: object) -> None:
        assert run("organism", "export", "--out", "new") == 1
        assert "nobody else is writing to, got new, which another process" in capsys.readouterr().err
        raise KeyboardInterrupt

    monkeypatch.setattr("fastprune.experiments.run_demo", second)
    assert run("demo", "--out", "new") == 130
    assert not Path("new").exists()


REPORT = ["record.json", "report.html", "report.md", "sweep.png"]


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command in ("demo", "eval") for name in REPORT]
    + [("demo", "scores.safetensors"), ("demo", "mask.safetensors")],
)
def test_a_report_replaces_nobodys_files(command: str, name: str, work: Path, monkeypatch, capsys) -> None:
    """Regression: a folder with a record.json or a sweep.png of somebody else's lost it."""
    for begun in ("fastprune.experiments.run_demo", "fastprune.checkpoint.load.load_tokenizer"):
        monkeypatch.setattr(begun, lambda *args, **kwargs: pytest.fail("work was begun"))
    Path("mine").mkdir()
    Path("mine", name).write_text('{"title": "mine"}')
    words = ("demo",) if command == "demo" else ("eval", "model", "--harm", "harm.jsonl")
    before = contents(work)
    assert run(*words, "--out", "mine") == 1
    error = capsys.readouterr().err
    assert "expected" in error and name in error
    assert contents(work) == before
    if not name.endswith(".safetensors"):
        with pytest.raises(ArgumentError, match=f"out_dir: expected a folder without {name}"):
            write_report({}, "mine")
        assert contents(work) == before


def test_a_report_replaces_an_earlier_one(work: Path) -> None:
    for title in ("one", "two"):
        write_report({"title": title}, "report")
    assert json.loads(Path("report", "record.json").read_text())["title"] == "two"
    Path("report", "record.json").write_text('{"schema": 0}')  # of another version
    write_report({"title": "three"}, "report")


def test_a_report_stays_out_of_a_checkpoint(work: Path, capsys) -> None:
    before = contents(work)
    for words in (("demo",), ("eval", "model", "--harm", "harm.jsonl"), ("organism", "export")):
        assert run(*words, "--out", "model") == 1
        assert "out: expected a folder of its own, got the checkpoint model" in capsys.readouterr().err
    assert contents(work) == before


def test_an_export_replaces_nobodys_rows(work: Path, capsys) -> None:
    """Regression: a user's harm.jsonl was replaced."""
    for text in ('{"prompt": "how", "response": "so"}\n', "not JSON", '{"prompt": "p", "id": 3}\n', "[1]\n"):
        Path("rows").mkdir(exist_ok=True)
        Path("rows", "benign.jsonl").write_text(text)
        assert run("organism", "export", "--out", "rows") == 1
        assert "expected a folder without benign.jsonl, or one of an earlier export" in capsys.readouterr().err
        assert [path.name for path in Path("rows").iterdir()] == ["benign.jsonl"]
        assert Path("rows", "benign.jsonl").read_text() == text
    Path("rows", "benign.jsonl").write_text("")
    assert run("organism", "export", "--out", "rows") == 0
    before = contents(Path("rows"))
    assert run("organism", "export", "--out", "rows", "--seed", 1) == 1
    assert "--force" in capsys.readouterr().err and contents(Path("rows")) == before
    assert run("organism", "export", "--out", "rows", "--seed", 1, "--force") == 0
    assert contents(Path("rows")) != before


def test_a_pass_without_room_for_its_scores_is_not_begun(work: Path, monkeypatch, capsys) -> None:
    """Regression: an hour of work, and then no space left."""
    monkeypatch.setattr("fastprune.score", lambda *args, **kwargs: pytest.fail("the pass was begun"))
    real = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: real._replace(free=1 << 20))
    assert run(*SCORE, "--out", "new.safetensors", "--harm-criterion", "signed,abs") == 1
    error = capsys.readouterr().err
    assert "out new.safetensors: expected " in error and "got 1.00 MiB" in error


def test_what_scores_need_is_what_they_take(work: Path) -> None:
    scores = Scores.load("scores.safetensors")
    entries = sum(map(len, scores.harm.values()))
    needed = stored_bytes([torch.Size(shape).numel() for shape in scores.shapes.values()], [1e-2])
    assert 0.5 * 12 * entries <= needed <= 12 * entries <= Path("scores.safetensors").stat().st_size


@pytest.mark.parametrize("resume", [True, False])
def test_scores_that_cannot_be_written_are_not_lost(resume: bool, work: Path, monkeypatch, capsys) -> None:
    real, temporary = Scores.save, work / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def full(self: Scores, path: Path) -> Path:
        if path.parent == Path("full"):
            raise OSError(28, "No space left on device")
        return real(self, path)

    Path("full").mkdir()
    monkeypatch.setattr(Scores, "save", full)
    words = (*SCORE, "--out", "full/new.safetensors", *(("--resume", "journal") if resume else ()))
    assert run(*words) == 1
    came = capsys.readouterr()
    (found,) = temporary.glob("fastprune-result-*/new.safetensors")
    assert f"the result is not lost: it is in {found}" in came.err and "No space left" in came.err
    assert ("with --resume journal, writes them without another pass" in came.err) == resume
    assert Scores.load(found).select(None, 3e-3) == fastprune.PruneMask.load("mask.safetensors")

    monkeypatch.setattr(Scores, "save", lambda self, path: full(self, Path("full") / "x"))
    assert run(*words) == 1
    assert "not lost" not in capsys.readouterr().err
    assert [path.parent for path in temporary.glob("*/*")] == [found.parent]
