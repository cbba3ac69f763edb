"""``benchmarks/gpu_check.sh`` says what is wrong with its arguments, and goes on after a step that failed."""

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

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


def run(
    *arguments: str | Path, python: str | Path = sys.executable, script: Path = SCRIPT
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, env=environment)


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


@pytest.fixture
def steps(tmp_path: Path, broken_python: Path) -> list[dict]:
    """Of a rehearsal in which every step fails."""
    out = tmp_path / "out"
    done = run("--dry-run", out, python=broken_python)
    assert done.returncode == 1
    assert "nothing works here" in (out / "log.txt").read_text()
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_a_failing_step_is_recorded_and_the_rest_goes_on(steps: list[dict]) -> None:
    assert [step["step"] for step in steps] == [
        *("environment", "build", "build without the CUDA extension", "built extensions", "bench_scoring"),
        *("tests on a device", "tests of emulated kernels", "bench_cuda_ops", "bench_ops"),
        *("memcheck (collection only)", "bench_streaming", "racecheck (collection only)"),
    ]
    assert {(step["status"], step["exit_code"]) for step in steps if step["step"] != "built extensions"} == {
        ("failed", 7)
    }
    assert steps[1]["note"] == "nothing works here"


def test_every_benchmark_of_a_device_is_a_step(steps: list[dict]) -> None:
    scripts = {path.stem for path in SCRIPT.parent.glob("bench_*.py")}
    assert scripts == {step["step"] for step in steps if step["step"].startswith("bench_")}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device's kernels are missed where there is none")
def test_kernels_that_cannot_serve_are_a_failed_step(tmp_path: Path) -> None:
    """Benchmarks of plain torch would pass for ours. The kernels are found also where nothing is installed."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case $2 in
  *json.dumps*) exec {sys.executable} "$@" ;;
  *available_backends*) {sys.executable} -S -c "from fastprune_kernels import launching" ; exec {sys.executable} "$@" ;;
  "import torch"*) echo True ;;
esac
"""
    )
    python.chmod(0o755)
    run(tmp_path / "out", python=python)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "No module named 'torch'" in log and "No module named 'fastprune_kernels'" not in log
    by_name = {step["step"]: step for step in map(json.loads, (tmp_path / "out" / "steps.jsonl").open())}
    built = by_name["built extensions"]
    assert (built["status"], built["exit_code"]) == ("failed", 1)
    assert "triton: no CUDA device; cuda: " in built["note"]


@pytest.mark.slow
def test_steps_that_do_not_end_take_no_more_than_the_budget(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    assert "nine minutes at most" in text and "BUDGET=540" in text
    short = tmp_path / "benchmarks" / "gpu_check.sh"
    short.parent.mkdir()
    (tmp_path / "tests").mkdir()
    short.write_text(text.replace("BUDGET=540", "BUDGET=20"))
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/bash
case $2 in
  *json.dumps*) exec {sys.executable} "$@" ;;
  "import torch"*) echo True; exit 0 ;;
  *find_spec*) exit 1 ;;
esac
trap "" TERM
sleep 100
"""
    )
    python.chmod(0o755)
    run(tmp_path / "out", python=python, script=short)
    first, *others = map(json.loads, (tmp_path / "out" / "steps.jsonl").open())
    # Stopped after what the budget of 20 s leaves when 8 s are kept back, not when its own 60 s or 100 s are over.
    assert (first["status"], first["exit_code"]) == ("timeout", 124)
    assert 0 < int(re.fullmatch(r"stopped after (\d+) s", first["note"])[1]) <= 12
    assert {step["status"] for step in others} == {"skipped"}
    assert sum(step["note"] == "no time left of 20 s" for step in others) >= len(others) - 2  # the sanitizer may lack


@pytest.mark.slow
def test_all_files_with_tests_for_a_device_are_run(tmp_path: Path, broken_python: Path) -> None:
    run("--dry-run", tmp_path / "out", python=broken_python)
    command = next(line for line in (tmp_path / "out" / "log.txt").read_text().splitlines() if " -m gpu " in line)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--collect-only", "-p", "no:cacheprovider"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent.parent,
    ).stdout
    files = {line.split("::")[0] for line in collected.splitlines() if "::" in line}
    assert files and files <= set(command.split())
