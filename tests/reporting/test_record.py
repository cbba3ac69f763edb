"""The record: what is refused, by which name, and that it survives its file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.reporting_record import make_record, only, rates

from fastprune.errors import ArtifactError, NotFoundError
from fastprune.reporting import load_record, validate, write_report
from fastprune.reporting.figures import Plot


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures are not the matter here."""
    monkeypatch.setattr(Plot, "png", lambda self: b"")
    monkeypatch.setattr(Plot, "svg", lambda self: "<svg></svg>")


def test_record_survives_the_file(tmp_path: Path) -> None:
    path = write_report(make_record(), tmp_path)["record"]
    expected = make_record()
    for row in expected["results"]:
        if math.isnan(row["refusal"]):
            row["refusal"] = None
    assert load_record(path) == expected
    assert load_record(tmp_path) == expected


def test_numbers_of_other_libraries_and_paths_become_json(tmp_path: Path) -> None:
    record = only(
        results=({"model": "base", "mask": "none", "pruned": np.int64(3), "harm": np.float32(0.25)},),
        settings={"model": Path("a/b"), "lr": float("inf"), "flags": (True, None)},
    )
    loaded = load_record(write_report(record, tmp_path)["record"])
    assert loaded["results"] == [{"model": "base", "mask": "none", "pruned": 3, "harm": 0.25}]
    assert loaded["settings"] == {"model": "a/b", "lr": None, "flags": [True, None]}


