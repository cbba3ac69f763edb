"""``fastprune eval`` as a user runs it: what goes into its record, and what is refused before anything is evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.command_line import run

import fastprune
from fastprune.evaluation import EvaluationSuite
from fastprune.organism import checkpoint_path, export_data
from fastprune.reporting import load_record

NAME, SHAPE = "model.layers.0.mlp.up_proj.weight", (256, 128)


def make_mask(path: Path, metadata: dict | None = None, shape: tuple[int, int] = SHAPE) -> Path:
    return fastprune.PruneMask({NAME: torch.arange(40)}, {NAME: shape}, metadata).save(path)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The first rows of each kind, so that an evaluation takes no time."""
    folder, few = tmp_path_factory.mktemp("rows"), {}
    for name, path in export_data(folder / "all").items():
        few[name] = folder / path.name
        few[name].write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    return few


@pytest.fixture
def never_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(*arguments: object, **options: object) -> None:
        raise AssertionError("the evaluation was begun")

    monkeypatch.setattr(EvaluationSuite, "run", evaluated)


@pytest.mark.usefixtures("never_evaluated")
def test_a_mask_cannot_take_the_place_of_the_unpruned_model(tmp_path: Path, rows: dict[str, Path], capsys) -> None:
    """Regression: the numbers of `none.safetensors` were shown as those without pruning."""
    mask = make_mask(tmp_path / "none.safetensors")
    assert run("eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--mask", mask) == 1
    assert 'mask: "none" is what the report calls the unpruned model; rename' in capsys.readouterr().err


@pytest.mark.usefixtures("never_evaluated")
def test_what_can_be_checked_is_checked_before_the_evaluation(tmp_path: Path, rows: dict[str, Path], capsys) -> None:
    """Regression: a mask that does not fit was refused when the unpruned model had been evaluated."""
    good, bad = make_mask(tmp_path / "good.safetensors"), make_mask(tmp_path / "bad.safetensors", shape=(256, 64))
    evaluate = ("eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--format", "chat", "--mask", good)
    assert run(*evaluate, "--mask", bad) == 1
    assert f"{NAME} has the shape (256, 128) in the model and (256, 64) in the mask" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert run(*evaluate, "--mask", make_mask(tmp_path / "other" / "good.safetensors")) == 1
    assert "two of the mask files have the same name, good" in capsys.readouterr().err


