"""What every command has in common: streams, ``--json``, ``--quiet``, ``--force``, ``-h``, missing inputs."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import torch
import typer
from support.command_line import run

import fastprune
from fastprune import errors
from fastprune.cli.app import COMMANDS, program
from fastprune.cli.frame import Run, command
from fastprune.cli.inputs import InputPath
from fastprune.cli.outputs import OutputFile
from fastprune.errors import ArgumentError, FastpruneError, FastpruneWarning, setting
from fastprune.organism import checkpoint_path, export_data

MODEL = checkpoint_path("aligned")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows of each kind, their scores, and a mask."""
    folder = tmp_path_factory.mktemp("made")
    files = export_data(folder)
    for path in files.values():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    files |= {"scores": folder / "scores.safetensors", "mask": folder / "mask.safetensors"}
    sets = ("--harm", files["harm"], "--benign", files["benign"])
    assert run("score", MODEL, *sets, "--format", "chat", "--out", files["scores"], "--quiet") == 0
    assert run("select", files["scores"], "-p", 1e-3, "-q", 1e-3, "--out", files["mask"], "--quiet") == 0
    return files


def calls(made: dict[str, Path], folder: Path) -> dict[str, tuple[object, ...]]:
    """A call of each command that takes no time, with an output in the folder."""
    rows = ("--harm", made["harm"], "--benign", made["benign"], "--format", "chat")
    return {
        "score": ("score", MODEL, *rows, "--out", folder / "s.safetensors"),
        "select": ("select", made["scores"], "-p", 1e-3, "-q", 1e-3, "--out", folder / "m.safetensors"),
        "patch": ("patch", MODEL, made["mask"], "--no-strict", "--out", folder / "pruned"),
        "plan": ("plan", MODEL),
        "control": ("control", MODEL, made["mask"], "--out", folder / "c.safetensors"),
        "generate": ("generate", MODEL, made["eval_harm"], *rows[-2:], "--out", folder / "rows.jsonl"),
        "eval": ("eval", MODEL, "--mask", made["mask"], "--harm", made["eval_harm"], "--out", folder / "report"),
        "organism export": ("organism", "export", "--out", folder / "rows"),
    }


QUICK = ("score", "select", "patch", "plan", "control", "generate", "eval", "organism export")


@pytest.mark.parametrize("name", QUICK)
def test_json_is_one_document_and_quiet_says_nothing(name: str, made: dict[str, Path], tmp_path: Path, capfd) -> None:
    assert run(*calls(made, tmp_path)[name], "--json", "--quiet") == 0
    said = capfd.readouterr()
    assert isinstance(json.loads(said.out, parse_constant=pytest.fail), dict)
    assert said.err == ""


@pytest.mark.parametrize("name", QUICK)
def test_results_and_talk_take_two_streams(name: str, made: dict[str, Path], tmp_path: Path, capfd) -> None:
    words = calls(made, tmp_path)[name]
    assert run(*words) == 0
    said = capfd.readouterr()
    assert said.out.strip() and not any(word in said.out for word in ("next:", "undo:", "written to", "note:"))
    assert name == "plan" or said.err.strip()


