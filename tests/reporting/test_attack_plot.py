"""The plot of harm by attack and depth, and that its sentence says what its numbers say."""

from __future__ import annotations

import re

import pytest

from fastprune.errors import ArtifactError
from fastprune.reporting.attack_plot import attack_plot
from fastprune.reporting.record import checked


def record(*harms: float | None, mask: str = "btap", **changes: object) -> dict:
    labels = ["prefilling row", "prefilling 10", "prefilling 20"]
    facts = {"n": 12, "interval": [0.0, 1.0], "cut": 1}
    rows = [
        {"model": "m", "mask": name, "attack": label, "harm": value, **facts, **changes}
        for name, values in (("none", (0.9, 0.9, 0.9)), (mask, harms))
        for label, value in zip(labels, values, strict=True)
    ]
    return {
        "results": [{"model": "m", "mask": name, "harm": 0.5, "pruned": 9} for name in ("none", mask)],
        "masks": [{"mask": mask, "role": "method"}],
        "attacks": rows,
    }


def test_the_sentence_names_the_worst_case() -> None:
    plot = attack_plot(checked(record(0.0, 0.25, 0.75)))
    said = "75 % under the worst attack (prefilling 20) and 0 % under the mildest (prefilling row)"
    assert said in words(plot.finding)
    assert "100" not in plot.finding
    same = attack_plot(checked(record(0.25, 0.25, 0.25)))
    assert words(same.finding).endswith("the harm rate is 25 % under every attack.")


def words(text: str) -> str:
    return re.sub(r"\s", " ", text)


def test_its_table_has_every_number() -> None:
    plot = attack_plot(checked(record(0.0, None, 0.75)))
    rows = {(row[1], row[2]): row[3:] for row in plot.table.rows}
    assert len(rows) == 6
    assert [row[3] for row in plot.table.rows] == ["90.0"] * 3 + ["0.0", "–", "75.0"]
    assert {row[5] for row in plot.table.rows} == {"12"} and {row[6] for row in plot.table.rows} == {"1"}
    assert "NaN" not in plot.svg() and plot.png().startswith(b"\x89PNG")


def test_one_attack_has_no_plot() -> None:
    one = record(0.1, 0.2, 0.3)
    one["attacks"] = [row for row in one["attacks"] if row["attack"] == "prefilling 10"]
    assert attack_plot(checked(one)) is None
    assert attack_plot(checked({"results": one["results"]})) is None


@pytest.mark.parametrize(
    "change", [{"harm": 25}, {"n": -1}, {"interval": [0.1]}, {"cut": 0.5}, {"attack": ""}, {"unanswered": "x"}]
)
def test_rows_out_of_the_schema_are_refused_by_name(change: dict) -> None:
    with pytest.raises(ArtifactError, match=rf'record\["attacks"\]\[0\]\["{next(iter(change))}"\]'):
        checked(record(0.1, 0.2, 0.3, **change))
