"""The table of criteria: what every row has to be, and what an extension says that was built without its formula."""

from __future__ import annotations

import pytest
import torch
from support.criteria import statistic_for

from fastprune import ops
from fastprune.errors import BackendError
from fastprune.ops import criteria, reference
from fastprune.ops.criteria import CRITERIA, FORMULAS, STATISTICS
from fastprune.testing.oracle import oracle_score


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_oracle_defines_the_same_score(criterion: str) -> None:
    weight = torch.randn(7, 5, dtype=torch.float64)
    statistic = statistic_for(criterion, torch.randn(7, 5, dtype=torch.float64))
    statistics = {} if statistic is None else {CRITERIA[criterion].statistic: statistic}
    expected = oracle_score(weight, statistics, criterion)
    found = reference.form_scores(weight, statistic, criterion)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", CRITERIA.values(), ids=CRITERIA)
def test_rows_name_what_there_is(row: criteria.Criterion) -> None:
    """``abs_weight`` alone reads no statistic: any other formula would read memory where there is none."""
    assert row.statistic in (*STATISTICS, None) and row.formula in FORMULAS
    assert (row.statistic is None) == (row.formula == "abs_weight")


def test_the_extension_has_every_formula() -> None:
    from fastprune import _cpp

    assert set(_cpp.Formula.__members__) == set(FORMULAS)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> str:
    """A criterion with a product that no extension was built with."""
    monkeypatch.setitem(FORMULAS, "unbuilt_product", lambda w, s: (w * s) * (w * s))
    monkeypatch.setitem(CRITERIA, "trial", criteria.Criterion("trial", "grad_sum", "unbuilt_product"))
    return "trial"


@pytest.mark.parametrize("backend", [None, "cpp"])
def test_an_extension_without_the_formula_says_so(trial: str, backend: str | None) -> None:
    """This was a bare KeyError."""
    weight = torch.randn(3, 5)
    with pytest.raises(BackendError, match=r"^backend 'cpp': .* 'unbuilt_product', got one without it"):
        ops.top_scores(weight, weight, trial, 4, backend=backend)
    best = (weight * weight).square().max()
    assert ops.top_scores(weight, weight, trial, 4, backend="torch")[1][0] == best
