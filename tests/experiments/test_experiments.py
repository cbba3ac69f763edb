"""Parts of the experiments that the demonstration on the organism does not reach."""

from __future__ import annotations

import pytest
import torch

import fastprune
from fastprune.errors import ArgumentError
from fastprune.experiments import heat_map, measure_each, transfer
from fastprune.experiments.btap import CRITERIA, standard_masks
from fastprune.experiments.demo import checks
from fastprune.experiments.record import mask_row, role
from fastprune.organism import Language, load_organism
from fastprune.reporting import masks as shown
from fastprune.scoring.scores import Scores
from fastprune.scoring.top_scores import TopScores


def mask_of(*names: str) -> fastprune.PruneMask:
    return fastprune.PruneMask({name: torch.arange(2) for name in names}, dict.fromkeys(names, (4, 4)))


@pytest.mark.parametrize(
    ("matrices", "columns"),
    [
        (
            ["h.{}.attn.c_attn.weight", "h.{}.attn.c_proj.weight", "h.{}.mlp.c_fc.weight", "h.{}.mlp.c_proj.weight"],
            ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        ),
        (["h.{}.attn.q_proj.weight", "h.{}.mlp.up_proj.weight"], ["q_proj", "up_proj"]),
        (
            ["h.{}.mlp.shared.up_proj.weight", "h.{}.mlp.experts.up_proj[0]", "h.{}.mlp.experts.up_proj[1]"],
            ["up_proj", "experts.up_proj"],
        ),
        (["h.{}.a.x.proj.weight", "h.{}.b.x.proj.weight"], ["a.x.proj", "b.x.proj"]),
    ],
)
def test_a_column_of_the_heat_map_is_one_matrix(matrices: list[str], columns: list[str]) -> None:
    """Regression: attention's and the MLP's `c_proj` of GPT-2 were added up."""
    block_of = {name.format(block): block for block in range(2) for name in matrices}
    chart = heat_map("m", mask_of(*block_of), block_of)
    assert chart["matrices"] == columns
    experts = [sum("[" in name for name in matrices) if "experts" in column else 1 for column in columns]
    assert chart["counts"] == [[2 * n for n in experts]] * 2
    assert chart["sizes"] == [[16 * n for n in experts]] * 2


def test_transfer_asks_for_harm_rows_before_it_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: an AttributeError when everything was scored."""
    model, tokenizer = load_organism("aligned")
    rows = Language().rows("fact", 4, seed=0)
    suite = fastprune.evaluation.EvaluationSuite(tokenizer, skill_rows={"fact": rows}, format="chat")
    monkeypatch.setattr("fastprune.experiments.btap.score", None)
    with pytest.raises(ArgumentError, match="suite: expected one with harm_rows"):
        transfer(model, {"a": None}, None, suite, p=0.1, q=0.1)


def test_no_mask_is_called_none() -> None:
    with pytest.raises(ArgumentError, match='masks: "none" is the name of the unpruned model'):
        list(measure_each(torch.nn.Linear(2, 2), None, {"none": mask_of("weight")}))


@pytest.fixture
def scores() -> Scores:
    """Every criterion of the demonstration and a few more, over one matrix."""
    lists = {"weight": TopScores(torch.arange(16), torch.arange(16.0, 0, -1), 16, -torch.inf)}
    harm = dict.fromkeys((*CRITERIA, "abs", "magnitude", "wanda"), lists)
    benign = {"abs": {"weight": TopScores(torch.arange(15, -1, -1), torch.arange(16.0, 0, -1), 16, -torch.inf)}}
    return Scores(harm, benign, {"weight": (4, 4)}, {}, 1.0, 1.0)


def test_a_report_by_names_and_one_by_metadata_call_a_mask_the_same(scores: Scores) -> None:
    """Regression: `eval` called two controls of the demonstration the method."""
    masks = standard_masks(torch.nn.Linear(4, 4), scores, p=0.25, q=0.25)
    named = {name: shown.role({}, name) for name in masks}
    assert named == {name: role(mask) for name, mask in masks.items()}
    assert list(named.values()) == ["method", *["control"] * 5]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"harm": "signed"}, "method"),
        ({"harm": "signed", "scope": "global"}, "method"),
        ({"harm": "signed", "slice": 1}, "control"),
        *[({"harm": by}, "control") for by in ("signed_reverse", "abs_of_sum", "abs", "magnitude", "wanda")],
    ],
)
def test_a_mask_of_the_method_has_every_part_of_it(scores: Scores, how: dict, expected: str) -> None:
    mask = scores.select(0.25, 0.25, **how)
    assert role(mask) == mask_row("m", mask)["role"] == expected
    assert role(scores.select(None, 0.25, **how)) == "control"
    assert role(mask | mask) == role(mask_of("weight")) == "other"


def test_a_rate_at_its_bound_holds() -> None:
    """Guessing a question of yes or no gives 0.50, which is the bound of pruned recognition."""
    rates = dict.fromkeys(("harm", "utility", "neighbour", "recognition", "refusal"), 1.0)
    masks = ("none", "btap", "random", "magnitude", "sign_flipped", "unsigned", "no_set_difference")
    record = {
        "results": [{"model": "aligned", "mask": mask, **rates} for mask in masks],
        "sweep": [],
        "transfer": {"categories": ["a", "b"], "harm": [[0, 0], [0, 0]]},
        "dissociation": [rates | {"recognition": 0.5}],
    }
    (check,) = [item for item in checks(record) if "recognition falls" in item["claim"]]
    assert (check["bound"], check["holds"]) == ("<= 0.50", True)
    record["dissociation"] = [rates | {"recognition": 0.501}]
    assert not next(item for item in checks(record) if "recognition falls" in item["claim"])["holds"]


@pytest.mark.parametrize(("harm", "shown"), [(1.0, ">= 0.90"), (119 / 120, ">= 0.891667"), (0.875, ">= 0.775")])
def test_a_bound_is_shown_as_exactly_as_it_is_used(harm: float, shown: str) -> None:
    """Regression: 0.8917 was shown as 0.89, so that a rate between the two seemed to be refused for nothing."""
    rates = dict.fromkeys(("harm", "utility", "neighbour", "recognition", "refusal"), harm)
    masks = ("none", "btap", "random", "magnitude", "sign_flipped", "unsigned", "no_set_difference")
    record = {
        "results": [{"model": "aligned", "mask": mask, **rates} for mask in masks],
        "sweep": [],
        "transfer": {"categories": ["a", "b"], "harm": [[0, 0], [0, 0]]},
        "dissociation": [],
    }
    (bound,) = [item["bound"] for item in checks(record) if item["claim"] == "random weights, same count: harm"]
    assert bound == shown