def test_report_leaves_the_callers_record_alone(tmp_path: Path) -> None:
    record = only(results=[rates("none", harm=float("nan"))])
    write_report(record, tmp_path)
    assert record.keys() == {"schema", "results"}
    assert math.isnan(record["results"][0]["harm"])


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change to a record: ``_set("results", 3, "harm", 7)`` puts a 7 there."""
    *keys, last, value = path

    def change(record: dict[str, Any]) -> None:
        place: Any = record
        for key in keys:
            place = place[key]
        place[last] = value

    return change


BAD = [
    (_set("schema", 2), 'record["schema"]: expected 1'),
    (_set("schema", True), 'record["schema"]'),
    (_set("title", 7), 'record["title"]: expected a string, got 7'),
    (_set("notes", "one note"), 'record["notes"]: expected a list'),
    (_set("notes", 0, None), 'record["notes"][0]: expected a string'),
    (_set("settings", []), 'record["settings"]: expected a dict'),
    (_set("model", "parameters", -1), 'record["model"]["parameters"]: expected a whole number >= 0'),
    (_set("model", "patched", {"weights": "all"}), 'record["model"]["patched"]["weights"]: expected a whole number'),
    (_set("model", "patched", {}), 'record["model"]["patched"]: expected the key \'weights\''),
    (_set("timings", "score_s", "long"), 'record["timings"]["score_s"]: expected a number'),
    (_set("results", {}), 'record["results"]: expected a list'),
    (_set("results", 1, []), 'record["results"][1]: expected a dict'),
    (_set("results", 3, "harm", 98.4), 'record["results"][3]["harm"]: expected a fraction from 0 to 1'),
    (_set("results", 3, "utility", -0.01), 'record["results"][3]["utility"]'),
    (_set("results", 3, "refusal", "1"), 'record["results"][3]["refusal"]'),
    (_set("results", 3, "recognition", True), 'record["results"][3]["recognition"]'),
    (_set("results", 3, "neighbour", float("inf")), 'record["results"][3]["neighbour"]'),
    (_set("results", 0, "pruned", 1.5), 'record["results"][0]["pruned"]: expected a whole number'),
    (_set("results", 0, "mask", " "), 'record["results"][0]["mask"]: expected a name'),
    (lambda record: record["results"][2].pop("model"), "record[\"results\"][2]: expected the key 'model'"),
    (_set("dissociation", 0, "harm", 2), 'record["dissociation"][0]["harm"]: expected a fraction'),
    (_set("skills", 0, "skill", None), 'record["skills"][0]["skill"]'),
    (_set("sweep", 4, "q", float("nan")), 'record["sweep"][4]["q"]: expected a fraction'),
    (lambda record: record["sweep"][1].pop("q"), "record[\"sweep\"][1]: expected the key 'q'"),
    (
        _set("masks", [{"mask": "m", "role": "hero"}]),
        'record["masks"][0]["role"]: expected one of method, control, other',
    ),
    (_set("masks", [{"mask": "m"}]), "record[\"masks\"][0]: expected the key 'role'"),
    (
        _set("measurements", [{"model": "m", "mask": "none", "harm": {"rate": 7}}]),
        'record["measurements"][0]["harm"]["rate"]: expected a fraction',
    ),
    (
        _set("measurements", [{"model": "m", "mask": "none", "recognition": {"pairs": {"interval": [0.5]}}}]),
        'record["measurements"][0]["recognition"]["pairs"]["interval"][0]: expected 2 numbers',
    ),
    (
        _set("measurements", [{"model": "m", "mask": "none", "skills": {"a": {"by_category": {"b": {"n": -1}}}}}]),
        'record["measurements"][0]["skills"]["a"]["by_category"]["b"]["n"]: expected a whole number',
    ),
    (_set("checks", 0, "holds", "yes"), 'record["checks"][0]["holds"]: expected true or false'),
    (_set("checks", 0, "value", "high"), 'record["checks"][0]["value"]: expected a number'),
    (lambda record: record["heatmap"].pop("counts"), "record[\"heatmap\"]: expected the key 'counts'"),
    (_set("heatmap", "layers", 0, "first"), 'record["heatmap"]["layers"][0]'),
    (lambda record: record["heatmap"]["counts"].pop(), 'record["heatmap"]["counts"]: expected 4 rows, got \'3 rows\''),
    (lambda record: record["heatmap"]["sizes"][2].pop(), 'record["heatmap"]["sizes"][2]: expected 7 numbers'),
    (_set("heatmap", "counts", 1, 2, 0.5), 'record["heatmap"]["counts"][1][2]: expected a whole number'),
    (_set("transfer", "harm", 5, 0, 1.01), 'record["transfer"]["harm"][5][0]: expected a fraction'),
    (_set("transfer", "n", [14]), 'record["transfer"]["n"][0]: expected 6 numbers'),
    (lambda record: record["transfer"]["unpruned"].pop(), 'record["transfer"]["unpruned"]'),
    (lambda record: record["transfer"]["overlap"].pop(), 'record["transfer"]["overlap"]: expected 6 rows'),
    (_set("extra", {1: 2}), 'record["extra"]: expected keys that are strings'),
    (_set("extra", [object]), 'record["extra"][0]: expected a JSON value'),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_records_are_refused_by_the_name_of_the_key(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    record = make_record()
    change(record)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        write_report(record, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if '"extra"' not in message:
        with pytest.raises(ArtifactError, match=re.escape(message)):
            validate(record)


@pytest.mark.parametrize("record", [None, [], "record.json"])
def test_what_is_no_dict_is_no_record(record: Any) -> None:
    with pytest.raises(ArtifactError, match="record: expected a dict"):
        validate(record)


def test_missing_values_are_allowed_where_numbers_are_measured() -> None:
    nan = float("nan")
    validate(
        {"results": [rates("none", pruned=None, harm=nan)], "checks": [{"claim": "c", "holds": False, "value": nan}]}
    )
    validate({"heatmap": {"layers": [0], "matrices": ["a"], "counts": [[None]], "sizes": None}, "notes": None})
    validate({"transfer": {"categories": ["a"], "harm": [[None]], "unpruned": [nan], "overlap": None}})
    validate({})


def test_files_that_are_no_records_are_refused(tmp_path: Path) -> None:
    whole = write_report(make_record(), tmp_path / "report")["record"].read_bytes()
    for name, content in {"truncated": whole[:-40], "foreign": b"\x89PNG\xff", "list": b"[1]", "empty": b""}.items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}.json"):
            load_record(path)
    with pytest.raises(NotFoundError, match=r"absent\.json"):
        load_record(tmp_path / "absent.json")
    with pytest.raises(NotFoundError, match="folder that holds one"):
        load_record(tmp_path)
