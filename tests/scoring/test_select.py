"""Selection against a dense reference that sorts everything, and what is reported or refused."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support.selection import Dense, make_scores, random_dense

from fastprune.errors import ArgumentError, FastpruneWarning, SelectionError
from fastprune.masking.mask import PruneMask
from fastprune.scoring.scores import Scores
from fastprune.scoring.top_scores import TopScores

# how long an example takes is not what these tests are about
thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def top(dense: Dense, names: list[str], fraction: float, number: int, scope: str) -> tuple[set[tuple[str, int]], int]:
    """Processes [number*k, (number+1)*k) with a score above 0, by sorting everything; and the sum of the k."""
    ranked = [
        sorted((-float(s), names.index(name), i, name) for i, s in enumerate(dense[name].flatten())) for name in names
    ]
    if scope == "global":
        ranked = [sorted(entry for matrix in ranked for entry in matrix)]
    ks = [int(fraction * len(matrix)) for matrix in ranked]
    chosen = [m[number * k : (number + 1) * k] for m, k in zip(ranked, ks, strict=True)]
    return {(name, i) for matrix in chosen for score, _, i, name in matrix if score < 0}, sum(ks)


def as_set(mask: PruneMask) -> set[tuple[str, int]]:
    return {(name, i) for name, indices in mask.items() for i in indices.tolist()}


def as_mask(chosen: set[tuple[str, int]], shapes: dict[str, tuple[int, ...]]) -> PruneMask:
    return PruneMask(
        {n: torch.tensor(sorted(i for m, i in chosen if m == n), dtype=torch.int64) for n in shapes}, shapes
    )


@st.composite
def cases(draw):
    """Scores with many ties, signs of both kinds, -0, and now and then a matrix that outdoes all others."""
    values = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 1.0, 2.0, 3.0])
    harm, benign = {}, {}
    for number in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
        for dense in (harm, benign):
            numbers = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
            dense[f"m{number}"] = torch.tensor(numbers).reshape(shape) * draw(st.sampled_from([1.0, 1.0, 10.0]))
    shapes = {name: tuple(scores.shape) for name, scores in harm.items()}
    blocks = range((len(harm) + 1) // 2)
    every = [(name, i) for name, shape in shapes.items() for i in range(math.prod(shape))]
    return {
        "harm": harm,
        "benign": benign,
        "p": draw(st.sampled_from([None, 0.1, 0.25, 0.5, 1.0])),
        "q": draw(st.sampled_from([0.05, 0.1, 0.25, 0.5, 1.0])),
        "p_max": draw(st.sampled_from([0.1, 0.3, 1.0])),
        "q_max": draw(st.sampled_from([0.05, 0.2, 0.6, 1.0])),
        "scope": draw(st.sampled_from(["matrix", "global"])),
        "slice": draw(st.integers(0, 2)),
        "layers": draw(st.none() | st.sets(st.sampled_from(blocks), min_size=1)),
        "protect": [
            as_mask(set(draw(st.lists(st.sampled_from(every)))), shapes) for _ in range(draw(st.integers(0, 2)))
        ],
    }


@settings(thorough, max_examples=200)
@given(case=cases())
def test_selection_is_the_set_difference_of_the_dense_tops(case):
    harm, benign, p, q, scope = case["harm"], case["benign"], case["p"], case["q"], case["scope"]
    names = [n for i, n in enumerate(harm) if case["layers"] is None or i // 2 in case["layers"]]
    expected, nominal = top(harm, names, q, case["slice"], scope)
    needed, n_needed = (set(), 1) if p is None else top(benign, names, p, 0, scope)
    scores = make_scores(harm, benign, case["p_max"], case["q_max"])
    kept_enough = case["layers"] is None and (case["slice"] + 1) * q <= case["q_max"] and (p or 0) <= case["p_max"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastpruneWarning)
        options = {"scope": scope, "slice": case["slice"], "layers": case["layers"], "protect": case["protect"]}
        if nominal == 0 or n_needed == 0:
            with pytest.raises(SelectionError):
                scores.select(p, q, **options)
            return
        try:
            mask = scores.select(p, q, **options)
        except SelectionError as error:
            assert not kept_enough and "_max=" in str(error)
            return
    assert as_set(mask) == expected - needed - {entry for m in case["protect"] for entry in as_set(m)}
    assert mask.nominal == nominal
    assert list(mask) == list(harm) and mask.shapes == scores.shapes


@thorough
@given(case=cases())
def test_the_setting_that_an_error_names_is_enough(case):
    """Score again with what the message says, and the same call goes through."""
    names = list(case["harm"])
    assume(top(case["harm"], names, case["q"], 0, case["scope"])[1] > 0)
    options = {"scope": case["scope"], "slice": case["slice"], "layers": case["layers"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastpruneWarning)
        try:
            make_scores(case["harm"], None, 1.0, case["q_max"]).select(None, case["q"], **options)
        except SelectionError as error:
            assume("rounds to 0" not in str(error))
            enough = float(str(error).rpartition("q_max=")[2].split()[0])
            make_scores(case["harm"], None, 1.0, enough).select(None, case["q"], **options)


def test_a_hot_matrix_that_holds_all_of_the_global_top():
    """Its own share is 1 % of it; the global selection asks for half of it."""
    harm = random_dense(4000, 200, 4000)
    harm["m1"] = harm["m1"].abs() * 1e6 + 1e3
    scores = make_scores(harm, harm, 0.01, 0.01)
    mask = scores.select(None, 0.01, scope="global")
    assert mask.counts == {"m0": 0, "m1": 82, "m2": 0}
    assert as_set(mask) == top(harm, list(harm), 0.01, 0, "global")[0]
    with pytest.raises(SelectionError, match=r"top 164 scores; of m1 only 82 .* with q_max=0.02 or more"):
        scores.select(None, 0.02, scope="global")


def test_lists_cut_at_equal_scores_are_refused_only_where_the_order_is_open():
    """Of equal scores the earlier matrix comes first: a list cut there is open if it is earlier than the last taken."""
    ones, whole = torch.arange(3), torch.arange(4)
    cut = TopScores(ones, torch.ones(3), 4, 1.0)
    complete = TopScores(whole, torch.ones(4), 4, -math.inf)
    shapes = {"m0": (2, 2), "m1": (2, 2)}
    for lists, fits in (({"m0": complete, "m1": cut}, True), ({"m0": cut, "m1": complete}, False)):
        scores = Scores({"signed": lists}, {}, shapes, {}, 1.0, 1.0)
        if fits:
            assert scores.select(None, 0.75, scope="global").counts == {"m0": 4, "m1": 2}
        else:
            with pytest.raises(SelectionError, match="of m0 only 3 were kept"):
                scores.select(None, 0.75, scope="global")


def test_asking_for_more_than_was_kept_names_the_setting():
    scores = make_scores(random_dense(1000), random_dense(1000, seed=1), 0.05, 0.05)
    with pytest.raises(
        SelectionError, match=r"q=0.06 needs the top 60 scores; of m0 only 50 .* with q_max=0.06 or more"
    ):
        scores.select(0.05, 0.06)
    with pytest.raises(SelectionError, match=r"p=0.1 needs the top 100 .* with p_max=0.1 or more"):
        scores.select(0.1, 0.05)
    with pytest.raises(SelectionError, match=r"q=0.05 and slice=1 needs the top 100 .* with q_max=0.1 or more"):
        scores.select(0.05, 0.05, slice=1)
    with pytest.raises(SelectionError, match=r"p=0.1 needs the top 100 .* with p_max=0.1 or more"):
        scores.select(0.1, 0.05, scope="global")


def test_more_may_be_asked_where_what_was_not_kept_is_not_above_zero():
    harm = {"m0": torch.tensor([[3.0, 0.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])}
    scores = make_scores(harm, None, 1.0, 0.3)
    assert not scores.harm["m0"].complete
    for scope in ("matrix", "global"):
        with pytest.warns(FastpruneWarning, match="3 of the 5 weights asked by q have no harm score above 0"):
            mask = scores.select(None, 0.5, scope=scope)
        assert as_set(mask) == {("m0", 0), ("m0", 3)} and mask.nominal == 5


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.1", [0.1]])
def test_fractions_outside_0_1_are_refused(value):
    scores = make_scores(random_dense(100), random_dense(100))
    with pytest.raises(SelectionError, match=r"q: expected a fraction in \(0, 1\]"):
        scores.select(None, value)
    with pytest.raises(SelectionError, match=r"p: expected a fraction in \(0, 1\]"):
        scores.select(value, 0.1)
    with pytest.raises(ValueError):
        scores.select(None, None)


def test_other_arguments_are_checked():
    scores = make_scores(random_dense(100, 100), random_dense(100, 100))
    with pytest.raises(ArgumentError, match=r"scope: expected one of matrix, global, got 'layer'"):
        scores.select(0.1, 0.1, scope="layer")
    for value in (-1, 0.5, True, None):
        with pytest.raises(ArgumentError, match="slice: expected an integer of 0 or more"):
            scores.select(0.1, 0.1, slice=value)
    for value in ([1], [-1], [0, 7], [0.0], [True], [], "0"):
        with pytest.raises(SelectionError, match=r"layers: expected indices of decoder blocks \(0 to 0\)"):
            scores.select(0.1, 0.1, layers=value)
    with pytest.raises(SelectionError, match="layers: expected an iterable of block indices, got 0"):
        scores.select(0.1, 0.1, layers=0)
    with pytest.raises(SelectionError, match="harm: expected one of the scored criteria"):
        scores.select(0.1, 0.1, harm="wanda")
    for value in ([PruneMask({"m0": torch.tensor([0])}, {"m0": (2, 2)})], [{"m0": torch.tensor([0])}], ["m0"]):
        with pytest.raises(SelectionError, match="protect: expected PruneMasks over the matrices of these scores"):
            scores.select(0.1, 0.1, protect=value)


def test_without_a_benign_set_only_p_none_is_possible():
    scores = make_scores(random_dense(100))
    assert scores.select(None, 0.1).total == 10
    with pytest.raises(SelectionError, match="no benign set; select with p=None"):
        scores.select(0.1, 0.1)


def test_fractions_that_round_to_nothing_are_reported_or_refused():
    scores = make_scores(random_dense(1000, 100), random_dense(1000, 100))
    with pytest.raises(SelectionError, match=r"q=0.0001 rounds to 0 weights in every matrix; .* 0.001 or more"):
        scores.select(None, 1e-4)
    with pytest.raises(SelectionError, match=r"q=0\.0001 rounds to 0 weights in all"):
        scores.select(None, 1e-4, scope="global")
    with pytest.raises(SelectionError, match=r"p=0\.0001 rounds to 0 weights in every matrix"):
        scores.select(1e-4, 0.1)
    with pytest.warns(FastpruneWarning, match=r"q rounds to 0 weights in 1 matrices \(the first is m1\)") as caught:
        mask = scores.select(None, 5e-3)
    assert mask.counts == {"m0": 5, "m1": 0} and mask.metadata["report"]["harm"]["zero"] == ["m1"]
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_mask_says_where_it_comes_from():
    harm, benign = random_dense(1000, 1000), random_dense(1000, 1000, seed=1)
    scores = make_scores(harm, benign)
    protected = scores.select(None, 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = scores.select(np.float64(0.4), 0.1, scope="global", layers=range(1), protect=(protected,))
    report = mask.metadata.pop("report")
    assert mask.metadata == {
        "model": {"id": "toy", "revision": None, "fingerprint": "f" * 64},
        "kind": "selection",
        "fingerprint": "f" * 64,
        "criteria": {"harm": "signed", "benign": "abs"},
        "p": 0.4,
        "q": 0.1,
        "scope": "global",
        "layers": [0],
        "slice": 0,
        "protect": [protected.digest],
    }
    assert report["harm"] == {"asked": 200, "selected": 200, "zero": [], "short": {}}
    assert report["benign"]["asked"] == 800
    assert report["spared_by_benign"] + report["spared_by_protect"] + mask.total == 200
    assert report["spared_by_benign"] == len(
        top(harm, ["m0", "m1"], 0.1, 0, "global")[0] & top(benign, ["m0", "m1"], 0.4, 0, "global")[0]
    )
    assert mask.total == 0 and scores.select(0.4, 0.1).total > 0  # the protected 40 % hold the top tenth


def test_a_shortfall_is_reported_per_matrix():
    harm = {"m0": torch.tensor([[1.0, 2, -1, -1]]), "m1": torch.tensor([[1.0, 2, 3, 4]])}
    with pytest.warns(FastpruneWarning, match="1 of the 6 weights asked by q have no harm score above 0"):
        mask = make_scores(harm).select(None, 0.75)
    assert mask.metadata["report"]["harm"] == {"asked": 6, "selected": 5, "zero": [], "short": {"m0": 1}}
    assert (mask.nominal, mask.total) == (6, 5)


def test_slices_are_the_next_ranks():
    harm = {"m0": torch.arange(1.0, 101).reshape(10, 10)}
    scores = make_scores(harm)
    first, second, third = (scores.select(None, 0.1, slice=s) for s in range(3))
    assert first["m0"].tolist() == list(range(90, 100)) and second["m0"].tolist() == list(range(80, 90))
    assert first | second | third == scores.select(None, 0.3) and (first & second).total == 0
    with pytest.warns(FastpruneWarning, match="10 of the 10 weights"):
        assert scores.select(None, 0.1, slice=10).total == 0


def test_one_mask_may_be_given_to_protect():
    scores = make_scores(random_dense(100))
    mask = scores.select(None, 0.1)
    assert scores.select(None, 0.2, protect=mask) == scores.select(None, 0.2) - mask
