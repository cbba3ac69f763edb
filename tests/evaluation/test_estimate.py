"""What is said before long work: an upper bound from steps of the work itself, which changes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from support.architectures import HARM, build
from support.generation import tiny_model, word_tokenizer

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.evaluation import EvaluationSuite, estimate, generate_rows
from fastprune.evaluation.decoding import Query
from fastprune.evaluation.estimate import answering_time
from fastprune.progress import duration
from fastprune.scoring import run


def queries(n: int, budget: int) -> list[Query]:
    return [Query([5 + index % 9, 7, 8], budget, f"row {index}") for index in range(n)]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A first pass takes 2 s and every further step 0.5 s."""
    taken: list[float] = []

    def seconds(forward: object, batch: list[Query]) -> float:
        taken.append(2.0 + 0.5 * (batch[0].budget - 1))
        return taken[-1]

    monkeypatch.setattr(estimate, "_seconds", seconds)
    return taken


@pytest.mark.parametrize(("share", "batches"), [(1.0, 2), (3.0, 6), (0.5, 1)])
def test_it_is_the_sum_of_first_passes_and_steps(timed: list[float], share: float, batches: int) -> None:
    found = answering_time(tiny_model(), queries(8, 200), batch_size=4, share=share)
    # Two batches; a step counts with a token of the first pass at the least: 2 s for 3 tokens.
    seconds = share * 2 * (2 + 200 * 2 / 3)
    assert found == f"at most {duration(seconds)} for {int(8 * share)} answers in {batches} batches"
    assert timed == [2.0, 4.0]


def test_short_work_is_not_measured(timed: list) -> None:
    assert answering_time(tiny_model(), queries(8, 20), batch_size=4) is None and timed == []
    assert answering_time(tiny_model(), [], batch_size=4) is None


def test_it_is_said_once_where_progress_is_and_changes_no_answer(tmp_path, capsys) -> None:
    rows = [{"prompt": f"w{i}", "response": "w1"} for i in range(4)]
    settings = {"format": "raw", "max_new_tokens": 50, "temperature": 1.0, "samples": 2, "batch_size": 1}
    torch.manual_seed(7)
    quiet = generate_rows(tiny_model(), word_tokenizer(), rows, **settings)
    state = torch.random.get_rng_state()
    assert capsys.readouterr().err == ""
    assert generate_rows(tiny_model(), word_tokenizer(), rows, **settings, progress=True) == quiet
    assert re.fullmatch(r"generating takes at most \d+ s for 8 answers in 8 batches\n", capsys.readouterr().err)
    assert torch.equal(torch.random.get_rng_state(), state)
    suite = EvaluationSuite(word_tokenizer(), harm_rows=rows, attack="none", max_new_tokens=60, batch_size=1)
    suite.answer(tiny_model(), attacks=["none"], store=tmp_path / "store", progress=True)
    said = capsys.readouterr().err
    assert re.fullmatch(r"answering takes at most \d+ s for 8 answers in 8 batches, the unpruned .* 0 masks\n", said)
    suite.answer(tiny_model(), attacks=["none"], store=tmp_path / "store", progress=True)
    assert capsys.readouterr().err == "", "nothing is left to do"


def test_scoring_says_how_long_it_takes_unless_that_is_a_moment(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    examples = CalibrationSet(HARM)
    fastprune.score(build("Llama"), examples, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(run, "seconds_of", lambda *arguments: 3600.0)
    fastprune.score(build("Llama"), examples, progress=True)
    assert capsys.readouterr().err.startswith(f"scoring takes about 60 min for {len(HARM)} examples, ")
    fastprune.score(build("Llama"), examples, progress=False)
    assert capsys.readouterr().err == ""
