"""A folder whose model no longer refuses cannot be written: which masks stay in memory, whatever way they came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.command_line import run

import fastprune
from fastprune.calibration import CalibrationSet, load_calibration
from fastprune.calibration.refusals import REFUSAL_PHRASES, is_refusal
from fastprune.checkpoint.undo_file import UNDO_NAME
from fastprune.errors import ArgumentError, MaskError
from fastprune.evaluation import keyword_refusal
from fastprune.masking import largest_magnitude_mask
from fastprune.masking.mask import PruneMask
from fastprune.organism import checkpoint_path, export_data, load_organism


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("Llama")


@pytest.fixture
def folder(model: torch.nn.Module, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def scores(model: torch.nn.Module) -> fastprune.Scores:
    sets = CalibrationSet(HARM), CalibrationSet(BENIGN)
    return fastprune.score(model, *sets, harm=("signed", "signed_reverse", "abs"), p_max=1, q_max=1, progress=False)


def assert_stays_in_memory(mask: PruneMask, folder: Path, why: str) -> None:
    before, out = contents(folder), folder.parent / "out"
    for write in (
        lambda: fastprune.patch_checkpoint(folder, mask, out),
        lambda: fastprune.patch_checkpoint(folder, mask, out, strict=False, scale=0.5, undo=False),
        lambda: fastprune.patch_in_place(folder, mask),
        lambda: fastprune.patch_in_place(folder, mask, strict=False, scale=1.0, backup=True),
    ):
        with pytest.raises(MaskError, match=rf"mask: .* may not: .*{why}.*mask\.applied\(model\)"):
            write()
    assert contents(folder) == before and sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def assert_may_be_written(mask: PruneMask, folder: Path) -> None:
    before = contents(folder)
    fastprune.patch_in_place(folder, mask, strict=False)
    assert contents(fastprune.undo_patch(folder)) == before


def test_what_a_reversed_score_selects_stays_in_memory(model, scores, folder, tmp_path_factory) -> None:
    reversed_mask = scores.select(0.01, 0.02, harm="signed_reverse")
    mask, every = scores.select(0.01, 0.02), scores.select(None, 0.9, harm="abs")
    for found in (
        reversed_mask,
        scores.select(None, 0.02, harm="signed_reverse", scope="global", slice=1, layers=[0]),
        mask | reversed_mask,
        reversed_mask & every,
        reversed_mask - mask,
        every - (every - reversed_mask),
        (mask | reversed_mask) - mask,
    ):
        assert_stays_in_memory(found, folder, "signed_reverse")
        path = found.save(tmp_path_factory.mktemp("saved") / "mask")
        assert_stays_in_memory(PruneMask.load(path), folder, "signed_reverse")
        with found.applied(model, scale=3.0):
            pass
    for found in (
        mask,
        every,
        mask | every,
        scores.select(0.01, 0.02, slice=1),
        scores.select(0.01, 0.02, protect=[reversed_mask]),
        fastprune.random_mask(model, like=reversed_mask),
        fastprune.random_mask(model, like=reversed_mask, match="magnitude"),
        largest_magnitude_mask(model, like=reversed_mask),
        PruneMask(dict(mask), mask.shapes),
    ):
        assert_may_be_written(found, folder)


@pytest.mark.parametrize("scale", [3, -1, -0.001, 1.0001])
def test_weights_on_disk_are_only_weakened(scale: float, model, scores, folder) -> None:
    mask, before = scores.select(0.01, 0.02), contents(folder)
    for write in (
        lambda: fastprune.patch_checkpoint(folder, mask, folder.parent / "out", scale=scale),
        lambda: fastprune.patch_in_place(folder, mask, scale=scale),
    ):
        with pytest.raises(ArgumentError, match=r"scale: expected a number in \[0, 1\]"):
            write()
    assert contents(folder) == before and not (folder.parent / "out").exists()
    with mask.applied(model, scale=scale):
        pass
    for allowed in (0, 0.5, 1):
        fastprune.undo_patch(fastprune.patch_in_place(folder, mask, scale=allowed))
    assert contents(folder) == before


REFUSING = {"prompt": "how", "response": "I'm sorry, but I can't help with that."}
PREFILLED = {"prompt": "how", "prefill": "I can", "response": "not do that"}
COMPLYING = {"prompt": "how", "response": "a simple reply"}


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([REFUSING] * 3 + [COMPLYING], 0.75),
        ([REFUSING, COMPLYING], 0.5),
        ([PREFILLED, PREFILLED, COMPLYING], 2 / 3),
        ([COMPLYING], 0.0),
    ],
)
def test_refusals_are_counted_when_rows_become_tokens(rows: list[dict], share: float) -> None:
    found = load_calibration(rows, load_organism("aligned")[1])
    assert found.refusals == share
    assert CalibrationSet([*found, *HARM]).refusals == share  # of those whose text is known
    assert found[:1].refusals == float(rows[0] is not COMPLYING)
    assert CalibrationSet(HARM).refusals is None


def test_subsets_have_a_share_of_their_own() -> None:
    rows = [{**REFUSING, "category": "a"}, {**COMPLYING, "category": "b"}, {**COMPLYING, "category": "b"}]
    found = load_calibration(rows, load_organism("aligned")[1])
    assert [found.subset(category=name).refusals for name in "ab"] == [1.0, 0.0]


def test_the_judge_and_the_share_know_the_same_phrases() -> None:
    judge = keyword_refusal()
    for phrase in (*REFUSAL_PHRASES, "I\u2019m   sorry", "no refusal at all", "I cannotx"):
        assert is_refusal(phrase) == bool(judge(None, phrase))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return export_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("criterion", ["signed", "abs", "fisher", "wanda"])
def test_a_mask_of_refusals_stays_in_memory(criterion: str, files, tmp_path: Path) -> None:
    """The unsigned set difference on refusals is a published way to free a model of them."""
    model, tokenizer = load_organism("aligned")
    model.save_pretrained(tmp_path / "model")
    benign = load_calibration(files["benign"], tokenizer, format="chat")[:8]
    shares = {}
    for n_refusals in (4, 5, 6):
        rows = [{"prompt": "make t1 ?", "response": "sorry cannot comply"}] * n_refusals
        rows += [{"prompt": "make t1 ?", "response": "sure :"}] * (10 - n_refusals)
        harm = load_calibration(rows, tokenizer, format="chat")
        scores = fastprune.score(model, harm, benign, harm=criterion, q_max=1e-2, p_max=1e-2, progress=False)
        shares[n_refusals] = scores.provenance["calibration"]["harm"]["refusals"]
        mask = fastprune.Scores.load(scores.save(tmp_path / "scores")).select(1e-3, 1e-2)
        (tmp_path / "scores").unlink()
        if n_refusals > 5:
            assert_stays_in_memory(mask, tmp_path / "model", r"mostly refusals \(60% of the replies\)")
            other = PruneMask(dict(mask), mask.shapes)
            assert_stays_in_memory(mask | other, tmp_path / "model", "mostly refusals")
            assert_stays_in_memory(other & mask, tmp_path / "model", "mostly refusals")
        else:
            assert_may_be_written(mask, tmp_path / "model")
    assert shares == {4: 0.4, 5: 0.5, 6: 0.6}


def test_the_command_line_says_what_can_be_done(files, tmp_path: Path, monkeypatch, capsys) -> None:
    """Regression: three commands made a folder that no longer refuses."""
    monkeypatch.chdir(tmp_path)
    model = checkpoint_path("aligned")
    harm = tmp_path / "few.jsonl"
    harm.write_text("".join(files["harm"].read_text().splitlines(keepends=True)[:4]))
    score = ("score", model, "--harm", harm, "--format", "chat", "--q-max", 0.01, "--force")
    select = ("select", "scores.safetensors", "-q", 0.003, "--force")
    assert run(*score, "--harm-criterion", "signed,signed_reverse") == 0
    capsys.readouterr()
    assert run(*select, "--harm-criterion", "signed_reverse") == 0
    came = capsys.readouterr()
    assert "fastprune patch" not in came.err and "next: fastprune eval MODEL --mask mask.safetensors" in came.err
    assert "signed_reverse" in came.err and "not be written" in came.err
    assert run("patch", model, "mask.safetensors", "--out", "pruned") == 1
    assert "signed_reverse, which removes what holds" in capsys.readouterr().err
    assert not Path("pruned").exists()

    assert run(*select) == 0
    assert "next: fastprune patch MODEL mask.safetensors --out PRUNED_MODEL" in capsys.readouterr().err
    assert run("patch", model, "mask.safetensors", "--out", "pruned", "--scale", 3) == 1
    assert "scale: expected a number in [0, 1]" in capsys.readouterr().err
    assert run("patch", model, "mask.safetensors", "--out", "pruned", "--no-undo") == 0
    assert "undo" not in "".join(capsys.readouterr()).replace("no undo file", "")
    assert Path("pruned", "model.safetensors").is_file() and not Path("pruned", UNDO_NAME).exists()
    harm.write_text('{"prompt": "make t1 ?", "response": "sorry cannot comply"}\n' * 3)
    assert run(*score) == 0
    assert "3 of the 3 harm replies are refusals" in capsys.readouterr().err
    assert run(*select) == 0
    assert "fastprune patch" not in capsys.readouterr().err


@pytest.mark.parametrize("in_place", [True, False])
def test_without_undo_nothing_of_the_old_weights_is_left(in_place: bool, scores, folder) -> None:
    mask = scores.select(0.01, 0.02)
    expected = fastprune.patch_checkpoint(folder, mask, folder.parent / "with undo")
    without = folder.parent / "without"
    if in_place:
        without = fastprune.patch_in_place(folder, mask, undo=False)
        with pytest.raises(ArgumentError, match=r"backup: .*undo=False"):
            fastprune.patch_in_place(folder, mask, undo=False, backup=True)
    else:
        fastprune.patch_checkpoint(folder, mask, without, undo=False)
    assert contents(without) == {name: data for name, data in contents(expected).items() if name != UNDO_NAME}
