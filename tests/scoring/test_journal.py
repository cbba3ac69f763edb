"""Interrupted runs go on where they were and end with the same bits; journals of other inputs are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import BENIGN, HARM, build

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ArgumentError, ArtifactError, ScoringError
from fastprune.model.block_view import BlockView
from fastprune.scoring import engine

SETS = (CalibrationSet(HARM).loader(24), CalibrationSet(BENIGN).loader(24))
SETTINGS = {"segments": 4, "progress": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("Llama").save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def saved(scores: fastprune.Scores, path: Path) -> bytes:
    return scores.save(path).read_bytes()


def interrupt(monkeypatch: pytest.MonkeyPatch, stage: str, at: int) -> None:
    """Let the pass fail at the n-th call of a stage."""
    real, calls = getattr(engine.Pass, stage), []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("power failure")
        return real(self, *args)

    monkeypatch.setattr(engine.Pass, stage, failing)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["random", "calls"])
def test_killed_runs_end_with_the_same_bits(how: str, folder: Path, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])}
    # As a module: with its own folder in front of the path, support/statistics.py would hide the standard library's.
    words = [sys.executable, "-m", "support.killed_runs", str(folder), str(tmp_path), "1", how]
    process = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["same"]
    assert report["killed"] > 8 and len(set(report["lines"])) > 3  # kills met the journal in many states


@pytest.mark.parametrize("offload", ["disk", "device"])
@pytest.mark.parametrize(("stage", "at"), [("_prologue", 1), ("_forward", 3), ("_backward", 1), ("_backward", 3)])
def test_resumed_runs_do_not_repeat_what_is_finished(
    stage: str, at: int, offload: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(fastprune.score(folder, *SETS, **SETTINGS), tmp_path / "expected")
    journal = tmp_path / "journal"
    with monkeypatch.context() as patched:
        interrupt(patched, stage, at)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=journal, offload=offload, **SETTINGS)
    runs: list[tuple[str, int]] = []
    for name in ("_forward", "_backward"):
        real = getattr(engine.Pass, name)
        monkeypatch.setattr(
            engine.Pass,
            name,
            lambda self, n, *rest, real=real, name=name: runs.append((name, n)) or real(self, n, *rest),
        )
    found = fastprune.score(folder, *SETS, resume=journal, offload=offload, **SETTINGS)
    assert saved(found, tmp_path / "found") == expected
    end = 4 - (at - 1 if stage == "_backward" else 0)
    done = {"_prologue": 0, "_forward": at - 1, "_backward": 3}[stage] if offload == "disk" else 0
    assert runs == [*(("_forward", n) for n in range(done, end - 1)), *(("_backward", n) for n in reversed(range(end)))]


def test_a_finished_run_is_only_read_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    names = {path.name for path in (tmp_path / "journal").iterdir()}
    assert names == {"journal.jsonl", *(f"segment-{n}.safetensors" for n in range(4))}  # no hidden states are left
    monkeypatch.setattr(engine.Pass, "_prologue", lambda *args: pytest.fail("the pass ran again"))
    again = fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    assert saved(again, tmp_path / "b") == saved(first, tmp_path / "a")


def test_other_architectures_resume_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    build("Gemma2").save_pretrained(folder)
    expected = saved(fastprune.score(folder, *SETS, **SETTINGS), tmp_path / "expected")
    with monkeypatch.context() as patched:
        interrupt(patched, "_backward", 3)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    found = fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    assert saved(found, tmp_path / "found") == expected


def test_a_model_in_memory_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """Hooks, buffers and adapters change what it computes and are in no file that a later run could compare."""
    unread = iter(lambda: pytest.fail("the data was read"), None)
    with pytest.raises(ArgumentError, match=r"^resume: expected a checkpoint folder .* LlamaForCausalLM .*; save it"):
        fastprune.score(build("Llama"), unread, resume=tmp_path / "journal", **SETTINGS)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"harm": "abs"}, "criteria"),
        ({"segments": 2}, "segments"),
        ({"q_max": 0.5}, "fractions"),
        ({"statistics_dtype": "float64"}, "statistics_dtype"),
        ("data", "calibration"),
        ("batches", "batch_tokens"),
        ("weights", "weights"),
        ("one bit of a shard", "files"),
        ("config", "config"),
        ({"backend": "torch"}, "backend"),
        ("versions", "versions"),
    ],
)
def test_a_journal_of_other_inputs_is_refused_by_name(
    change: object, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, "_backward", 2)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()}
    sets, model, settings = SETS, folder, {**SETTINGS, **(change if isinstance(change, dict) else {})}
    if change == "data":
        sets = (CalibrationSet(HARM[1:]).loader(24), SETS[1])
    elif change == "batches":
        sets = (CalibrationSet(HARM).loader(16), SETS[1])
    elif change == "weights":
        model = tmp_path / "other"
        build("Llama", seed=1).save_pretrained(model)
    elif change == "one bit of a shard":  # at a place that no sample looks at, as a mask would be
        shard = max(folder.glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-3] ^= 1
        shard.write_bytes(content)
    elif change == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    elif change == "versions":
        monkeypatch.setattr(fastprune, "__version__", "99.0")
    with pytest.raises(ArgumentError, match=f"resume.*another {message}"):
        fastprune.score(model, *sets, resume=tmp_path / "journal", **settings)
    assert {path.name: path.read_bytes() for path in (tmp_path / "journal").iterdir()} == before


def test_a_resumed_run_keeps_the_number_of_segments(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Guards plans that follow the memory that happens to be free: they differ from one hour to the next."""
    with monkeypatch.context() as patched:
        interrupt(patched, "_backward", 2)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=tmp_path / "journal", segments=3, progress=False)
    found = fastprune.score(folder, *SETS, resume=tmp_path / "journal", progress=False)
    expected = fastprune.score(folder, *SETS, segments=3, progress=False)
    assert saved(found, tmp_path / "found") == saved(expected, tmp_path / "expected")


