"""``benchmarks/gpu_check.sh`` says what is wrong with its arguments, and goes on after a step that failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


def run(*arguments: str | Path, python: str | Path = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def broken_python(tmp_path: Path) -> Path:
    """An interpreter for which everything fails but the script's own questions and records."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/bash
case $2 in
  *json.dumps*) exec {sys.executable} "$@" ;;
  "import torch"*) exit 0 ;;
esac
echo "nothing works here"
exit 7
"""
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gpu_check.sh [--dry-run] OUTDIR"),
        (["--fast", "out"], "unknown option '--fast'"),
        (["out", "out2"], "expected one OUTDIR, got 'out' and 'out2'"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_an_interpreter_that_is_missing_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, python="no-such-python")
    assert done.returncode == 2
    assert "there is no 'no-such-python'; set PYTHON" in done.stderr


def test_results_of_an_earlier_run_are_not_mixed_with_new_ones(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").touch()
    done = run("--dry-run", tmp_path)
    assert done.returncode == 2
    assert "has the results of an earlier run" in done.stderr


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path: Path, broken_python: Path) -> None:
    out = tmp_path / "out"
    done = run("--dry-run", out, python=broken_python)
    assert done.returncode == 1
    steps = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps][:4] == ["environment", "build", "built extensions", "tests on a device"]
    build = next(step for step in steps if step["step"] == "build")
    assert (build["status"], build["exit_code"], build["note"]) == ("failed", 7, "nothing works here")
    assert {"memcheck (collection only)", "racecheck (collection only)", "bench_cuda_ops"} <= {s["step"] for s in steps}
    assert "nothing works here" in (out / "log.txt").read_text()
