"""The sentences, the numbers and the table of the terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.reporting_record import HOSTILE, make_record, only, rates

from fastprune.errors import ArtifactError
from fastprune.evaluation import ATTACKS, JUDGES, Measurement
from fastprune.reporting import print_results
from fastprune.reporting.control_findings import controls_finding
from fastprune.reporting.findings import headline
from fastprune.reporting.formatting import check_value, number, percent, percents, seconds, share
from fastprune.reporting.glossary import definitions
from fastprune.reporting.plots import controls_plot
from fastprune.reporting.record import RATES, checked


def said(record: dict[str, Any]) -> str:
    return headline(checked(record)).replace("\u00a0", " ")


def test_headline_of_the_demo() -> None:
    assert said(make_record()) == (
        "Removing 1,104 weights (0.15 % of the model) takes the harm rate under prefilling from 100 % to 2 %; "
        "utility stays at 99.7 %. Removing as many random weights changes nothing (harm rate 100 %)."
    )


HEADLINES = [
    ([], ""),
    ([rates("none", harm=0.9, utility=0.8)], "Without pruning, the harm rate is 90 % and utility is 80 %."),
    ([rates("none", harm=None)], ""),
    ([rates("btap", harm=0.1)], "Pruning gives a harm rate of 10 % (the unpruned level is not in this record)."),
    (
        [rates("none", harm=0.9, utility=1.0), rates("btap", harm=0.9, utility=0.5, pruned=7)],
        "Removing 7 weights leaves the harm rate at 90 %: no harm was removed in this run; "
        "utility falls from 100 % to 50 %.",
    ),
    (
        [rates("none", harm=0.90), rates("btap", harm=0.85)],
        "Pruning hardly changes the harm rate (90 % before, 85 % after): no harm was removed in this run.",
    ),
    (
        [rates("none", harm=0.5), rates("btap", harm=0.75)],
        "Pruning raises the harm rate from 50 % to 75 %: no harm was removed in this run.",
    ),
    (
        [rates("none", harm=0.02), rates("btap", harm=0.0)],
        "Pruning leaves little to see: the harm rate is 2 % without pruning and 0 % with it.",
    ),
    (
        [rates("none", harm=1.0), rates("btap", harm=0.2, pruned=9), rates("random", harm=0.5, pruned=9)],
        "Removing 9 weights takes the harm rate from 100 % to 20 %. Removing as many random weights takes the harm "
        "rate from 100 % to 50 %, so the fall is not special to the chosen weights.",
    ),
    (
        [rates("none", harm=1.0), rates("btap", harm=0.2, pruned=9), rates("random", harm=0.9, pruned=5)],
        "Removing 9 weights takes the harm rate from 100 % to 20 %. "
        "Removing 5 random weights takes the harm rate from 100 % to 90 %.",
    ),
    (
        [
            rates("none", harm=1.0, utility=1.0),
            rates("btap", harm=0.2, utility=1.0),
            rates("random", harm=1.0, utility=0.4),
        ],
        "Pruning takes the harm rate from 100 % to 20 %; utility stays at 100 %. "
        "Removing random weights leaves the harm rate at 100 % and takes utility from 100 % to 40 %.",
    ),
    (  # regression: "changes nothing", as only harm and utility were looked at
        [
            rates("none", harm=1.0, utility=1.0, refusal=1.0, recognition=0.9),
            rates("btap", harm=0.2, utility=1.0),
            rates("random", harm=1.0, utility=1.0, refusal=0.2, recognition=0.5),
        ],
        "Pruning takes the harm rate from 100 % to 20 %; utility stays at 100 %. Removing random weights leaves the "
        "harm rate at 100 % and takes recognition from 90 % to 50 % and refusal from 100 % to 20 %.",
    ),
    (
        [rates("none", harm=0.6, refusal=1.0), rates("btap", harm=0.2), rates("random", harm=0.8, refusal=0.5)],
        "Pruning takes the harm rate from 60 % to 20 %. "
        "Removing random weights raises the harm rate to 80 % and takes refusal from 100 % to 50 %.",
    ),
    (
        [rates("none", harm=1.0), rates("btap", harm=0.2), rates("random", harm=1.0)],
        "Pruning takes the harm rate from 100 % to 20 %. Removing random weights leaves the harm rate at 100 %.",
    ),
    (  # regression: "leaves little to see"
        [rates("none", harm=0.02), rates("btap", harm=0.9)],
        "Pruning raises the harm rate from 2 % to 90 %: no harm was removed in this run.",
    ),
    (
        [
            rates("none", harm=1.0, recognition=1.0, refusal=1.0, neighbour=1.0),
            rates("btap", harm=0.0, recognition=0.77, refusal=0.95, neighbour=0.02),
        ],
        "Pruning takes the harm rate from 100 % to 0 %. "
        "But neighbour falls from 100 % to 2 % and recognition falls from 100 % to 77 %.",
    ),
    (
        [rates("none", harm=1.0), rates("sign_flipped", harm=0.2)],
        "Pruning (sign flipped) takes the harm rate from 100 % to 20 %.",
    ),
    (
        [rates("none", "my", harm=1.0), rates("my.mask", "my", harm=0.5, pruned=8), rates("none", "base", harm=0.3)],
        "Removing 8 weights (my.mask) takes the harm rate from 100 % to 50 %.",
    ),
]


@pytest.mark.parametrize(("results", "expected"), HEADLINES, ids=range(len(HEADLINES)))
def test_headline_says_what_the_numbers_say(results: list[dict[str, Any]], expected: str) -> None:
    assert said(only(results=results)) == expected


def kinds(**chosen: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"mask": name, "role": role, "kind": kind} for name, (role, kind) in chosen.items()]


@pytest.mark.parametrize("order", [1, -1])
def test_a_mask_is_what_the_record_says_and_not_what_it_is_called(order: int) -> None:
    """Regression: the second mask was the control, and a file `random.safetensors` the random one, whatever it held."""
    results = [
        rates("random", "my", harm=0.1, pruned=7),
        rates("btap", "my", harm=1.0, pruned=7),
        rates("mixed", "my", harm=0.5, pruned=9),
    ]
    masks = kinds(random=("method", "selection"), btap=("control", "random (count)"), mixed=("other", "algebra"))
    masks[0] |= {"p": 0.05, "q": 0.003, "slice": 0, "criteria": {"harm": "signed", "benign": "abs"}}
    record = only(results=[rates("none", "my", harm=1.0), *results[::order]], masks=masks[::order])
    assert said(record) == (
        "Removing 7 weights (random) takes the harm rate from 100 % to 10 %. "
        "Removing as many random weights leaves the harm rate at 100 %."
    )
    assert controls_finding(record).replace("\u00a0", " ") == (
        "The control does not lower harm by more than 5 points. "
        "The other mask lowers harm by more than 5 points: mixed (harm 50 %)."
    )
    words = {word: text for heading, group in definitions(record) for word, text in group}
    assert words["random"] == "the method: selected by signed without the best by abs, p = 0.05, q = 0.003"
    assert words["btap"] == "control: weights drawn at random"
    assert words["mixed"] == "combined from other masks"
    assert words["not pruned"] == "the model as it is"
    assert "B-TAP" not in printed(record)


def test_without_what_the_masks_are_a_second_one_is_no_control() -> None:
    record = only(results=[rates("none", harm=1.0), rates("one", harm=0.2), rates("two", harm=0.8)])
    assert said(record) == (
        "Pruning (one) takes the harm rate from 100 % to 20 %. Pruning (two) takes the harm rate from 100 % to 80 %."
    )
    assert controls_finding(record) == ""


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_masks_of_the_method_none_is_the_headline_by_its_place(order: int) -> None:
    """Regression: the first one given was "the method", the others were "other masks"."""
    masks = kinds(weak=("method", "selection"), strong=("method", "selection"), drawn=("control", "random (count)"))
    results = [rates("weak", "my", harm=0.8, utility=1.0), rates("strong", "my", harm=0.1, utility=0.5)]
    results.append(rates("drawn", "my", harm=1.0, utility=1.0))
    record = only(results=[rates("none", "my", harm=1.0, utility=1.0), *results[::order]], masks=masks)
    weak = "Pruning (weak) takes the harm rate from 100 % to 80 %; utility stays at 100 %."
    strong = "Pruning (strong) takes the harm rate from 100 % to 10 %; utility falls from 100 % to 50 %."
    last = "Removing random weights changes nothing (harm rate 100 %)."
    assert said(record) == " ".join([*[weak, strong][::order], last])
    assert "mask" not in controls_finding(record)
    reading = controls_plot(checked(record)).reading
    names = " and ".join(["weak", "strong"][::order])
    assert reading.endswith(f"; {names} are masks of the method, the others are controls.")


def test_names_of_the_demonstration_keep_their_words_where_the_record_says_what_they_are() -> None:
    masks = kinds(btap=("method", "selection"), unsigned=("control", "selection"))
    results = [rates("none", harm=1.0), rates("unsigned", harm=1.0), rates("btap", harm=0.0)]
    own = only(results=results, masks=[row | {"standard": True} for row in masks])
    assert said(own) == "Pruning takes the harm rate from 100 % to 0 %."
    words = {word: text for heading, group in definitions(own) for word, text in group}
    assert words["B-TAP"].startswith("the method: ") and words["unsigned"] == "control: the harm score without its sign"
    assert said(only(results=results, masks=masks)) == "Pruning (btap) takes the harm rate from 100 % to 0 %."


def test_no_sentence_calls_a_patched_model_unpruned() -> None:
    model = {"name": "m", "patched": {"mask": "abc", "weights": 12_345, "scale": 0.0}}
    results = [rates("none", "m", harm=0.06, pruned=0, **dict.fromkeys(RATES[1:], 1.0)), rates("x", "m", harm=0.02)]
    record = checked(only(model=model, results=results))
    assert said(record) == "Pruning (x) leaves little to see: the harm rate is 6 % as stored and 2 % with it."
    assert controls_plot(record).caption == "Dashed: the level as stored."
    words = {word: text for heading, group in definitions(record) for word, text in group}
    label = "as stored (patched: 12,345 weights)"
    assert words[label] == "the model as its folder holds it, where a patch has changed 12,345 weights"
    lines = [line.strip() for line in printed(record, 80).splitlines()]
    assert "12,345 weights)" in lines  # on a line of its own, where 80 columns are too few
    assert max(map(len, lines)) <= 80
    assert label in printed(record, 200)


def measured(n: int, **masks: dict[str, float]) -> dict[str, Any]:
    """A record that holds the intervals of its rates, as that of `eval` does."""
    parts = {mask: {name: Measurement(rate, n).to_dict() for name, rate in row.items()} for mask, row in masks.items()}
    rows = [
        {
            **rates(mask, "my"),
            **{name: part[name] for name in ("harm", "refusal") if name in part},
            "recognition": {"accuracy": part.get("recognition")},
            "skills": {"copy": part["utility"]} if "utility" in part else {},
        }
        for mask, part in parts.items()
    ]
    made = kinds(**{m: ("control", "random (count)") if m == "random" else ("method", "selection") for m in masks})
    results = [rates(mask, "my", **row) for mask, row in masks.items()]
    return only(results=results, measurements=rows, masks=made[1:])


@pytest.mark.parametrize(
    ("n", "before", "after", "expected"),
    [
        (500, 0.98, 0.88, "takes the harm rate from 98 % to 88 %"),
        (5000, 0.98, 0.96, "takes the harm rate from 98 % to 96 %"),
        (8, 1.0, 0.75, "takes the harm rate from 100 % to 75 % (no more than chance may do)"),
        (
            8,
            0.75,
            1.0,
            "takes the harm rate from 75 % to 100 % (no more than chance may do): no harm was removed in this run",
        ),
        (500, 0.88, 0.98, "raises the harm rate from 88 % to 98 %: no harm was removed in this run"),
        (500, 0.98, 0.98, "leaves the harm rate at 98 %: no harm was removed in this run"),
        (500, 0.984, 0.98, "takes the harm rate from 98.4 % to 98.0 % (no more than chance may do)"),
        (500, 0.08, 0.02, "takes the harm rate from 8 % to 2 %"),
        (500, 0.02, 0.01, "leaves little to see: the harm rate is 2 % without pruning and 1 % with it"),
    ],
)
def test_what_is_beyond_chance_depends_on_the_sample_size(n: int, before: float, after: float, expected: str) -> None:
    """Regression: "98 % before, 88 % after: no harm was removed in this run", over 500 prompts."""
    record = measured(n, none={"harm": before}, m={"harm": after})
    assert said(record) == f"Pruning (m) {expected}."


def test_what_the_method_loses_is_named_by_the_rule_for_random_weights() -> None:
    """Regression: losses of the method were named from 10 points on, those of random weights from 5."""
    old, new = {"harm": 1.0, "recognition": 0.99, "refusal": 0.9}, {"recognition": 0.92, "refusal": 0.88}
    many = measured(500, none=old, m={"harm": 0.1, **new}, random={"harm": 0.98, **new})
    assert said(many) == (
        "Pruning (m) takes the harm rate from 100 % to 10 %. But recognition falls from 99 % to 92 %. Removing random "
        "weights takes the harm rate from 100 % to 98 % and recognition from 99 % to 92 %."
    )
    assert controls_finding(many).replace("\u00a0", " ") == (
        "The control lowers harm beyond chance: random (harm 98 %, but recognition 92 %)."
    )
    few = measured(20, none=old, m={"harm": 0.1, **new}, random={"harm": 0.98, **new})
    assert said(few) == (
        "Pruning (m) takes the harm rate from 100 % to 10 %. "
        "Removing random weights changes nothing beyond chance (harm rate 98 %)."
    )
    assert controls_finding(few) == "The control does not lower harm beyond chance."
    del many["measurements"]  # then points decide, for both
    assert said(many) == (
        "Pruning (m) takes the harm rate from 100 % to 10 %. But recognition falls from 99 % to 92 %. Removing random "
        "weights hardly changes the harm rate (100 % before, 98 % after) and takes recognition from 99 % to 92 %."
    )


def test_utility_is_as_sure_as_the_mean_of_its_skills() -> None:
    """Four skills of 100 prompts each are one of 400; a skill without its interval leaves the points to decide."""
    skills = [{s: Measurement(rate, 100).to_dict() for s in "abcd"} for rate in (0.99, 0.955)]
    results = [rates("none", "my", harm=1.0, utility=0.99), rates("m", "my", harm=0.0, utility=0.955)]
    rows = [rates(mask, "my", skills=part) for mask, part in zip(("none", "m"), skills, strict=True)]
    record = only(results=results, measurements=rows)
    assert said(record).endswith("; utility falls from 99 % to 96 %.")
    del skills[0]["a"]["interval"]
    assert said(record).endswith("; utility is 96 %, 99 % before.")
    record["measurements"] = [rates(row["mask"], "my", skills={"a": row["skills"]["b"]}) for row in rows]
    assert said(record).endswith("; utility is 96 %, 99 % before.")


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [
        (0.984, 0.98, ("98.4 %", "98.0 %")),
        (0.998, 0.99, ("99.8 %", "99.0 %")),
        (1.0, 0.9974, ("100 %", "99.7 %")),
        (0.98, 0.02, ("98 %", "2 %")),
        (0.98441, 0.98449, ("98.44 %", "98.45 %")),
        (0.5, 0.500001, ("50 %", "50 %")),
        (0.3, 0.3, ("30 %", "30 %")),
        (1.0, 0.9999999, ("100 %", "> 99.9 %")),
        (0.0, 0.004, ("0 %", "0.4 %")),
    ],
)
def test_two_rates_side_by_side_are_told_apart(before: float, after: float, texts: tuple[str, str]) -> None:
    """Regression: "from 98 % to 98 %"."""
    assert tuple(text.replace("\u00a0", " ") for text in percents(before, after)) == texts


def test_what_does_not_change_is_said_not_to() -> None:
    row = rates("recognition", recognition=0.2, harm=0.98)
    record = only(results=[rates("none", recognition=1.0, harm=0.98), rates("btap", harm=0.0)], dissociation=[row])
    record["results"].append(rates("magnitude", harm=0.98))
    assert (
        controls_finding(record)
        .replace("\u00a0", " ")
        .endswith("Pruning recognition instead takes recognition from 100 % to 20 % and does not change harm (98 %).")
    )


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("judge", JUDGES)
def test_the_harm_rate_is_qualified_by_attack_and_judge(attack: str, judge: str) -> None:
    record = only(results=[rates("none", harm=0.5)], settings={"attack": attack, "judge": judge})
    terms = " ".join(filter(None, ("the harm rate", ATTACKS[attack].phrase, JUDGES[judge].qualifier)))
    assert headline(record).startswith(f"Without pruning, {terms} is 50")


def test_an_attack_that_is_not_in_the_table_is_named() -> None:
    record = only(results=[rates("none", harm=0.5)], settings={"attack": "my attack"})
    assert "the harm rate under my attack is" in headline(record)


@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (0.5, 0.9), (1.0, 0.95)])
def test_key_words_draw_no_conclusion_about_harm(before: float, after: float) -> None:
    """Regression: "no harm was removed" of a model that answered with nonsense, which holds no refusal."""
    settings = {"attack": "prefilling", "judge": "not-refused"}
    record = only(results=[rates("none", harm=before), rates("btap", harm=after)], settings=settings)
    assert "the harm rate under prefilling (not refused, by keywords)" in said(record)
    assert "no harm was removed" not in said(record)
    words = dict(definitions(record)[0][1])
    assert "holds no refusal phrase (not refused, by keywords)" in words["harm"]
    assert "get the harmful answer" not in words["harm"]
    record["settings"]["judge"] = "exact"
    assert "keywords" not in said(record)
    assert "get the harmful answer under prefilling" in dict(definitions(record)[0][1])["harm"]


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (percent, 1.0, "100 %"),
        (percent, 0.9974, "99.7 %"),
        (percent, 0.99999, "> 99.9 %"),
        (percent, 0.984375, "98 %"),
        (percent, 0.005, "0.5 %"),
        (percent, 0.995, "99.5 %"),
        (percent, 0.0051, "1 %"),
        (percent, 0.9949, "99 %"),
        (percent, 1e-12, "< 0.1 %"),
        (percent, 0.004, "0.4 %"),
        (percent, 0.00001, "< 0.1 %"),
        (percent, 0, "0 %"),
        (percent, float("nan"), "–"),
        (share, 5e-6, "0.0005 %"),
        (share, 5.1e-6, "0.00051 %"),
        (share, 0.003, "0.3 %"),
        (share, 0.125, "12.5 %"),
        (share, 0.2, "20 %"),
        (share, 1.0, "100 %"),
        (share, 0.0, "0 %"),
        (share, None, "–"),
        (number, 0.015625, "0.01562"),
        (number, 12345.678, "12,345.7"),
        (number, 1e-7, "1e-07"),
        (number, 3.0, "3"),
        (number, float("inf"), "–"),
        (check_value, 1.0, "1.000"),
        (check_value, -0.08333, "-0.083"),
        (check_value, 0.0, "0.000"),
        (check_value, 2e-4, "0.0002"),
        (check_value, 12345.678, "12,345.7"),
        (check_value, float("nan"), "–"),
        (seconds, 179.7, "3 min 00 s"),
        (seconds, 18.3, "18 s"),
        (seconds, 0.41, "0.41 s"),
        (seconds, None, "–"),
    ],
)
def test_numbers_are_written_for_people(function: Callable[[Any], str], value: Any, text: str) -> None:
    assert function(value).replace("\u00a0", " ") == text


def printed(record: dict[str, Any], width: int = 80, files: dict[str, Path] | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    print_results(record, console, files)
    return console.file.getvalue()


def test_terminal_shows_results_verdict_and_files() -> None:
    files = {"html": Path("/somewhere/with a long name" * 4) / "report.html", "sweep": Path("sweep.png")}
    text = printed(make_record(), files=files)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "removed harm utility neighbour recognition refusal" in lines
    for row in (*make_record()["results"], *make_record()["dissociation"]):
        values = [row[key] for key in ("harm", "utility", "neighbour", "recognition", "refusal")]
        cells = " ".join("–" if math.isnan(value) else f"{100 * value:.1f}" for value in values)
        assert any(line.endswith(f"{row['pruned']:,} {cells}") for line in lines)
    assert [line for line in lines if line in ("aligned", "SFT", "base")] == ["aligned", "SFT", "base"]
    assert "1 of 7 checks does not hold." in lines
    assert "✗ category transfer, mean off the diagonal: 0.310, expected ≤ 0.25" in lines
    assert max(map(len, text.splitlines()[: lines.index("rates in %")])) <= 80
    for name, path in files.items():
        assert f"{name} {path}" in lines  # whole, not wrapped


@pytest.mark.parametrize("width", [40, 72, 80, 200])
def test_terminal_never_cuts_a_number_or_reads_markup(width: int) -> None:
    row = {"model": "m [bold red]", "mask": "x [bold] " + HOSTILE, "pruned": 123_456_789, **dict.fromkeys(RATES, 1.0)}
    text = printed(only(results=[{**row, "perplexity": 12.5}], checks=[{"claim": HOSTILE, "holds": False}]), width)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "removed harm utility neighbour recognition refusal perplexity" in lines
    assert any(line.endswith("123,456,789" + " 100.0" * 5 + " 12.5") and "x [bold]" in line for line in lines)
    assert "m [bold red]" in lines
    assert "\x1b" not in text


def test_terminal_without_results() -> None:
    assert printed(only()) == ""
    assert "All 2 checks hold." in printed(only(checks=[{"claim": "a", "holds": True}, {"claim": "b", "holds": True}]))
    with pytest.raises(ArtifactError, match="results"):
        printed(only(results=7))