def test_what_a_killed_run_could_not_free_is_freed(folder: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        interrupt(patched, "_backward", 3)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    for name in ("boundary-3.bin", "gradient-3.bin", "boundary-x.bin"):
        (tmp_path / "journal" / name).write_bytes(b"used up")
    fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    assert [path.name for path in (tmp_path / "journal").glob("*.bin")] == ["boundary-x.bin"]  # somebody else's


def test_a_folder_that_is_in_use_or_holds_something_else(folder: Path, tmp_path: Path, monkeypatch) -> None:
    journal = tmp_path / "journal"

    def again(self, *args):
        with pytest.raises(ArgumentError, match="another process is at work"):
            fastprune.score(folder, *SETS, resume=journal, **SETTINGS)
        raise RuntimeError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(engine.Pass, "_prologue", again)
        with pytest.raises(RuntimeError, match="enough"):
            fastprune.score(folder, *SETS, resume=journal, **SETTINGS)
    with pytest.raises(ArgumentError, match="holds no journal"):
        fastprune.score(folder, *SETS, resume=folder, **SETTINGS)
    assert not (folder / "journal.jsonl").exists()


def test_a_changed_file_is_not_read_as_whole(folder: Path, tmp_path: Path, monkeypatch) -> None:
    journal = tmp_path / "journal"
    with monkeypatch.context() as patched:
        interrupt(patched, "_backward", 3)
        with pytest.raises(RuntimeError, match="power"):
            fastprune.score(folder, *SETS, resume=journal, **SETTINGS)
    for name in ("segment-3.safetensors", "gradient-2.bin"):
        content = (journal / name).read_bytes()
        (journal / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="changed"):
            fastprune.score(folder, *SETS, resume=journal, **SETTINGS)
        (journal / name).write_bytes(content)
    with (journal / "journal.jsonl").open("ab") as file:
        file.write(b"0123 {half a li")  # as a kill leaves it
    fastprune.score(folder, *SETS, resume=journal, **SETTINGS)


def test_an_error_leaves_a_journal_that_can_be_resumed(folder: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            BlockView,
            "losses_and_gradient",
            lambda self, hidden, batch, *rest: (torch.full((len(batch.targets),), torch.nan), hidden),
        )
        patched.setattr(
            sys.modules["fastprune.scoring.run"],
            "checked_view",
            lambda weights, *rest: BlockView(weights.anatomy, weights.device),
        )
        with pytest.raises(ScoringError, match="no finite"):
            fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS)
    assert fastprune.score(folder, *SETS, resume=tmp_path / "journal", **SETTINGS).harm
