"""What ``Scores.select`` takes, and the advice in its errors, which has to work when it is followed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from support.selection import make_scores, random_dense

from fastprune.errors import ArgumentError, SelectionError
from fastprune.scoring.select import _least_fraction


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("role", ["p", "q"])
@pytest.mark.parametrize("sizes", [(1000,), (1540,), (1540, 10), (4100,)])
def test_the_least_fraction_that_an_error_names_is_enough(role, scope, sizes):
    """Rounded to the nearest, the bound for 1540 weights would be 0.000649, which selects none again."""
    scores = make_scores(random_dense(*sizes), random_dense(*sizes, seed=1))

    def report(fraction):
        fractions = {"p": fraction, "q": 0.1} if role == "p" else {"p": None, "q": fraction}
        return scores.select(**fractions, scope=scope).metadata["report"]["benign" if role == "p" else "harm"]

    with pytest.raises(SelectionError, match=f"^{role}=1e-09 rounds to 0 weights") as caught:
        report(1e-9)
    with warnings.catch_warnings(action="ignore"):  # of the smaller matrix, from which none is selected
        assert report(float(str(caught.value).rpartition("expected ")[2].split()[0]))["asked"] == 1


def test_the_least_fraction_is_enough_for_any_number_of_weights():
    for numel in [*range(1, 5000), *(2**i * 5**j for i in range(30) for j in range(12)), 4096 * 14336, 70 * 10**9]:
        assert int(float(_least_fraction(numel)) * numel) >= 1


def test_nothing_to_protect_may_be_none():
    scores = make_scores(random_dense(1000))
    mask = scores.select(None, 0.1, protect=None)
    assert mask == scores.select(None, 0.1) and mask.metadata["protect"] == []
    assert scores.select(None, 0.1, protect=mask).total == 0  # a mask is an iterable, too, of names
    with pytest.raises(ArgumentError, match="protect: expected an iterable of PruneMasks, got 3"):
        scores.select(None, 0.1, protect=3)


def test_a_slice_may_be_an_integer_of_numpy(tmp_path):
    scores = make_scores(random_dense(1000))
    mask = scores.select(None, 0.1, slice=np.int64(2))
    assert mask == scores.select(None, 0.1, slice=2) and type(mask.metadata["slice"]) is int
    mask.save(tmp_path / "a.mask")
    for value in (True, np.bool_(True), np.float64(2), np.int64(-1)):
        with pytest.raises(ArgumentError, match="slice: expected an integer of 0 or more"):
            scores.select(None, 0.1, slice=value)
