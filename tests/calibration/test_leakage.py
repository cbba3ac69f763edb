"""Rows of one set that are in another: against the definition, one pair at a time, and by the hashes in a mask."""

from __future__ import annotations

import itertools
import json
import random
import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import build
from support.command_line import run

import fastprune
from fastprune.calibration import CalibrationSet, Row, check_overlap, load_calibration, overlap
from fastprune.calibration.leakage import compared
from fastprune.calibration.prompts import PromptHashes, PromptIndex
from fastprune.errors import CalibrationError
from fastprune.organism import checkpoint_path, export_data

WORDS = [a + b for a in "abcdefg" for b in "uvwxyz"]


def literal(first: str, second: str) -> str | None:
    """The definition: exact, near, or nothing; of prompts of ASCII words."""
    if first == second:
        return "exact"
    words = [[w.strip(string.punctuation).lower() for w in text.split()] for text in (first, second)]
    words = [[w for w in each if w] for each in words]
    if "".join(words[0]) == "".join(words[1]):
        return "near"
    if min(map(len, words)) < 8:
        return None
    grams = [{tuple(each[i : i + 5]) for i in range(len(each) - 4)} for each in words]
    shorter = min(grams, key=len)
    return "near" if len(grams[0] & grams[1]) >= 0.9 * len(shorter) else None


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_it_finds_what_the_definition_says(seed: int) -> None:
    draw = random.Random(seed)
    first = [" ".join(draw.choices(WORDS, k=draw.randint(1, 40))) for _ in range(12)]
    second = []
    for _ in range(12):
        words = draw.choice(first).split()
        for _ in range(draw.choice([0, 0, 1, 2, 5])):  # a few edits
            place = draw.randrange(len(words))
            words[place : place + draw.randint(0, 1)] = draw.choices(WORDS, k=draw.randint(0, 2)) or ["x"]
        edit = draw.choice(
            [str, str.upper, "{}!".format, "Please: {}".format, lambda t: t + " " + " ".join(WORDS[:30])]
        )
        second.append(edit(" ".join(words)))
    found = overlap([{"prompt": text} for text in first], [{"prompt": text} for text in second])
    expected = {}
    for row, text in enumerate(second):
        kinds = {literal(other, text) for other in first} - {None}
        if kinds:
            expected[row] = "exact" in kinds
    assert {pair.row: pair.exact for pair in found.pairs} == expected
    for pair in found.pairs:
        assert literal(first[pair.other], second[pair.row]) is not None


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("Write a poem.", "write  a POEM", "near"),
        ("Ｗrite a poem", "Write a poem", "near"),
        ("don't stop", "dont stop", "near"),
        ("Straße", "STRASSE", "near"),
        ("写一首关于大海的诗歌吧朋友", "请写一首关于大海的诗歌吧朋友", "near"),
        ("Write a poem", "Write two poems", None),
        ("one two three", "one two three four", None),
        ("?!", "?!", "exact"),
        ("?!", "...", None),
    ],
)
def test_case_punctuation_and_white_space_do_not_count(first: str, second: str, kind: str | None) -> None:
    found = overlap([{"prompt": first}], [{"prompt": second}])
    assert (found.exact, found.near) == (int(kind == "exact"), int(kind == "near"))


def test_the_turns_of_the_user_belong_to_the_prompt() -> None:
    earlier = (("user", "Tell me of the sea"), ("assistant", "It is wide."))
    go_on = Row("go on", "", history=earlier)
    assert not overlap([go_on], [Row("go on", "")])
    assert overlap(
        [go_on], [Row("go on", "", history=(("system", "Be brief."), *earlier[:1], ("assistant", "Hm.")))]
    ).exact


