"""Rows of a model's own replies: the same in batches and after kills; what is left out; who may read them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from support.generation import Scripted, tiny_model, word_tokenizer
from support.killed_writes import killed_at

from fastprune.calibration import Row, load_calibration, read_rows
from fastprune.calibration.generated_files import forget_texts, is_generated, partial_path, provenance_path
from fastprune.errors import ArgumentError, ArtifactError, CalibrationError, DiskError, FastpruneWarning
from fastprune.evaluation import generate, generate_rows

PROMPTS = [
    {"prompt": " ".join(f"w{(i * 7 + j) % 70}" for j in range(1 + i % 6)), "category": f"c{i % 2}", "note": i}
    for i in range(11)
]


@pytest.fixture(autouse=True)
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def rows_of(model: torch.nn.Module | None = None, rows: object = PROMPTS, **settings: object) -> list[Row]:
    arguments = {"format": "raw", "max_new_tokens": 9, **settings}
    return generate_rows(tiny_model() if model is None else model, word_tokenizer(), rows, **arguments)


@pytest.mark.parametrize("format", ["raw", "chat"])
@pytest.mark.parametrize("prefill", [None, "w3 w4", [f"w{i}" for i in range(11)]])
def test_replies_are_those_of_generate_with_everything_else_as_given(format: str, prefill: object) -> None:
    made = rows_of(format=format, prefill=prefill)
    texts = generate(tiny_model(), word_tokenizer(), PROMPTS, format=format, prefill=prefill, max_new_tokens=9)
    assert [row.response for row in made] == texts
    starts = [""] * 11 if prefill is None else [prefill] * 11 if isinstance(prefill, str) else prefill
    assert [row.prefill for row in made] == starts
    assert [(row.prompt, row.category, row.extra["note"]) for row in made] == [tuple(row.values()) for row in PROMPTS]
    assert [row.id for row in made] == [str(i) for i in range(11)]
    for row in made:
        words = len(row.response.split()) + (row.finish == "stop")  # special tokens are no text
        assert words <= row.extra["new_tokens"] <= 9
        assert row.extra["new_tokens"] == 9 or row.finish == "stop"


def test_samples_are_a_function_of_seed_and_row_alone() -> None:
    drawing = {"temperature": 1.0, "top_p": 0.9, "samples": 3, "seed": 5}
    made = rows_of(**drawing)
    assert [row.id for row in made[:4]] == ["0#0", "0#1", "0#2", "1#0"] and len(made) == 33
    assert all(len({row.response for row in made[i : i + 3]}) > 1 for i in range(0, 33, 3))
    for size in (1, 4):
        assert rows_of(**drawing, batch_size=size) == made
    some = rows_of(rows=[{**PROMPTS[4], "id": "4"}, {**PROMPTS[2], "id": "2"}], **drawing)
    assert some == made[12:15] + made[6:9]
    assert rows_of(**{**drawing, "seed": 6}) != made


def test_what_refuses_says_nothing_or_never_answers_is_left_out_and_counted() -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>", "I'm", "sorry"])
    script = [
        "w1 I'm sorry w2",
        "w2",
        "w3 <think> w4 w5 </think> w6 w7",
        "w4 <think> w5 w5 w5 w5 w5 w5 w5 w5 w5",
        "w5 w6",
    ]
    model = Scripted(tokenizer, script)
    model.embedding = torch.nn.Embedding(len(tokenizer), 1)
    model.forward = wider(model, len(tokenizer))
    rows = [{"prompt": f"w{i}", "id": f"r{i}"} for i in range(1, 6)]
    with pytest.warns(FastpruneWarning, match=r"left out 3 of 5 replies: 1 refusals, 1 empty, 1 thoughts without"):
        made = generate_rows(model, tokenizer, rows, format="raw", max_new_tokens=8)
    assert [(row.id, row.response, row.extra.get("thought")) for row in made] == [
        ("r3", "w6 w7", "w4 w5"),
        ("r5", "w6", None),
    ]
    with pytest.warns(FastpruneWarning, match="left out 2 of 5"):
        kept = generate_rows(model, tokenizer, rows, format="raw", max_new_tokens=8, keep_refusals=True)
    assert [row.id for row in kept] == ["r1", "r3", "r5"]
    with pytest.raises(CalibrationError, match=r"a reply that can be kept, got none: .*prefill=.*keep_refusals"):
        generate_rows(model, tokenizer, rows[:2], format="raw", max_new_tokens=8)


def wider(model: Scripted, size: int):
    """A scripted model's forward over a larger vocabulary."""
    from types import SimpleNamespace

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, size)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for column in range(len(ids)):
                seen = [token for token, real in zip(ids[: column + 1], mask, strict=False) if real]
                logits[row, column, model.next(seen)] = 10.0
        return SimpleNamespace(logits=logits)

    return forward


