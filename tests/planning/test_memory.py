"""Memory of streamed scoring and of patching, measured in processes of their own on a checkpoint of 0.27 B weights.

The limits are those of a 3.2 B checkpoint (6 GiB, budget 3 GiB, peak below 3.6 GiB) in proportion to what does not
shrink with the model: the matrix library's buffers and the kept scores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastprune
from fastprune.planning.list_lengths import kept_bytes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")]


def write(folder: Path, blocks: int) -> Path:
    words = [str(folder), "--shape", "300m", "--blocks", str(blocks)]
    subprocess.run([sys.executable, str(BENCHMARKS / "random_checkpoint.py"), *words], check=True, timeout=300)
    return folder


def measured(*words: object) -> dict:
    command = [sys.executable, str(BENCHMARKS / "measured_run.py"), *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), 20)


def test_a_budget_below_the_models_size_is_kept_and_planned(checkpoint: Path) -> None:
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    run = measured("score", checkpoint, "--examples", 2, "--tokens", 32, "--memory", "400MiB")
    assert size > 500 * MIB
    assert run["peak_bytes"] < 1.2 * 400 * MIB
    assert run["peak_bytes"] == pytest.approx(run["planned_bytes"], rel=0.15)


@pytest.mark.parametrize("words", [("--segments", 4), ("--segments", 20, "--offload", "disk", "--tokens", 256)])
def test_planned_peaks_are_within_15_percent_of_measured_ones(checkpoint: Path, words: tuple) -> None:
    run = measured("score", checkpoint, "--examples", 2, *words)
    assert run["peak_bytes"] == pytest.approx(run["planned_bytes"], rel=0.15)


def test_memory_grows_with_the_number_of_blocks_by_the_kept_scores_at_most(tmp_path: Path) -> None:
    """A block's weights are 24 MB here and its accumulators 47 MB; what is kept of it for the result is 2.75 MB."""
    peaks, without_result = [], []
    for blocks in (4, 8, 16):
        folder = write(tmp_path / str(blocks), blocks)
        words = ("--examples", 2, "--tokens", 32, "--segments", blocks, "--offload", "disk")
        sizes = [1024 * 1024, 1024 * 512, 1024 * 512, 1024 * 1024, *[1024 * 2816] * 3] * blocks
        peaks.append(measured("score", folder, *words)["peak_bytes"])
        without_result.append(peaks[-1] - kept_bytes(sizes))
    assert max(without_result) < 1.1 * min(peaks), peaks


def test_patching_takes_no_more_than_a_shards_pages(checkpoint: Path, tmp_path: Path) -> None:
    run = measured("patch", checkpoint, tmp_path / "patched")
    assert run["weights"] > 1000
    assert run["peak_bytes"] < 60 * MIB


def test_a_budget_that_cannot_do_says_what_would(checkpoint: Path) -> None:
    with pytest.raises(fastprune.FastpruneError, match=r"memory: 100\.0 MiB is not enough: 20 segments .* need \d"):
        fastprune.score(checkpoint, *_tiny_sets(), memory="100MiB", progress=False)


def _tiny_sets() -> tuple:
    from fastprune.calibration import CalibrationSet, Example

    rows = [Example((5, 6, 7), (-100, 6, 7))]
    return CalibrationSet(rows), CalibrationSet(rows)
