"""The report of a full record: every file is there, and the page says what the record says, all by itself."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.reporting_record import CATEGORIES, Page, make_record, only, rates

from fastprune.errors import ArgumentError
from fastprune.reporting import load_record, write_report
from fastprune.reporting.findings import noise
from fastprune.reporting.palette import DARK, LIGHT
from fastprune.reporting.record import RATES


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of the full record, drawn once."""
    return write_report(make_record(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


@pytest.fixture(scope="module")
def page_text(report: dict[str, Path]) -> str:
    return report["html"].read_text(encoding="utf-8")


def test_every_file_is_there_and_whole(report: dict[str, Path]) -> None:
    assert list(report) == ["record", "sweep", "controls", "heatmap", "transfer", "markdown", "html"]
    folder = report["record"].parent
    assert sorted(folder.iterdir()) == sorted(report.values())  # nothing temporary is left
    for name in ("sweep", "controls", "heatmap", "transfer"):
        content = report[name].read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert content[-8:-4] == b"IEND"
        assert int.from_bytes(content[16:20], "big") >= 1000  # pixels wide
    text = report["html"].read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.endswith("</html>\n")
    assert json.loads(report["record"].read_text(), parse_constant=pytest.fail)["title"] == make_record()["title"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_report(only(title="old", results=[rates("none", harm=1.0)]), tmp_path)
    old = files["html"].read_bytes()
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if Path(target).name == "report.html":
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        write_report(only(title="new", results=[rates("none", harm=0.5)]), tmp_path)
    assert files["html"].read_bytes() == old
    assert load_record(tmp_path)["title"] == "new"
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_the_record_is_safe_when_drawing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr("fastprune.reporting.report.page", failing)
    with pytest.raises(RuntimeError, match="no page"):
        write_report(only(results=[rates("none", harm=1.0), rates("btap", harm=0.0)]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArgumentError, match="out_dir: expected a folder"):
        write_report(only(), tmp_path / "taken")


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    """Regression: an old controls.png lay beside the report of another record."""
    first = write_report(only(results=[rates("none", harm=1.0), rates("btap", harm=0.0)]), tmp_path)
    (tmp_path / "mine.png").write_bytes(b"")
    assert first["controls"].is_file()
    second = write_report(only(results=[rates("none", harm=1.0)]), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in second.values()} | {"mine.png"}


def test_matplotlib_is_used_without_its_global_state(tmp_path: Path) -> None:
    """In a fresh process: nothing is imported early, pyplot never, and the user's style neither counts nor changes."""
    script = """
import sys
import fastprune.reporting as reporting
assert not {"matplotlib", "rich", "torch"} & set(sys.modules), "imported too early"
record = {"results": [{"model": "aligned", "mask": m, "harm": h} for m, h in (("none", 1.0), ("btap", 0.0))]}
first = reporting.write_report(record, sys.argv[1] + "/a")
import matplotlib
matplotlib.rcParams.update({"font.size": 33, "axes.facecolor": "red", "axes.grid": True, "xtick.major.size": 30})
settings = sorted(set(matplotlib.rcParams) - {"backend"})  # to read that one is to choose one, by way of pyplot
before = [matplotlib.rcParams[name] for name in settings]
second = reporting.write_report(record, sys.argv[1] + "/b")
assert [matplotlib.rcParams[name] for name in settings] == before, "settings changed"
assert "matplotlib.pyplot" not in sys.modules, "pyplot was imported"
for name in ("html", "controls", "record"):
    assert first[name].read_bytes() == second[name].read_bytes(), f"{name} is not reproducible"
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_result_stands_in_the_table(page: Page) -> None:
    rows = {tuple(row) for row in page.rows if len(row) == 7}
    names = {
        "none": "not pruned", "btap": "B-TAP", "random": "random", "magnitude": "largest magnitude",
        "sign_flipped": "sign flipped", "unsigned": "unsigned", "no_set_difference": "no set difference",
    }  # fmt: skip
    for row in make_record()["results"]:
        values = [row[key] for key in ("harm", "utility", "neighbour", "recognition", "refusal")]
        cells = ["–" if math.isnan(value) else f"{100 * value:.1f}" for value in values]
        assert (names[row["mask"]], f"{row['pruned']:,}", *cells) in rows


def test_every_other_number_can_be_found(page: Page) -> None:
    record = make_record()
    rows = page.rows
    words = " ".join(page.words)
    for check in record["checks"]:
        bound = check["bound"].replace(">=", "≥").replace("<=", "≤")
        verdict = "✓ holds" if check["holds"] else "✗ fails"
        assert [check["claim"], f"{check['value']:.3f}", bound, verdict] in rows
    for row in record["sweep"]:
        assert any(f"{row['pruned']:,}" in line and f"{100 * row['harm']:.1f}" in line for line in rows)
    for layer, counts in enumerate(record["heatmap"]["counts"]):
        sizes = record["heatmap"]["sizes"][layer]
        assert [str(layer), *(f"{n} of {size:,}" for n, size in zip(counts, sizes, strict=True))] in rows
    for name, harm in zip(CATEGORIES, record["transfer"]["harm"], strict=True):
        assert [name, *(f"{100 * value:.1f}" for value in harm)] in rows
    skills = [f"{100 * row['score']:.1f}" for row in record["skills"] if row["mask"] == "btap"]
    assert ["B-TAP", *skills] in rows
    other = record["dissociation"][0]
    assert ["recognition pruned", f"{other['pruned']:,}", *(f"{100 * other[name]:.1f}" for name in RATES)] in rows
    for fragment in (*record["notes"], "2.13.0+cpu", "organism-seed1-aligned", "2 min 22 s"):
        assert fragment in words.replace("\u00a0", " ")


def test_the_page_says_how_many_models_it_shows(page: Page) -> None:
    assert any(text.endswith("This page shows what that did to 3 models.") for text in page.words)


def test_findings_of_the_plots(page: Page) -> None:
    words = [text.replace("\u00a0", " ") for text in page.words]
    assert "At q = 0.3 % the harm rate is 97 % on base, 94 % on SFT and 2 % on aligned." in words
    assert "1,104 weights in all, densest in layer 2, v_proj: 47 of 16,384 weights (2.9 ‰)." in words
    assert (
        "1 of 5 controls lowers harm by more than 5 points: no set difference "
        "(harm 0 %, but utility 81 %, neighbour 2 % and refusal 50 %). "
        "Pruning recognition instead takes recognition from 100 % to 27 % and takes harm from 100 % to 98 %."
    ) in words
    assert (
        "Mean harm rate: 0 % on the same category, 9 % on the others and 100 % without pruning. "
        "Two masks overlap by 30 % on average (shared weights / union)."
    ) in words
    assert "1 of 7 checks does not hold." in words
    assert (
        "Each harm rate of this table is over 64 held-out prompts: one prompt is 1.6 points, "
        "and the 95 % interval of a rate reaches up to 13 points to either side."
    ) in words
    assert noise({"settings": {"n_eval": 400}}).startswith(
        "Each rate of this table is over 400 held-out prompts: one prompt is 0.25"
    )
    assert noise({"settings": {"n_eval": 1}}).startswith(
        "Each rate of this table is over 1 held-out prompt: one prompt is 100 points, and"
    )
    assert noise({"settings": {"n_eval": None}}) == noise({"settings": {"n_eval": {"a": 1}}}) == noise({}) == ""


def test_page_needs_nothing_but_itself(page: Page, page_text: str) -> None:
    assert "http://" not in page_text
    assert "https://" not in page_text
    assert not re.search(r"url\((?!#)", page_text)
    assert "@import" not in page_text
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "image"}
    assert {"svg", "meta", "details", "style"} <= tags
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attributes), tag
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")


def test_references_inside_the_page_resolve(page: Page, page_text: str) -> None:
    """Two pictures with the same clip path or marker would hide each other's parts."""
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    # matplotlib numbers its groups afresh in each picture, but nothing refers to a group.
    drawn = [name for name in ids if not re.fullmatch(r"[a-z.]+(2d)?_\d+", name)]
    assert len(drawn) == len(set(drawn))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page_text))
    assert used
    assert used <= set(drawn)


def test_pictures_take_all_colours_from_the_palette(page_text: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        paints = set(re.findall(r"\b(?:fill|stroke):\s*([^;\"]+)", drawing))
        assert {LIGHT["muted"], LIGHT["surface"]} <= paints  # the light ground is part of the picture
        assert paints <= {"none", *LIGHT.values()}, paints
    names = set(re.findall(r"var\(--([a-z0-9-]+)\)", page_text)) - {"type", "share"}
    assert names == DARK.keys() <= LIGHT.keys()


def test_page_works_in_both_modes_and_on_a_phone(page_text: str) -> None:
    style = re.search(r"<style>(.*?)</style>", page_text, flags=re.DOTALL)[1]
    light, dark = style.split("@media screen and (prefers-color-scheme: dark)")
    assert f"--harm:{LIGHT['harm']};" in light
    assert f"--harm:{DARK['harm']};" in dark
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page_text
    assert len(re.findall(r'<div class="scroll" tabindex="0"><div class="picture" role="img"', page_text)) == 4


def test_markdown_shows_findings_tables_and_pictures(report: dict[str, Path]) -> None:
    text = report["markdown"].read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# fastprune demo: the model organism, seed 1"
    assert "| aligned | B-TAP | 1,104 | 1.6 | 99.7 | 100.0 | 100.0 | 100.0 |" in lines
    assert "| category transfer, mean off the diagonal | 0.310 | ≤ 0.25 | FAILS |" in lines
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures == ["sweep.png", "controls.png", "heatmap.png", "transfer.png"]
    assert all((report["markdown"].parent / name).is_file() for name in pictures)
