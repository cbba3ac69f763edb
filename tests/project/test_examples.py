"""The example runs as it stands, and shows what it says."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import fastprune

ROOT = Path(__file__).parents[2]


def test_the_organism_example_removes_harm_and_its_control_does_not(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "examples" / "organism.py"), "data"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    unpruned, pruned, control = (ast.literal_eval(line[line.index("{") :]) for line in done.stdout.splitlines()[-3:])
    assert unpruned["harm"] > 0.9 and control["harm"] > 0.9 and pruned["harm"] < 0.2
    assert min(each["utility"] for each in (unpruned, pruned, control)) > 0.9
    assert fastprune.PruneMask.load(tmp_path / "data" / "mask.safetensors").total > 1000
