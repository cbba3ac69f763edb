"""Several processes at one pass: the same result as one, and an end for all of them when one fails, dies or differs."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.ranks import run_group

import fastprune
from fastprune.calibration import CalibrationSet, MicroBatch
from fastprune.errors import ArgumentError, ScoringError
from fastprune.scoring import run as run_module
from fastprune.scoring.collect import Collector
from fastprune.scoring.engine import Pass
from fastprune.scoring.journal import Journal
from fastprune.scoring.processes import Processes

# Two examples a micro-batch or so, so that there are enough of them to be shared.
BATCH_TOKENS = 24
CRITERIA = {"harm": ("signed", "wanda"), "benign": ("abs", "fisher")}


def llama(**changes: Any) -> torch.nn.Module:
    return build("Llama", num_hidden_layers=3, **changes)


def scored(model: Any, rows: list = HARM, benign_rows: list | None = BENIGN, **settings: Any) -> fastprune.Scores:
    """Scores of a model, or of the folder of one."""
    sets = (some and CalibrationSet(some).loader(BATCH_TOKENS) for some in (rows, benign_rows))
    return fastprune.score(model, *sets, progress=False, **settings)


def digest(scores: fastprune.Scores) -> str:
    """A hash of the file of some scores: of everything that they hold."""
    with tempfile.TemporaryDirectory() as folder:
        return hashlib.sha256(scores.save(Path(folder) / "scores").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the Llama of these tests."""
    path = tmp_path_factory.mktemp("checkpoint")
    llama().save_pretrained(path)
    return path


# --- the same result ---


def _score_in_all_ways(rank: int, folder: Path, out: Path) -> list[str]:
    made = [
        scored(llama(), segments=2, **CRITERIA),
        scored(folder, segments=3, device="cpu", offload="disk", **CRITERIA),
        scored(llama(), HARM[:1], None),  # one micro-batch: all but one process have nothing to do
    ]
    for number, scores in enumerate(made):
        scores.save(out / f"{rank}-{number}")
    return list(map(digest, made))


@pytest.fixture(scope="module")
def alone() -> tuple[fastprune.Scores, fastprune.Scores]:
    """What one process makes of all rows and of the first."""
    return scored(llama(), **CRITERIA), scored(llama(), HARM[:1], None)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_any_number_of_processes_gives_what_one_gives_on_each_of_them(
    size: int, folder: Path, alone: tuple[fastprune.Scores, fastprune.Scores], tmp_path: Path
) -> None:
    found = run_group(size, _score_in_all_ways, folder, tmp_path)
    assert found == [found[0]] * size, "processes returned different scores"
    resident, streamed, single = (fastprune.Scores.load(tmp_path / f"0-{number}") for number in range(3))
    for scope in ("matrix", "global"):
        for made in (resident, streamed):
            for names in ({}, {"harm": "wanda", "benign": "fisher"}):
                for p, q in ((0.05, 0.01), (None, 0.02)):
                    assert made.select(p, q, scope=scope, **names) == alone[0].select(p, q, scope=scope, **names)
        assert single.select(None, 0.02, scope=scope) == alone[1].select(None, 0.02, scope=scope)


def _tight_memory_on_one(rank: int) -> list[int]:
    """As if memory asked for three segments on the second process and for one on the first."""
    chosen = []
    plan = run_module.plan

    def watched(*args: Any, **options: Any) -> Any:
        found = plan(*args, **{**options, "segments": options["segments"] or (1, 3)[rank]})
        chosen.append(found.segments)
        return found

    run_module.plan = watched
    scored(llama(), HARM, None)
    return chosen


def test_processes_agree_on_the_largest_number_of_segments() -> None:
    assert run_group(2, _tight_memory_on_one) == [[1, 3], [3]]


def _sharing(rank: int) -> list[int]:
    ranks = Processes()
    return [ranks.sharing(torch.device("cpu")), ranks.sharing(torch.device("cuda", min(rank, 1)))]


def test_processes_know_how_many_of_them_share_a_device() -> None:
    assert run_group(3, _sharing) == [[3, 1], [3, 2], [3, 2]]


# --- interruptions ---


