"""A command that is stopped says so, leaves nothing behind, and tells how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune
from fastprune.cli import main
from fastprune.organism import checkpoint_path, export_data

# A scoring that waits, with hidden states on disk, until it is stopped.
WAITING = """
import sys, time
from fastprune.cli import main
from fastprune.scoring.activation_store import ActivationStore

def get(*arguments):
    print("waiting", flush=True)
    time.sleep(100)

ActivationStore.get = get
main(sys.argv[1:])
"""


@pytest.mark.parametrize("resume", [None, "the journal"])
def test_ctrl_c_is_one_line_and_says_how_to_go_on(
    resume: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Regression: nothing was said."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastprune.load_calibration", interrupted)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}')
    words = [
        "score",
        str(checkpoint_path("aligned")),
        "--quiet",
        "--harm",
        "x.jsonl",
        "--out",
        str(tmp_path / "s"),
        "--format",
        "raw",
    ]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--resume", resume] if resume else words)
    assert stop.value.code == 130
    hint = "fastprune: note: the same command, with --resume 'the journal', goes on from here\n"
    assert capsys.readouterr().err == (hint if resume else "") + "fastprune: interrupted\n"


@pytest.mark.slow
def test_sigterm_removes_temporary_files(tmp_path: Path) -> None:
    """Regression: the folder of the hidden states stayed behind, which a scheduler's time limit fills a disk with."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    harm = export_data(tmp_path / "data")["harm"]
    words = ["score", checkpoint_path("aligned"), "--harm", harm, "--out", tmp_path / "s", "--format", "chat"]
    words += ["--quiet", "--segments", 2, "--offload", "disk", "--device", "cpu"]
    root = str(Path(fastprune.__file__).parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", WAITING, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "TMPDIR": str(temporary)},
    )
    try:
        assert any(line == "waiting\n" for line in child.stdout)
        assert list(temporary.glob("fastprune-*"))
        child.send_signal(signal.SIGTERM)
        errors = child.communicate(timeout=60)[1]
    finally:
        child.kill()
    assert child.returncode == 143
    assert errors == "fastprune: terminated\n"
    assert not list(temporary.iterdir())