class TestFiles:
    def test_the_file_is_what_scoring_reads_and_is_for_the_owner(self, tmp_path: Path) -> None:
        out, modes = tmp_path / "rows.jsonl", set()
        model = tiny_model()
        model.register_forward_pre_hook(
            lambda module, arguments: modes.update(stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir())
        )
        made = rows_of(model, out=out, prefill="w1")
        assert modes == {0o600}
        assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "rows.provenance.json"]
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
        assert read_rows(out) == made and is_generated(out)
        examples = load_calibration(out, word_tokenizer())
        assert examples.finishes["unknown"] == 0 and examples.prefilled == 11
        text = provenance_path(out).read_text()
        facts = json.loads(text)
        assert facts["counts"]["kept"] == 11 and facts["sampling"]["temperature"] == 0
        assert not any(f"w{i}" in text for i in range(70))

    def test_an_existing_file_is_not_replaced(self, tmp_path: Path) -> None:
        out = tmp_path / "rows.jsonl"
        out.write_text("mine")
        with pytest.raises(ArgumentError, match="out: expected a new name"):
            rows_of(out=out)
        assert out.read_text() == "mine" and os.listdir(tmp_path) == ["rows.jsonl"]

    @pytest.mark.slow
    def test_a_kill_at_every_write_changes_nothing_in_the_end(self, tmp_path: Path) -> None:
        torch.set_num_threads(1)
        few = PROMPTS[:5]

        def work(folder: Path):
            folder.mkdir(exist_ok=True)
            drawing = {"temperature": 0.8, "samples": 2, "batch_size": 3}
            return lambda: rows_of(rows=few, out=folder / "rows.jsonl", **drawing)

        work(tmp_path / "whole")()
        kills = 0
        for call in range(1, 1000):
            folder = tmp_path / str(call)
            if not killed_at(work(folder), call):
                break
            kills += 1
            out = folder / "rows.jsonl"
            # what has its name is whole
            assert not out.exists() or out.read_bytes() == (tmp_path / "whole" / "rows.jsonl").read_bytes()
            work(folder)()
            for name in ("rows.jsonl", "rows.provenance.json"):
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            assert sorted(os.listdir(folder)) == ["rows.jsonl", "rows.provenance.json"], f"killed in write {call}"
        assert kills >= 11 + 2  # the key and ten replies, and two files

    def test_a_kill_after_a_batch_costs_only_the_rest(self, tmp_path: Path, monkeypatch) -> None:
        out, write, left = tmp_path / "rows.jsonl", os.write, [7]

        def stop(handle: int, data: bytes) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return write(handle, data)

        monkeypatch.setattr(os, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            rows_of(out=out, batch_size=3)
        monkeypatch.undo()
        assert len(partial_path(out).read_text().splitlines()) == 7 and not out.exists()
        rows, model = [], tiny_model()
        model.register_forward_pre_hook(
            lambda module, arguments, keywords: rows.append(len(keywords["input_ids"])), with_kwargs=True
        )
        assert rows_of(model, out=out, batch_size=3) == rows_of()
        assert 0 < len(rows) < 40, "everything was asked again"

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"temperature": 0.5}, "sampling"),
            ({"seed": 1}, "sampling"),
            ({"max_new_tokens": 8}, "max new tokens"),
            ({"format": "chat"}, "encoding"),
            ({"prefill": "w1"}, "rows"),
            ({"rows": PROMPTS[1:]}, "rows"),
            ({"model": tiny_model("gpt2")}, "model"),
        ],
    )
    def test_unfinished_replies_to_something_else_are_refused(self, tmp_path: Path, change: dict, what: str) -> None:
        out = tmp_path / "rows.jsonl"
        partial_path(out).touch()
        rows_of(out=out)  # an empty one is none
        out.unlink()
        model = tiny_model()
        calls = []

        def stop(module: object, arguments: object) -> None:
            calls.append(1)
            if len(calls) > 5:
                raise KeyboardInterrupt

        model.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            rows_of(model, out=out, batch_size=2)
        before = partial_path(out).read_bytes()
        with pytest.raises(ArgumentError, match=rf"out: expected a name without unfinished .*another {what} has"):
            rows_of(**{"out": out, "batch_size": 2, **change})
        assert partial_path(out).read_bytes() == before

    def test_texts_are_dropped_from_what_was_generated_only(self, tmp_path: Path) -> None:
        out = tmp_path / "rows.jsonl"
        rows = [{**row, "prompt": f"{row['prompt']} MARK"} for row in PROMPTS]
        rows_of(rows=rows, out=out)
        assert forget_texts(out) == 11
        assert "MARK" not in out.read_text() and stat.S_IMODE(out.stat().st_mode) == 0o600
        kept = [json.loads(line) for line in out.read_text().splitlines()]
        assert kept[3]["id"] == "3" and kept[3]["category"] == "c1" and kept[3]["new_tokens"] and "note" not in kept[3]
        assert is_generated(out) and json.loads(provenance_path(out).read_text())["texts"] == "dropped"
        with pytest.raises(CalibrationError, match="texts_dropped"):
            load_calibration(out, word_tokenizer())
        out.write_text(out.read_text() + "\n")  # the user's now
        mine = tmp_path / "mine.jsonl"
        mine.write_text(json.dumps({"prompt": "w1", "response": "w2"}))
        for path in (out, mine):
            before = path.read_text()
            with pytest.raises(ArtifactError, match="expected rows as `fastprune generate` wrote them"):
                forget_texts(path)
            assert path.read_text() == before

    def test_a_full_disk_is_said_by_name(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
        with pytest.raises(DiskError, match=r"out .*rows\.jsonl: expected 0\.00 MiB of free space"):
            rows_of(out=tmp_path / "rows.jsonl")
        assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 2}, "samples: expected 1 at temperature 0"),
        ({"samples": 0}, "samples: expected a positive"),
        ({"temperature": -1}, "temperature: expected"),
        ({"top_p": 0.5}, "top_p: expected 1 at temperature 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a positive"),
        ({"batch_size": 0}, "batch_size: expected a positive"),
        ({"seed": "x"}, "seed: expected a whole number"),
        ({"prefill": ["w1"]}, "prefill: expected one string or 11, got 1"),
        ({"format": "xml"}, "format: expected one of"),
        ({"out": ""}, "out: expected a path"),
    ],
)
def test_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rows_of(**arguments)