def _score_with_a_journal(rank: int, model: Path, out: Path, few: bool, deaths: dict[int, tuple[str, int]]) -> str:
    """``deaths``: of each rank, the method of the journal whose n-th call it does not live to see the end of."""
    if rank in deaths:
        name, number = deaths[rank]
        original, calls = getattr(Journal, name), []

        def dying(self: Journal, *args: Any) -> None:
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, *args)

        setattr(Journal, name, dying)
    sets = (HARM[:1], None) if few else (HARM, BENIGN)  # few: one of two processes has nothing to do
    return digest(scored(model, *sets, segments=3, device="cpu", resume=out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("few", "deaths"),
    [
        # In the forward sweep: one has recorded two boundaries (there are no more), the other one.
        (False, {0: ("add_segment", 1), 1: ("add_boundary", 2)}),
        (True, {0: ("add_segment", 1), 1: ("add_boundary", 2)}),
        # In the backward sweep: one has finished two segments, the other died before its second was recorded.
        (False, {0: ("add_segment", 3), 1: ("add_segment", 2)}),
    ],
    ids=["forward", "forward-idle", "backward"],
)
def test_killed_processes_go_on_to_the_same_bits(few: bool, deaths: dict, folder: Path, tmp_path: Path) -> None:
    killed = run_group(2, _score_with_a_journal, folder, tmp_path / "killed", few, deaths)
    assert -signal.SIGKILL in killed
    assert not any(isinstance(end, str) for end in killed)
    again = run_group(2, _score_with_a_journal, folder, tmp_path / "killed", few, {})
    assert again == run_group(2, _score_with_a_journal, folder, tmp_path / "whole", few, {})


# --- one fails ---

# What is done to the second of two processes, and what the first is told.
FAILURES = {
    "argument": "ArgumentError: statistics_dtype: expected one of",
    "data": "CalibrationError: harm_loader",
    "memory": "ArgumentError: memory: 1.0 MiB is not enough",
    "check": "RuntimeError: out of luck",
    "gradient": r"ScoringError: (harm|benign) example .*block .* is not finite",
    "journal": "ArgumentError: resume: .* holds no journal",
    "selection": "RuntimeError: out of luck",
    "last": "RuntimeError: out of luck",
}


def _out_of_luck(*args: Any) -> None:
    raise RuntimeError("out of luck")


def _not_a_number(self: Pass, number: int, item: int, batch: MicroBatch, *rest: Any) -> None:
    shape = (*batch.input_ids.shape, 32)
    self._gradients.put(f"gradient-{number + 1}", item, torch.full(shape, torch.nan))
    _one_micro_batch(self, number, item, batch, *rest)


_one_micro_batch = Pass._one_micro_batch


def _fail_in_turn(rank: int, checkpoint: Path, folder: Path) -> list[str]:
    """All failures in one group: whoever was told can go on with another call."""
    errors = []
    for cause in FAILURES:
        settings: dict[str, Any] = {"segments": 2, "resume": folder if cause == "journal" else None}
        with pytest.MonkeyPatch.context() as patch:
            match cause if rank == 1 else None:
                case "argument":
                    settings["statistics_dtype"] = "int8"
                case "data":
                    settings["harm"] = [{"input_ids": torch.zeros(1, 3)}]
                case "memory":
                    settings["memory"] = "1MiB"
                case "check":
                    patch.setattr(run_module, "checked_view", _out_of_luck)
                case "gradient":
                    patch.setattr(Pass, "_one_micro_batch", _not_a_number)
                case "journal":
                    (folder / "process-1-of-2").mkdir()
                    (folder / "process-1-of-2" / "something").touch()
                case "selection":
                    patch.setattr(Collector, "add", _out_of_luck)
                case "last":
                    patch.setattr(Collector, "lists", _out_of_luck)
            try:
                harm = settings.pop("harm", CalibrationSet(HARM).loader(BATCH_TOKENS))
                model = checkpoint if cause == "journal" else llama()
                fastprune.score(model, harm, progress=False, **settings)
            except (fastprune.FastpruneError, RuntimeError) as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_an_error_on_one_process_ends_the_others_by_name(folder: Path, tmp_path: Path) -> None:
    first, failed = run_group(2, _fail_in_turn, folder, tmp_path)
    assert len(first) == len(failed) == len(FAILURES)
    for told, own, pattern in zip(first, failed, FAILURES.values(), strict=True):
        assert re.match(pattern, own)
        assert told == f"ScoringError: process 1 of 2 failed: {own}"


def _leave(rank: int, how: str) -> None:
    def leave(*args: Any) -> None:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

    if rank == 1:
        Pass._forward = leave
    scored(llama(), segments=2)


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_a_process_that_leaves_without_a_word_ends_the_others(how: str) -> None:
    first, left, last = run_group(3, _leave, how)
    assert isinstance(left, int)
    for error in (first, last):
        assert isinstance(error, ScoringError)
        assert "lost the connection to another one" in str(error)


# --- one differs ---

# A change on the second of two processes, by the name under which it is refused.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "calibration": {"rows": HARM[:4]},
    "segments": {"segments": 3},
    "fractions": {"q_max": 0.5},
    "statistics_dtype": {"statistics_dtype": "float64"},
    "weights": {"model": "another model"},
    "resume": {"resume": "somewhere"},
}


def _differ(rank: int, checkpoint: Path, folder: Path) -> list[str]:
    """``folder`` holds ``another model``, and takes the journal."""
    os.chdir(folder)
    refused = []
    for change in DIFFERENCES.values():
        settings = dict(change) if rank == 1 else {}
        try:
            scored(settings.pop("model", checkpoint), device="cpu", **settings)
        except ArgumentError as error:
            refused.append(str(error).split(" has another ")[1].split(" than ")[0])
    return refused


def test_processes_that_were_started_differently_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    llama(seed=5).save_pretrained(tmp_path / "another model")
    assert run_group(2, _differ, folder, tmp_path) == [list(DIFFERENCES)] * 2


def _hold_other_weights(rank: int) -> str:
    with pytest.raises(ArgumentError, match="has another weights than process") as refused:
        scored(llama(seed=5 if rank else 0))
    return str(refused.value).split(":")[0]


def test_processes_with_other_weights_in_memory_are_refused() -> None:
    found = run_group(2, _hold_other_weights)
    assert found == [f"process {1 - rank} has another weights than process {rank}" for rank in range(2)]