@pytest.mark.parametrize("name", ["score", "select", "control", "eval"])
def test_nothing_is_overwritten_without_force(
    name: str, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Regression: a second `select` replaced the mask of the first without a word."""
    words = calls(made, tmp_path)[name]
    assert run(*words) == 0
    out = Path(words[words.index("--out") + 1])
    files = [path for path in (out.rglob("*") if out.is_dir() else [out]) if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    capsys.readouterr()
    with monkeypatch.context() as patched:
        for work in ("fastprune.Scores.load", "fastprune.PruneMask.load", "fastprune.checkpoint.load.load_tokenizer"):
            patched.setattr(work, lambda *args, **options: pytest.fail("work was begun"))
        assert run(*words) == 1
    error = capsys.readouterr().err
    assert "error: --out: expected a new" in error and "--force" in error
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files} == before
    assert run(*words, "--force") == 0
    assert files[0].stat().st_mtime_ns > before[files[0]][1]


def test_a_journal_continues_over_its_own_scores(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    words = (*calls(made, tmp_path)["score"], "--resume", tmp_path / "journal")
    assert run(*words) == 0
    assert run(*words) == 0
    (tmp_path / "journal" / "journal.jsonl").unlink()
    assert run(*words) == 1
    assert "--force" in capsys.readouterr().err


def test_the_demonstration_is_run_again_over_itself_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    def begun(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastprune.experiments.run_demo", begun)
    record = tmp_path / "record.json"
    for title, status in (("fastprune on the model organism", 130), ("Evaluation of mine", 1)):
        record.write_text(json.dumps({"schema": 1, "title": title}))
        assert run("demo", "--out", tmp_path) == status
    assert "--force" in capsys.readouterr().err
    assert run("demo", "--out", tmp_path, "--force") == 130


MISSING = {
    "score": ("score", "nowhere", "--harm", "no.jsonl", "--benign", "none.jsonl"),
    "select": ("select", "no.safetensors", "-q", "0.1", "--protect", "none.safetensors"),
    "patch": ("patch", "nowhere", "no.safetensors", "--out", "x"),
    "plan": ("plan", "nowhere"),
    "control": ("control", "nowhere", "no.safetensors"),
    "eval": ("eval", "nowhere", "--harm", "no.jsonl", "--mask", "no.safetensors", "--out", "report"),
    "demo": ("demo", "--checkpoints", "nowhere"),
}


def test_a_missing_input_is_found_before_torch_is_loaded(tmp_path: Path) -> None:
    """Regression: a misspelt path was answered after seconds of imports."""
    code = (
        "import sys\nfrom fastprune.cli import main\n"
        f"for words in {list(MISSING.values())!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: print(stop.code, end=' ')\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(fastprune.__file__).parent.parent)},
        check=False,
    )
    assert done.stdout.split("[")[0].split() == ["1"] * len(MISSING), done.stderr
    assert done.stdout.endswith("[]\n")
    errors = done.stderr.splitlines()
    for error, words in zip(errors, MISSING.values(), strict=True):
        assert all(word in error for word in words if word.startswith("no")), error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_common_options(name: str, capsys) -> None:
    for option in ("-h", "--help"):
        assert run(*name.split(), option) == 0
    assert capsys.readouterr().out.count("Usage:") == 2
    found = typer.main.get_command(program())
    for word in name.split():
        found = found.commands[word]
    options = {option for parameter in found.params for option in parameter.opts}
    assert {"--json", "--quiet"} <= options
    assert ("--force" in options) == (name not in ("plan", "patch", "answer"))  # a store is added to
    assert all(parameter.help for parameter in found.params), "an option without help"


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\nfrom fastprune.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def masks_of(made: dict[str, Path], folder: Path, **formats: str) -> list[object]:
    words: list[object] = []
    for name, kind in formats.items():
        mask = fastprune.PruneMask.load(made["mask"])
        mask.metadata["calibration"]["harm"]["format"] = kind
        words += ["--mask", mask.save(folder / f"{name}.safetensors")]
    return words


def test_eval_encodes_rows_as_those_behind_the_mask(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    """Regression: a mask of the chat format was measured on raw text unless --format was repeated."""
    control = tmp_path / "control.safetensors"
    assert run("control", MODEL, made["mask"], "--out", control) == 0
    words = ("eval", MODEL, "--harm", made["eval_harm"], "--json", "--quiet")
    one, two = masks_of(made, tmp_path, one="chat"), masks_of(made, tmp_path, one="chat", two="raw")
    for masks, options, expected, said in (
        (one, (), "chat", ""),
        (("--mask", control), (), "chat", ""),
        (one, ("--format", "raw"), "raw", "note: one was made with --format chat, and --format raw is used\n"),
        (two, ("--format", "chat"), "chat", "note: two was made with --format raw, and --format chat is used\n"),
        ((), (), "raw", "has a chat template, and --format is raw by default"),
    ):
        capsys.readouterr()
        assert run(*words, *masks, *options) == 0
        came = capsys.readouterr()
        assert json.loads(came.out)["settings"]["format"] == expected
        assert said in came.err if said else not came.err
    assert run(*words, *two) == 1
    assert "error: --format: expected masks that were made alike, got chat (one), raw (two)" in capsys.readouterr().err


def test_a_system_turn_of_the_mask_is_missed(made: dict[str, Path], tmp_path: Path, capsys) -> None:
    mask = fastprune.PruneMask.load(made["mask"])
    mask.metadata["calibration"]["harm"]["template"]["system_sha256"] = "0" * 64
    words = ("eval", MODEL, "--harm", made["eval_harm"], "--mask", mask.save(tmp_path / "m.safetensors"))
    assert run(*words) == 0
    assert "note: m was made with a system turn, and none is given with --system" in capsys.readouterr().err


@command(names={"fraction": "q"})
def new(
    run: Run,
    rows: Annotated[Path, InputPath("file of rows"), typer.Argument()],
    out: Annotated[Path, OutputFile("mask"), typer.Option()],
    q: Annotated[float, typer.Option("-q")] = 0.5,
) -> None:
    """A command of a later day."""
    if q > 1:
        raise ArgumentError(f"expected less, got {q}; try {setting('fraction', 0.1)}", argument="fraction")
    run.talk("talk")
    run.result({"out": out, "rate": float("nan")}, "result")


def test_a_new_command_gets_all_of_it_from_its_declaration(tmp_path: Path, capsys) -> None:
    app = typer.Typer()
    app.command()(new)

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            app(list(map(str, words)))
        return (stop.value.code, *capsys.readouterr())

    out = tmp_path / "out.safetensors"
    status, _, error = call(tmp_path / "none", "--out", out)
    assert status == 1 and error.startswith("fastprune: error: rows: expected a file of rows at ")
    rows = tmp_path / "rows"
    rows.touch()
    assert call(rows, "--out", out) == (0, "result\n", "talk\n")
    assert call(rows, "--out", out, "--quiet") == (0, "result\n", "")
    status, text, _ = call(rows, "--out", out, "--json")
    assert status == 0 and json.loads(text) == {"out": str(out), "rate": None}
    assert call(rows, "--out", out, "-q", 2)[2] == "fastprune: error: -q: expected less, got 2.0; try -q 0.1\n"
    fastprune.PruneMask({"w": torch.arange(2)}, {"w": (2, 2)}).save(out)
    assert "give --force to replace it" in call(rows, "--out", out)[2]
    assert call(rows, "--out", out, "--force")[0] == 0


KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, FastpruneError | FastpruneWarning)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_keep_their_arguments_on_the_way_between_processes(kind: type[FastpruneError]) -> None:
    error = kind(f"expected less; give {setting('q_max', 1e-5)} or {setting('resume')}", argument="q")
    error.extra = 3
    for found in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(found) is kind and found.extra == 3
        assert str(found) == "q: expected less; give q_max=1e-05 or resume="
        assert found.argument == "q" and found.args == (str(found),)
        assert found.spelled(lambda name, value: f"<{name} {value}>") == (
            "<q >: expected less; give <q_max 1e-05> or <resume >"
        )
    assert str(kind("plain")) == "plain" and kind("plain").argument is None
    assert str(kind()) == "" and repr(kind("a")) == f"{kind.__name__}('a')"
