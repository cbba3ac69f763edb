"""Pages of odd records: hostile names, absent sections, awkward data; and that all of it can be read."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest
from support.reporting_record import HOSTILE, Page, make_record, only, rates

from fastprune.reporting import load_record, write_report
from fastprune.reporting.figures import Plot
from fastprune.reporting.heatmaps import transfer_plot
from fastprune.reporting.page import page
from fastprune.reporting.palette import DARK, LIGHT, STEPS, shade
from fastprune.reporting.plots import controls_plot, sweep_plot
from fastprune.reporting.record import checked

ATTRIBUTES = {
    "aria-hidden", "aria-label", "charset", "class", "clip-path", "colspan", "content", "d", "height", "id", "lang",
    "name", "role", "scope", "style", "tabindex", "transform", "type", "viewbox", "width", "x", "xlink:href", "y",
}  # fmt: skip


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    record = {
        "title": HOSTILE,
        "created": HOSTILE,
        "notes": [HOSTILE],
        "model": {"name": HOSTILE, HOSTILE: HOSTILE},
        "settings": {"attack": HOSTILE, HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]},
        "environment": {"fastprune": HOSTILE},
        "timings": {HOSTILE: 1.0},
        HOSTILE: HOSTILE,
        "results": [
            {"model": HOSTILE, "mask": mask, "pruned": 1, "harm": 0.5, HOSTILE: HOSTILE} for mask in ("none", HOSTILE)
        ],
        "skills": [{"model": HOSTILE, "mask": HOSTILE, "skill": HOSTILE, "score": 1.0}],
        "sweep": [{"model": HOSTILE, "q": 0.001, "harm": 0.5, "pruned": 0}],
        "heatmap": {"model": HOSTILE, "layers": [0], "matrices": [HOSTILE, "$\\frac$"], "counts": [[1, 1]]},
        "transfer": {"categories": [HOSTILE], "harm": [[0.5]]},
        "checks": [{"claim": HOSTILE, "bound": HOSTILE, "holds": False}],
    }
    files = write_report(record, tmp_path)
    text = files["html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert "\x1b" not in text
    shown = "<script>alert('x')</script> \"> & $\\frac | [bold red] [31m # head"
    assert page.words.count(shown) >= 10
    assert all(set(attributes) <= ATTRIBUTES for _, attributes in page.tags)
    notes = files["markdown"].read_text(encoding="utf-8")
    assert "<script" not in notes
    assert "\x1b" not in notes
    for line in notes.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (5, 6)
    assert load_record(files["record"])["title"] == HOSTILE


SECTIONS = {
    "results": ("Results", None),
    "checks": ("Checks", None),
    "skills": ("Benign skills one by one", None),
    "notes": ("Keep in mind", None),
    "settings": ("How this was made", None),
    "timings": ("How this was made", None),
    "sweep": ("How much harm and utility are left as more weights are removed", "sweep"),
    "heatmap": ("Where the removed weights are", "heatmap"),
    "transfer": ("Pruned on one category of harm, tested on all", "transfer"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_stands_alone(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plot, "png", lambda self: b"")  # drawn in the tests above; here the words count
    monkeypatch.setattr(Plot, "svg", lambda self: "<svg></svg>")
    data = make_record()[section]
    if section == "results":
        data = data[:1]
    files = write_report(only(**{section: data}), tmp_path)
    heading, plot = SECTIONS[section]
    assert list(files) == ["record", *([plot] if plot else []), "markdown", "html"]
    words = Page(files["html"].read_text(encoding="utf-8")).words
    assert heading in words
    others = {other for other, _ in SECTIONS.values()} - {heading}
    assert not others & set(words)
    assert not re.search(r"\b(nan|None)\b", " ".join(words))


def test_empty_record_is_a_page_too(tmp_path: Path) -> None:
    files = write_report({}, tmp_path)
    page = Page(files["html"].read_text(encoding="utf-8"))
    assert page.words.count("fastprune report") == 2  # the title of the window and of the page
    assert not {"h2", "table", "svg"} & {tag for tag, _ in page.tags}


def test_evaluation_of_some_model_shows_its_own_columns(tmp_path: Path) -> None:
    rows = [{"model": "my-model", "mask": "none", "harm": 0.37, "utility": None, "perplexity": 7.3214}]
    files = write_report(only(results=rows), tmp_path)
    found = Page(files["html"].read_text(encoding="utf-8")).rows
    assert found == [
        ["weights", "removed", "harm, %", "perplexity"],
        ["my-model"],
        ["not pruned", "–", "37.0", "7.321"],
    ]
    assert "| my-model | not pruned | – | 37.0 | 7.321 |" in files["markdown"].read_text(encoding="utf-8")


def test_sample_sizes_intervals_and_masks_are_shown(tmp_path: Path) -> None:
    part = {"rate": 0.25, "n": 8, "interval": [0.072, 0.591]}
    measured = {"harm": {**part, "cut": 3, "by_category": {"alder": part}}, "refusal": None, "skills": {"copy": part}}
    measured["recognition"] = {"accuracy": part, "pairs": part, "yes_rate": 0.5}
    record = only(
        results=[{"model": "my-model", "mask": "none", "harm": 0.25}],
        measurements=[{"model": "my-model", "mask": "none", **measured}],
        masks=[{"mask": "my-mask", "role": "method", "kind": "selection", "digest": "abc123", "q": 0.5}],
        settings={"strict": False},
    )
    page = Page(write_report(record, tmp_path)["html"].read_text(encoding="utf-8"))
    named = ["harm", "harm, alder", "refusal", "recognition", "recognition, pairs", "copy"]
    for name in named:
        row = ["my-model", "not pruned", name, "25.0", "7.2 to 59.1", "8", "3" if name == "harm" else "–"]
        assert (row in page.rows) == (name != "refusal"), name
    assert ["my-model", "not pruned", "recognition, answered “harmful”", "50.0", "–", "–", "–"] in page.rows
    assert "role: method, kind: selection, digest: abc123, q: 0.5" in page.words
    assert "Other entries of the record" not in page.words


def test_a_chart_says_0_and_100_of_exactly_these_rates_only() -> None:
    """Regression: 99.6 % was drawn as 100 and 0.4 % as 0, in bars and cells."""
    results = [rates("none", harm=0.996, utility=1.0), rates("btap", harm=0.004, utility=0.99999)]
    transfer = {"categories": ["a", "b"], "harm": [[0.004, 0.25], [0.0, 0.996]], "overlap": [[1.0, 0.003], [0.3, 1.0]]}
    record = only(results=results, transfer=transfer)
    drawn = [re.findall(r"<text[^>]*>([^<]+)</text>", plot(record).svg()) for plot in (controls_plot, transfer_plot)]
    bars, cells = ([html.unescape(words) for words in texts] for texts in drawn)
    for shown, expected in ((bars, {"99.6", "0.4", "> 99.9"}), (cells, {"0.4", "25", "0", "99.6", "0.3", "30", "100"})):
        assert expected <= set(shown)
    assert bars.count("100") == 3  # utility without pruning, and the end of two axes
    assert cells.count("100") == 2


def test_the_map_says_over_how_few_prompts_its_cells_are() -> None:
    """Regression: no sample size beside the map, and 120 prompts in the sentence above it."""
    transfer = {"categories": ["a", "b"], "n": [14, 24], "harm": [[0.0, 0.25], [0.0, None]]}
    plot = transfer_plot(checked(only(transfer=transfer)))
    assert "a (14)" in plot.svg() and "b (24)" in plot.svg()
    assert plot.finding.replace("\u00a0", " ") == (
        "Mean harm rate: 0 % on the same category and 12 % on the others. Each cell is over 14 to 24 held-out prompts: "
        "its 95 % interval reaches up to 27 points to either side."
    )
    assert plot.table.rows[-2:] == [
        ["held-out prompts", "14", "24"],
        ["95 % interval, points at most", "± 27", "± 21"],
    ]
    alike = checked(only(transfer=transfer | {"n": [14, 14]}))
    assert (
        "Each cell is over 14 held-out prompts: its 95 % interval reaches up to 27 points"
        in transfer_plot(alike).finding
    )
    unknown = transfer_plot(checked(only(transfer=transfer | {"n": [0, None]})))
    assert "prompts:" not in unknown.finding
    assert unknown.table.rows[-1][1:] == ["–", "–"]


def test_two_figures_of_a_tile_are_told_apart() -> None:
    """Regression: "99.8 % → 99 %"."""
    record = only(results=[rates("none", harm=0.984, utility=0.998), rates("btap", harm=0.98, utility=0.99)])
    text = page(checked(record), []).replace("\u00a0", " ")
    assert "<i>98.4 % → </i>98.0 %" in text
    assert "<i>99.8 % → </i>99.0 %" in text
    record["results"][1]["harm"] = 0.984
    same = page(checked(record), []).replace("\u00a0", " ")
    assert "<i></i>98 %</b><p>harm rate; should fall, does not change</p>" in same


@pytest.mark.filterwarnings("error")
def test_awkward_data_can_be_drawn(tmp_path: Path) -> None:
    """Nothing pruned, nothing measured, one point, many layers, unlike names: no warning of matplotlib's either."""
    nothing = float("nan")
    record = only(
        sweep=[
            {"model": "base", "q": 0.0, "harm": 1.0},
            {"model": "base", "q": 1e-6, "harm": nothing, "pruned": 0},
            {"model": "other", "q": 0.3, "harm": 0.5, "utility": None, "pruned": 0},
        ],
        heatmap={
            "layers": list(range(33)),
            "matrices": ["a", "a_b"],
            "counts": [[0, None]] * 33,
            "sizes": [[0, 9]] * 33,
        },
        transfer={"categories": ["only one"], "harm": [[None]], "unpruned": [None], "overlap": [[None]]},
        results=[rates("none", utility=nothing), rates("btap", utility=0.5)],
    )
    assert {"sweep", "heatmap", "transfer", "controls"} <= write_report(record, tmp_path).keys()