def test_messages_name_rows_and_hold_no_text() -> None:
    rows = [{"prompt": "SECRET of the sea", "id": "a"}, {"prompt": "other"}, {"prompt": "secret of, the SEA"}]
    with pytest.raises(CalibrationError) as stop:
        check_overlap(rows, rows[:1], name="harm")
    message = str(stop.value)
    assert "harm: 2 of 3 rows are among the calibration rows (1 exact, 1 near; rows 0 (id 'a'), 2); take" in message
    assert "secret" not in message.lower()
    assert not check_overlap(rows[1:2], rows[:1])


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_file_keeps_what_it_takes(seed: int) -> None:
    """Prompts of ordinary length are kept whole: the hashes in a file find what the rows find."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 26))) for _ in range(20)]
    shorter = [text.split()[: max(8, len(text.split()) - 1)] for text in texts[5:10]]
    asked = [*texts[:5], *map(" ".join, shorter), "new words"]
    first, second = (PromptIndex.of(PromptHashes.of(Row(text, "")) for text in each) for each in (texts, asked))
    kept = PromptIndex.from_facts(json.loads(json.dumps(first.facts())))
    found, expected = ([(pair.row, pair.exact) for pair in compared(each, second).pairs] for each in (kept, first))
    assert found == expected


def test_copies_of_long_prompts_are_found_among_hashes_that_were_kept_in_part() -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=400)) for _ in range(100)]
    index = PromptIndex.of(PromptHashes.of(Row(text, "")) for text in texts)
    facts = index.facts()
    assert len(json.dumps(facts)) < 100 * 190
    edited = PromptIndex.of(PromptHashes.of(Row(text + " and so on", "")) for text in texts[:50])
    others = PromptIndex.of(PromptHashes.of(Row(" ".join(draw.choices(WORDS, k=400)), "")) for _ in range(200))
    kept = PromptIndex.from_facts(facts)
    assert len(compared(kept, edited).pairs) == 50 and not compared(kept, others).pairs


def test_hashes_that_were_kept_in_part_are_compared_as_far_as_both_are_known() -> None:
    draw = random.Random(2)
    words = [["".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(300)] for _ in range(100)]
    facts = PromptIndex.of(PromptHashes.of(Row(" ".join(each), "")) for each in words).facts()
    kept = PromptIndex.from_facts(facts)

    def found(*texts: list[str]) -> int:
        return len(compared(kept, PromptIndex.of(PromptHashes.of(Row(" ".join(text), "")) for text in texts)).pairs)

    assert found(*(each[50:210] for each in words)) == 100  # a shorter prompt that is part of a longer one
    # Of a short prompt one 5-gram is known to be shared, or two: too few for a verdict.
    others = [[*each[50:56], "other", "words", str(n), "follow", "here", "now"] for n, each in enumerate(words)]
    assert found(*others) == 0
    assert found(*(each[:150] + other[:150] for each, other in itertools.pairwise(words))) == 0


def test_ordinary_prompts_are_kept_whole_and_a_large_set_stays_small() -> None:
    draw = random.Random(3)
    for length, whole in ((28, True), (400, False)):
        index = PromptIndex.of(PromptHashes.of(Row(" ".join(draw.choices(WORDS, k=length)), "")) for _ in range(824))
        facts = index.facts()
        assert len(json.dumps(facts)) < 150_000
        kept = PromptIndex.from_facts(facts)
        assert (kept.kept == kept.sizes).all() == whole


class TestMasks:
    def scored(self, tmp_path: Path) -> fastprune.Scores:
        harm = [Row(f"MARKED words of a request number {i} about a thing", "a b c", id=f"h{i}") for i in range(6)]
        benign = [Row(f"MARKED words of a plain question number {i} on things", "c d") for i in range(6)]
        sets = [self.encoded(rows) for rows in (harm, benign)]
        return fastprune.score(build("Llama"), *sets, p_max=0.5, q_max=0.5, progress=False)

    @staticmethod
    def encoded(rows: list[Row]) -> CalibrationSet:
        class Letters:
            all_special_ids, unk_token_id, eos_token_id = (), None, None

            def __call__(self, text: str, **options: object) -> dict:
                return {"input_ids": [5 + ord(letter) % 80 for letter in text]}

            def get_added_vocab(self) -> dict:
                return {}

            def convert_ids_to_tokens(self, ids: list) -> list:
                return []

        return load_calibration(rows, Letters())

    def test_scores_and_masks_know_their_rows_without_a_text(self, tmp_path: Path) -> None:
        scores = self.scored(tmp_path)
        path = scores.save(tmp_path / "scores.safetensors")
        mask = scores.select(0.01, 0.1)
        mask.save(tmp_path / "mask.safetensors")
        for file in (tmp_path / "scores.safetensors", tmp_path / "mask.safetensors"):
            assert b"MARKED" not in file.read_bytes() and b"request" not in file.read_bytes()
        loaded = fastprune.PruneMask.load(tmp_path / "mask.safetensors")
        asked = [{"prompt": "MARKED words of a request number 3 about a thing"}, {"prompt": "another one"}]
        for source in (scores, fastprune.Scores.load(path), mask, loaded, loaded & loaded, loaded | mask):
            found = overlap(source, asked, role="harm")
            assert (found.exact, found.near, found.prompts) == (1, 0, 6)
            assert not overlap(source, asked, role="benign")
        control = fastprune.random_mask(build("Llama"), like=mask)
        assert overlap(control, asked, role="harm").exact == 1
        with pytest.raises(CalibrationError, match="role: expected 'harm' or 'benign'"):
            overlap(mask, asked)

    def test_sets_of_unknown_texts_are_said_to_be_unknown(self) -> None:
        from support.architectures import BENIGN, HARM

        sets = (CalibrationSet(HARM), CalibrationSet(BENIGN))
        mask = fastprune.score(build("Llama"), *sets, progress=False).select(None, 0.01)
        with pytest.raises(CalibrationError, match="first: expected rows whose prompts are known"):
            overlap(mask, [{"prompt": "a"}], role="harm")

    def test_a_mask_of_masks_does_not_know_more_than_each_of_them(self, tmp_path: Path) -> None:
        mask = self.scored(tmp_path).select(0.01, 0.1)
        unknown = fastprune.PruneMask(dict(mask), mask.shapes)
        asked = [{"prompt": "another one"}]
        for combined in (mask | unknown, unknown & mask):
            with pytest.raises(CalibrationError, match="first: expected rows whose prompts are known"):
                overlap(combined, asked, role="harm")


class TestCommands:
    @pytest.mark.parametrize("metadata", [None, {"kind": "algebra", "origins": []}, {"calibration": {"harm": {}}}])
    def test_a_mask_that_knows_no_rows_is_said_to_be_not_compared(self, metadata, tmp_path: Path, capsys) -> None:
        """Regression: masks without facts about their rows were passed over in silence."""
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": "make t1 with k1 ?", "response": "fx6", "prefill": "sure :"}) + "\n")
        name = "model.layers.0.mlp.up_proj.weight"
        mask = fastprune.PruneMask({name: torch.arange(3)}, {name: (256, 128)}, metadata)
        words = ("--format", "chat", "--mask", mask.save(tmp_path / "mask.safetensors"), "--store", tmp_path / "store")
        assert run("answer", checkpoint_path("aligned"), "--rows", rows, *words) == 0
        assert "harm: not compared with the harm calibration rows of mask" in capsys.readouterr().err

    def test_rows_behind_a_mask_are_refused_unless_allowed_by_name(self, tmp_path: Path, capsys) -> None:
        data, model = export_data(tmp_path / "data"), checkpoint_path("aligned")
        few = {name: tmp_path / path.name for name, path in data.items()}
        for name, path in data.items():
            few[name].write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
        sets = ("--harm", few["harm"], "--benign", few["benign"], "--format", "chat", "--quiet")
        scores, mask = tmp_path / "scores.safetensors", tmp_path / "mask.safetensors"
        assert run("score", model, *sets, "--out", scores) == 0
        assert run("select", scores, "-p", 1e-3, "-q", 1e-3, "--out", mask, "--quiet") == 0
        capsys.readouterr()
        mixed = tmp_path / "mixed.jsonl"
        mixed.write_text(few["eval_harm"].read_text() + few["harm"].read_text().splitlines()[2] + "\n")
        store = ("--store", tmp_path / "store", "--attack", "prefilling", "--mask", mask)
        assert run("answer", model, "--rows", few["eval_harm"], *store) == 0
        assert "harm: no row is among the harm calibration rows of mask" in capsys.readouterr().err
        for words in (
            ("answer", model, "--rows", mixed, *store),
            ("eval", model, "--harm", mixed, "--mask", mask),
        ):
            assert run(*words) == 1
            said = capsys.readouterr().err
            assert "harm: 1 of 7 rows is among the harm calibration rows of mask (1 exact, 0 near; row 6 (id" in said
            assert "--allow-overlap harm" in said
            assert run(*words, "--allow-overlap", "skills") == 1
            assert "--allow-overlap: expected one of harm, got 'skills'" in capsys.readouterr().err
            assert run(*words, "--allow-overlap", "harm", "--json") == 0
            said = capsys.readouterr()
            assert "which --allow-overlap allows" in said.err
            if words[0] == "eval":
                [entry] = json.loads(said.out)["settings"]["overlap"]
                assert entry == {"set": "harm", "mask": "mask", "rows": 7, "prompts": 6, "exact": 1, "near": 0}

    def test_harmful_rows_are_not_compared_with_benign_ones(self, tmp_path: Path, capsys) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": "make t1 with k1 ?", "response": "fx6", "prefill": "sure :"}) + "\n")
        prompts = PromptIndex.of([PromptHashes.of(Row("make t1 with k1 ?", ""))]).facts()
        name = "model.layers.0.mlp.up_proj.weight"
        metadata = {"calibration": {"benign": {"prompts": prompts}}}
        mask = fastprune.PruneMask({name: torch.arange(3)}, {name: (256, 128)}, metadata)
        found = mask.save(tmp_path / "mask.safetensors")
        words = (
            "answer",
            checkpoint_path("aligned"),
            "--format",
            "chat",
            "--mask",
            found,
            "--store",
            tmp_path / "store",
        )
        assert run(*words, "--rows", path) == 0
        assert run(*words, "--rows", f"over_refusal={path}") == 1
        assert "over_refusal: 1 of 1 rows is among the benign calibration rows" in capsys.readouterr().err
