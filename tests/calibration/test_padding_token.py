"""Padding is a token of the row itself: what the embedding holds for tokens that no row has does not matter."""

from __future__ import annotations

import pytest
import torch
from support.architectures import HARM, VOCAB, build, pad, stateful

import fastprune
from fastprune.calibration import CalibrationSet, micro_batches
from fastprune.evaluation.decoding import Query, continue_queries

USED = {token for example in HARM for token in example.input_ids}


def poisoned(name: str, value: float) -> torch.nn.Module:
    """Every row of the embedding that no example uses is not finite; padding used to be id 0, which is one of them."""
    model = build(name, tie_word_embeddings=False)
    assert 0 not in USED
    with torch.no_grad():
        model.get_input_embeddings().weight[[token for token in range(VOCAB) if token not in USED]] = value
    return model


def test_rows_are_padded_with_their_own_last_token() -> None:
    for batch in micro_batches(HARM, 1000):
        for row, index in enumerate(batch.example_indices):
            assert set(batch.input_ids[row, len(HARM[index]) :].tolist()) <= {HARM[index].input_ids[-1]}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "GPT2"])
def test_scores_do_not_depend_on_tokens_that_no_example_has(name: str, segments: int, value: float) -> None:
    """Regression: NaN of the padding went into the text as 0 times NaN, and the loss was called not finite."""
    found = fastprune.score(poisoned(name, value), CalibrationSet(HARM), segments=segments, progress=False)
    expected = fastprune.score(
        build(name, tie_word_embeddings=False), CalibrationSet(HARM), segments=segments, progress=False
    )
    for matrix in expected.names:
        assert torch.equal(found.harm[matrix].indices, expected.harm[matrix].indices)
        assert torch.equal(found.harm[matrix].values, expected.harm[matrix].values)


def test_nor_do_they_where_the_caller_has_padded_or_the_model_runs_whole() -> None:
    found = fastprune.score(poisoned("Llama", float("nan")), [pad(HARM, "left")], progress=False)
    expected = fastprune.score(build("Llama"), CalibrationSet(HARM), progress=False)
    assert found.select(None, 0.05) == expected.select(None, 0.05)
    with pytest.warns(fastprune.errors.FastpruneWarning, match="it is scored whole"):
        whole = fastprune.score(stateful(poisoned("Llama", float("nan"))), CalibrationSet(HARM), progress=False)
    assert all(bool(kept.values.isfinite().all()) for kept in whole.harm.values())


def test_prompts_of_a_generation_are_padded_with_their_own_tokens() -> None:
    queries = [Query(example.input_ids, 1, f"row {index}") for index, example in enumerate(HARM)]
    found, expected = (
        continue_queries(model, queries, ()) for model in (poisoned("Llama", float("nan")), build("Llama"))
    )
    assert found == expected