def _contrast(one: str, two: str) -> float:
    """WCAG 2 contrast ratio of two ``#rrggbb`` colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_on_its_ground() -> None:
    """The page has two grounds; pictures stand on the light one in both modes."""
    for name in ("ink", "muted", "base", "sft", "aligned", "other-1", "other-2", "other-3", "harm", "kept"):
        assert _contrast(LIGHT[name], LIGHT["surface"]) >= 4.5, name
    for name in ("ink", "muted", "aligned", "harm", "kept"):
        assert _contrast(DARK[name], DARK["surface"]) >= 4.5, name
    for ramp in ("weights", "rate"):
        for step in range(STEPS):
            color, ink = shade(ramp, step + 0.5, STEPS)
            assert color == LIGHT[f"{ramp}-{step}"]
            assert _contrast(color, ink) >= 4.5, (ramp, step)


def test_every_model_stands_in_the_legend_of_the_sweep() -> None:
    """Also one whose name matplotlib would leave out, and one that has no point in the first panel."""
    rows = [{"model": "_mine", "q": q, "harm": q} for q in (0.1, 0.2)] + [{"model": "other", "q": 0.2, "utility": 1.0}]
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", sweep_plot(checked(only(sweep=rows))).svg())
    assert {"mine", "other"} <= set(texts)
