"""Sampling against a literal reference, its independence of batches, how answers end, and interrupted runs."""

from __future__ import annotations

import math

import pytest
import torch
from support.generation import EOS, VOCABULARY, tiny_model

from fastprune.errors import ArgumentError, ScoringError
from fastprune.evaluation.decoding import Continuation, Query, Sampling, _Drawing, batches_of, continue_queries


def queries(n: int = 13, budget: int = 9) -> list[Query]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 12, (n,), generator=generator).tolist()
    return [
        Query(
            torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist(),
            1 + (index * 5) % budget,
            f"row {index}",
            f"row {index}",
        )
        for index, length in enumerate(lengths)
    ]


def literal_nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Tokens that may be drawn, with their probabilities: the definition, one token at a time."""
    weights = [math.exp(value / temperature) for value in logits]
    shares = {token: weight / sum(weights) for token, weight in enumerate(weights)}
    kept: dict[int, float] = {}
    for token in sorted(shares, key=lambda token: (-shares[token], token)):
        if sum(kept.values()) >= top_p:
            break
        kept[token] = shares[token]
    return {token: share / sum(kept.values()) for token, share in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.5, 0.5), (1.0, 0.05)])
def test_draws_have_the_probabilities_of_the_definition(temperature: float, top_p: float) -> None:
    n = 4000
    logits = torch.tensor([1.0, -0.5, 2.0, 2.0, -float("inf"), 0.3, -3.0])
    expected = literal_nucleus(logits.tolist(), temperature, top_p)
    assert (len(expected) == 6) == (top_p == 1)
    choose = _Drawing(Sampling(temperature, top_p), [Query([1], 1, "", str(index)) for index in range(n)])
    counts = torch.bincount(choose(logits.expand(n, -1)), minlength=len(logits)).tolist()
    for token, count in enumerate(counts):
        share = expected.get(token, 0.0)
        # five standard deviations: the draws are fixed by their states, so this fails always or never
        assert abs(count - n * share) <= 5 * math.sqrt(n * share * (1 - share)), token


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_what_is_drawn_does_not_depend_on_the_batch(batch_size: int) -> None:
    model, sampling = tiny_model(), Sampling(0.8, 0.95)
    alone = [continue_queries(model, [query], {EOS}, sampling=sampling)[0] for query in queries()]
    assert len({tuple(each.ids) for each in alone}) > 10
    together = continue_queries(model, queries(), {EOS}, sampling=sampling, batch_size=batch_size)
    assert [together[index] for index in range(len(alone))] == alone
    other = [Query(query.context, query.budget, query.name, query.state + "#1") for query in queries()]
    assert [each for _, each in sorted(continue_queries(model, other, {EOS}, sampling=sampling).items())] != alone


def test_a_continuation_says_how_it_ended_and_counts_the_token_that_ended_it() -> None:
    model = tiny_model()
    free = continue_queries(model, queries(), set())
    assert all(each.finish == "length" for each in free.values())
    assert [len(free[index].ids) for index in range(13)] == [query.budget for query in queries()]
    stop = free[3].ids[-1]
    stopped = continue_queries(model, queries(), {stop})
    for index, each in free.items():
        if stop in each.ids:
            place = each.ids.index(stop)
            assert stopped[index] == Continuation(each.ids[:place], "stop")
            assert stopped[index].new_tokens == place + 1
        else:
            assert stopped[index] == each
            assert stopped[index].new_tokens == len(each.ids)
    assert stopped[3].finish == "stop"


def test_an_interrupted_run_computes_the_batches_that_it_would_have_had() -> None:
    model, shapes = tiny_model(), []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    whole = continue_queries(model, queries(), {EOS}, batch_size=4)
    all_shapes = shapes.copy()
    batches = batches_of(queries(), 4)
    assert sorted(index for batch in batches for index in batch) == list(range(13))
    finished = {*batches[0], *batches[1][:2]}  # one batch, and a part of another one
    seen: dict[int, Continuation] = {}
    shapes.clear()
    rest = continue_queries(model, queries(), {EOS}, batch_size=4, finished=finished, on_batch=seen.update)
    handle.remove()
    assert seen == rest == {index: each for index, each in whole.items() if index not in finished}
    openings = [[shape for shape in each if min(shape) > 1] for each in (all_shapes, shapes)]
    assert len(openings[0]) == len(batches)
    assert openings[1] == openings[0][1:], "the batch of which a part is finished has another shape now"
    assert continue_queries(model, queries(), {EOS}, finished=range(13)) == {}


def test_batches_are_a_function_of_the_queries_and_not_of_what_is_done() -> None:
    assert batches_of(queries(), 5) == batches_of(queries(), 5)
    sizes = [len(batch) for batch in batches_of(queries(), 5)]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict, argument: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: expected"):
        Sampling(**settings)


def test_a_broken_model_is_not_sampled_from() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(ScoringError, match="NaN"):
        continue_queries(model, queries(), {EOS}, sampling=Sampling(1.0))