def test_the_model_may_be_the_current_folder(
    tmp_path: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: Path(".").name is empty, which the record refused when the evaluation was over."""
    shutil.copytree(checkpoint_path("aligned"), tmp_path / "m")
    monkeypatch.chdir(tmp_path / "m")
    assert run("eval", ".", "--harm", rows["eval_harm"], "--format", "chat", "--out", tmp_path / "report") == 0
    assert json.loads((tmp_path / "report" / "record.json").read_text())["results"][0]["model"] == "m"


def test_results_are_shown_though_the_report_cannot_be_written(
    tmp_path: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastprune.reporting.report.write_atomically", full)
    evaluate = ("eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--format", "chat")
    assert run(*evaluate, "--out", tmp_path / "report") == 1
    came = capsys.readouterr()
    assert "not pruned" in came.out
    assert came.err.splitlines()[-1] == "fastprune: error: [Errno 28] No space left on device"


def test_a_truncated_checkpoint_is_named(tmp_path: Path, rows: dict[str, Path], capsys) -> None:
    """Regression: a traceback of safetensors, where `score` has one line."""
    shutil.copytree(checkpoint_path("aligned"), tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run("eval", tmp_path / "m", "--harm", rows["eval_harm"], "--format", "chat") == 1
    error = capsys.readouterr().err
    assert f"model: the weights in {tmp_path / 'm'} are truncated" in error
    assert "Traceback" not in error


def test_attacks_depths_and_limits_are_in_record_and_page(rows: dict[str, Path], tmp_path: Path, capsys) -> None:
    mask = make_mask(tmp_path / "some.safetensors")
    words = ["eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--format", "chat", "--mask", mask]
    words += ["--attack", "prefilling", "--attack", "none", "--prefill-tokens", "row,1,4", "--max-new-tokens", "harm=2"]
    assert run(*words, "--refusal-tokens", "3", "--out", tmp_path / "report", "--quiet") == 0
    record = load_record(tmp_path / "report")
    labels = ["prefilling row", "prefilling 1", "prefilling 4", "none"]
    assert record["settings"]["attacks"] == labels and record["settings"]["attack"] == labels[0]
    assert record["settings"]["max_new_tokens"] == {"harm": 2, "refusal": 3}
    measured = [(row["mask"], row["attack"]) for row in record["attacks"]]
    assert measured == [(name, label) for name in ("none", "some") for label in labels]
    depths = [row["settings"]["depth"] for row in record["attacks"] if "depth" in row["settings"]]
    assert depths == ["row", 1, 4] * 2
    for row in record["results"]:
        [first] = [r for r in record["attacks"] if r["mask"] == row["mask"] and r["attack"] == labels[0]]
        assert row["harm"] == first["harm"] and first["n"] == 8
    # the answers of the organism have three words: two tokens do not hold them
    assert {row["cut"] for row in record["attacks"] if row["attack"] == "prefilling row"} == {8}
    assert any("16 of 16 answers behind the rates of harm ended at their length limit" in n for n in record["notes"])
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "Harm under each attack and depth" in page and "prefilling 4" in page
    assert (tmp_path / "report" / "attacks.png").stat().st_size > 1000
    capsys.readouterr()
    assert run(*words, "--refusal-tokens", "off", "--json", "--quiet") == 0
    assert {row["refusal"] for row in json.loads(capsys.readouterr().out)["results"]} == {None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prefill-tokens", "row,zero"), "--prefill-tokens: expected row, numbers of tokens, or both"),
        (("--attack", "none", "--prefill-tokens", "10"), "--prefill-tokens: expected --attack prefilling, got none"),
        (("--max-new-tokens", "rhyme=3"), "a number of tokens, or KIND=NUMBER with harm, skill for the kind, got"),
        (("--max-new-tokens", "0"), "--max-new-tokens: expected a number of tokens"),
        (("--refusal-tokens", "none"), "--refusal-tokens: expected a number of tokens, or off, got 'none'"),
        (("--device", "cpu", "--device-map", "auto"), "--device: expected --device or --device-map, got both"),
        (("--device-map", "cpu"), "--device-map: expected one of auto, balanced"),
    ],
)
@pytest.mark.usefixtures("never_evaluated")
def test_limits_depths_and_maps_are_refused_by_their_options(
    words: tuple[str, ...], message: str, rows: dict[str, Path], capsys
) -> None:
    assert run("eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--format", "chat", *words) == 1
    assert message in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_the_numbers(
    rows: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: UnicodeEncodeError at the space between a number and its unit, after the evaluation."""
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        assert run("eval", checkpoint_path("aligned"), "--harm", rows["eval_harm"], "--format", "chat") == 0
    assert "the harm rate under prefilling is 100 %" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_patched_checkpoint_is_not_called_unpruned(
    in_place: bool, tmp_path: Path, rows: dict[str, Path], capsys
) -> None:
    """Regression: "Without pruning, the harm rate is …" of a folder that `fastprune patch` had changed."""
    folder, mask = tmp_path / "m", make_mask(tmp_path / "mask.safetensors")
    shutil.copytree(checkpoint_path("aligned"), folder)
    where = ["--in-place"] if in_place else ["--out", tmp_path / "patched"]
    assert run("patch", folder, mask, "--no-strict", *where) == 0
    folder = folder if in_place else tmp_path / "patched"
    evaluate = ("eval", folder, "--harm", rows["eval_harm"], "--format", "chat", "--out", tmp_path / "report")
    capsys.readouterr()
    assert run(*evaluate) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "As stored (patched: 40 weights), the harm rate under prefilling is" in shown
    record = load_record(tmp_path / "report")
    facts = {"mask": fastprune.PruneMask.load(mask).digest, "weights": 40, "scale": 0.0}
    assert record["model"] == {"name": folder.name, "patched": facts}
    assert record["results"][0]["mask"] == "none"
    for name in ("report.html", "report.md"):
        text = (tmp_path / "report" / name).read_text()
        assert "as stored (patched: 40 weights)" in text
        assert "ithout pruning" not in text and "not pruned" not in text


@pytest.mark.usefixtures("never_evaluated")
def test_weights_that_a_patch_did_not_leave_so_are_refused(tmp_path: Path, rows: dict[str, Path], capsys) -> None:
    """Nobody could say what was evaluated: a patch that was cut short, or a file that was put in its place."""
    folder = tmp_path / "m"
    shutil.copytree(checkpoint_path("aligned"), folder)
    assert run("patch", folder, make_mask(tmp_path / "mask.safetensors"), "--no-strict", "--in-place") == 0
    shutil.copy(checkpoint_path("aligned") / "model.safetensors", folder)
    assert run("eval", folder, "--harm", rows["eval_harm"], "--format", "chat") == 1
    assert "model.safetensors is not as" in capsys.readouterr().err


def test_the_record_says_how_each_number_came_about(tmp_path: Path, rows: dict[str, Path]) -> None:
    """Regression: no sample sizes, intervals, categories, pairs, provenance of masks, nor that checks were off."""
    facts = {
        "kind": "selection",
        "fingerprint": "0" * 64,
        "criteria": {"harm": "signed", "benign": "abs"},
        "p": 0.05,
        "q": 0.003,
        "scope": "matrix",
        "slice": 0,
        "report": {"spared_by_benign": 7, "spared_by_protect": 0},
    }
    first = make_mask(tmp_path / "first.safetensors", facts)
    # a name says nothing: this one was chosen like a method's, from the wrong end
    second = make_mask(tmp_path / "btap.safetensors", facts | {"criteria": {"harm": "signed_reverse", "benign": "abs"}})
    model, control = checkpoint_path("aligned"), tmp_path / "control.safetensors"
    third = make_mask(tmp_path / "random.safetensors")
    assert run("control", model, third, "--seed", 5, "--out", control) == 0
    files = ["--harm", rows["eval_harm"], "--skills", rows["eval_skills"], "--recognition", rows["eval_recognition"]]
    masks = ["--mask", control, "--mask", first, "--mask", second, "--mask", third]
    assert run("eval", model, *files, *masks, "--format", "chat", "--no-strict", "--out", tmp_path / "report") == 0
    record = load_record(tmp_path / "report")

    chosen = {row["mask"]: row for row in record["masks"]}
    assert list(chosen) == ["control", "first", "btap", "random"]
    assert [row["role"] for row in chosen.values()] == ["control", "method", "control", "other"]
    assert [row["kind"] for row in chosen.values()] == ["random (count)", "selection", "selection", "unknown"]
    assert chosen["control"]["seed"] == 5
    assert chosen["control"]["like"] == chosen["random"]["digest"] == fastprune.PruneMask.load(third).digest
    expected = {"p": 0.05, "q": 0.003, "criteria": facts["criteria"], "spared_by_benign": 7, "pruned": 40}
    assert expected.items() <= chosen["first"].items()

    settings = record["settings"]
    assert (settings["strict"], settings["dtype"], settings["max_new_tokens"]) == (False, "float32", {"refusal": 128})
    assert settings["n_eval"]["harm"] == settings["n_eval"]["recognition"] == 8
    assert record["notes"] == ["Masks were applied without asking whether they were made for this model."]
    assert [row["mask"] for row in record["measurements"]] == ["none", *chosen]
    for row, measured in zip(record["results"], record["measurements"], strict=True):
        assert set(row) == {"model", "mask", "pruned", "harm", "utility", "neighbour", "recognition", "refusal"}
        assert (row["harm"], 8) == (measured["harm"]["rate"], measured["harm"]["n"])
        low, high = measured["harm"]["interval"]
        assert low <= row["harm"] <= high
        assert sum(part["n"] for part in measured["harm"]["by_category"].values()) == 8
        assert row["recognition"] == measured["recognition"]["accuracy"]["rate"]
        assert measured["recognition"]["pairs"]["n"] == 4
        assert 0 <= measured["recognition"]["yes_rate"] <= 1
        assert all(part["n"] >= 1 for part in measured["skills"].values())
