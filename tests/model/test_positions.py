"""Where positions end, and rotary frequencies that the longest row of a pass decides for all of its rows."""

from __future__ import annotations

import pytest
import torch
from support.architectures import build, examples
from support.generation import continue_greedily, tiny_model

import fastprune
from fastprune.calibration import CalibrationSet, micro_batches
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation.likelihood import log_probabilities
from fastprune.testing.oracle import oracle_statistics

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
}
SHORT = examples([(5, 9), (3, 4), (7, 9)], seed=1)  # up to 16 tokens
LONG = examples([(9, 8), (12, 12)], seed=2)  # from 17


def phi3() -> torch.nn.Module:
    return build("Phi3", original_max_position_embeddings=16, rope_parameters=dict(LONGROPE))


@pytest.mark.parametrize("rows", [SHORT, LONG], ids=["short", "long"])
def test_either_side_of_longrope_is_scored_like_one_example_at_a_time(rows: list) -> None:
    model = phi3()
    exact = oracle_statistics(model, rows)
    scores = fastprune.score(model, CalibrationSet(rows), harm="abs", q_max=1.0, progress=False)
    for name, kept in scores.harm.items():
        found = torch.zeros(model.get_parameter(name).numel()).index_put((kept.indices,), kept.values)
        truth = (model.get_parameter(name).double().abs() * exact[name]["grad_abs_sum"]).flatten()
        assert (found - truth).norm() <= 1e-5 * truth.norm(), name


def test_examples_on_both_sides_of_longrope_are_refused() -> None:
    message = r"^harm_loader, example 3: 17 tokens; with more than 16 tokens .*\(longrope\) change.* max_length"
    with pytest.raises(CalibrationError, match=message):
        fastprune.score(phi3(), CalibrationSet(SHORT + LONG), progress=False)


def test_dynamic_frequencies_are_taken_up_to_their_limit_only() -> None:
    model = build("Llama", max_position_embeddings=16, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    fastprune.score(model, CalibrationSet(SHORT), progress=False)
    with pytest.raises(CalibrationError, match=r"^benign_loader, example 0: 17 tokens; .*\(dynamic\)"):
        fastprune.score(model, CalibrationSet(SHORT), CalibrationSet(LONG), progress=False)


def test_evaluation_keeps_the_sides_of_longrope_apart() -> None:
    model = phi3()
    short, long = [list(row.input_ids) for row in SHORT], [list(row.input_ids) for row in LONG]
    for contexts, new in ((short[1:2], 9), (long, 5)):
        for context, answer in zip(
            contexts, continue_greedily(model, contexts, [new] * len(contexts), ()), strict=True
        ):
            ids = torch.tensor([context])
            said = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
            assert answer == said[0, len(context) :].tolist()
    with pytest.raises(ArgumentError, match=r"^row 1: 7 tokens and 10 new ones; with more than 16"):
        continue_greedily(model, short[1:2] * 2, [9, 10], ())
    with pytest.raises(ArgumentError, match=r"^row 1: 17 tokens and 1 new ones.* apart"):
        continue_greedily(model, [short[1], long[0]], [1, 1], ())
    with pytest.raises(ArgumentError, match=r"^example \d: 17 tokens"):
        log_probabilities(model, micro_batches(SHORT + LONG[:1], 4096))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_row_that_is_over_does_not_run_beyond_the_positions_of_the_model(kind: str) -> None:
    model, contexts, budgets = tiny_model(kind), [[7] * 60, [9]], [2, 40]
    alone = [continue_greedily(model, [row], [new], ())[0] for row, new in zip(contexts, budgets, strict=True)]
    assert continue_greedily(model, contexts, budgets, ()) == alone
    assert [len(ids) for ids in alone] == budgets
