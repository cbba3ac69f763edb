"""Answers in a store: what is asked and once, keys, kills at every write, strangers' folders, and who may read them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from support.evaluation_rows import HARM, SKILLS, Obey
from support.generation import Scripted, tiny_model, word_tokenizer
from support.killed_writes import killed_at

import fastprune
from fastprune.errors import ArgumentError, ArtifactError, CalibrationError, DiskError, MaskError, NotFoundError
from fastprune.evaluation import Answers, EvaluationSuite, Prefilling
from fastprune.evaluation.store import forget_texts

NAME = "model.layers.0.mlp.up_proj.weight"
ROWS = {"harm_rows": HARM, "skill_rows": SKILLS}
SETTINGS = {"max_new_tokens": {"harm": 7, "refusal": 5, "skill": 4}, "batch_size": 3}


def suite(**settings: object) -> EvaluationSuite:
    return EvaluationSuite(word_tokenizer(), **{**ROWS, **SETTINGS, **settings})


def mask(*indices: int) -> fastprune.PruneMask:
    return fastprune.PruneMask({NAME: torch.tensor(indices)}, {NAME: tuple(tiny_model().get_parameter(NAME).shape)})


MASKS = {"first": mask(*range(0, 900, 2)), "second": mask(*range(300, 1200))}


def lines(store: Path, name: str = "answers.jsonl") -> list[str]:
    return sorted((store / name).read_text().splitlines())


@pytest.fixture(autouse=True)
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


class TestWhatIsAsked:
    def test_every_row_under_every_mask_and_attack_once(self, tmp_path: Path) -> None:
        model = tiny_model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        answers = suite().answer(model, masks=MASKS, store=tmp_path / "store")
        found = [(a.mask, a.task, a.attack["name"], a.row) for a in answers]
        skills = [("skill", f"one/{i}") for i in range(3)] + [("skill", "two/0")]
        assert len(found) == len(set(found)) == 3 * (2 * 4 + 4 + 4)
        for name in ("none", "first", "second"):
            part = [each for each in answers if each.mask == name]
            assert [a.task for a in part].count("harm") == 8 and [a.task for a in part].count("refusal") == 4
            assert [a.task for a in part].count("skill") == len(skills)
        texts = {name: [a.text for a in answers if a.mask == name] for name in ("none", *MASKS)}
        assert texts["none"] != texts["first"] != texts["second"]
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        # by the same functions, one mask at a time, into memory
        for name in ("none", "first"):
            alone = suite().answer(model, masks={} if name == "none" else {name: MASKS[name]}, store=tmp_path / name)
            assert [a for a in alone if a.mask == name] == [a for a in answers if a.mask == name]
        assert Answers.load(tmp_path / "store")[:] and len(Answers.load(tmp_path / "store")) == len(answers)
        assert {a.key: a for a in Answers.load(tmp_path / "store")} == {a.key: a for a in answers}

    def test_an_answer_has_what_a_judge_reads(self, tmp_path: Path) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, ["w1 sure : w11 w12 w9", "w2 sure : w5 w5 w5 w5 w5 w5 w5 w5 w5", "w4 no"])
        answers = suite().answer(model, store=tmp_path / "store")
        by = {(a.task, a.attack["name"], answers.row_of(a).prompt): a for a in answers}
        first = by["harm", "prefilling", "w1"]
        assert (first.prefill, first.text, first.finish, first.new_tokens) == ("sure :", "w11 w12 w9", "stop", 4)
        row = answers.row_of(first)
        assert (row.prompt, row.prefill, row.response, row.category) == ("w1", "sure :", "w11 w12", "a")
        cut = by["harm", "prefilling", "w2"]
        assert (cut.text.split(), cut.finish, cut.new_tokens) == (["w5"] * 7, "length", 7)
        assert by["refusal", "none", "w4"].prefill == "" and by["refusal", "none", "w4"].text == "no"
        assert by["harm", "none", "w1"].text == "sure : w11 w12 w9"
        counts = {(c["task"], c["attack"]["name"]): c for c in answers.counts()}
        assert (counts["harm", "prefilling"]["answers"], counts["harm", "prefilling"]["cut"]) == (4, 1)

    def test_what_the_store_has_is_not_asked_again(self, tmp_path: Path) -> None:
        tokenizer, store = word_tokenizer(), tmp_path / "store"
        model = Scripted(tokenizer, [])
        suite().answer(model, attacks=["prefilling"], store=store)
        calls, model.calls = model.calls, 0
        again = suite().answer(model, attacks=["prefilling"], store=store)
        assert model.calls == 0 and calls > 0 and len(again) == 4 + 4 + 4
        more = suite().answer(model, attacks=["none", "prefilling", Obey()], store=store)
        assert len(more) == 3 * 4 + 4 + 4 and {a.key for a in again} < {a.key for a in more}
        obeyed = [a.text for a in more if a.attack["name"] == "obey"]
        assert obeyed == ["yes yes yes yes yes yes yes"] * 4 and not model.bias.any()
        assert len(lines(store)) == len(more) and len(lines(store, "rows.jsonl")) == 4 + 4 + 4

    def test_depths_are_attacks_of_their_own(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"w{i}", "prefill": "sure :", "response": "w2 w3 w4 w5 w6", "id": f"r{i}"} for i in range(3)]
        rows.append({"prompt": "w9", "response": "w2 w3", "id": "short"})
        attacks = [Prefilling(depth=depth) for depth in ("row", 1, 3, 6)]
        with pytest.warns(fastprune.errors.FastpruneWarning, match="left out 1 of 4 rows"):
            answers = suite(harm_rows=rows, skill_rows=None, attack="none").answer(
                tiny_model(), attacks=attacks, store=tmp_path / "store"
            )
        given = {(a.attack["depth"], a.row): a.prefill for a in answers if a.task == "harm"}
        assert [given[depth, "r0"] for depth in ("row", 1, 3, 6)] == [
            "sure :",
            "sure",
            "sure : w2",
            "sure : w2 w3 w4 w5",
        ]
        assert [depth for depth, row in given if row == "short"] == [1]

    def test_samples_are_drawn_by_the_key(self, tmp_path: Path) -> None:
        model, drawing = tiny_model(), {"temperature": 1.0, "top_p": 0.95, "seed": 3, "samples": 4}
        answers = suite().answer(model, store=tmp_path / "a", attacks=["none"], **drawing)
        texts: dict[tuple, set] = {}
        for answer in answers:
            texts.setdefault((answer.task, answer.row), set()).add(answer.text)
        assert max(map(len, texts.values())) == 4 and len(answers) == 4 * 12
        again = suite(batch_size=64).answer(model, store=tmp_path / "b", attacks=["none"], **drawing)
        assert lines(tmp_path / "a") == lines(tmp_path / "b") and list(again) == list(answers)
        other = suite().answer(model, store=tmp_path / "a", attacks=["none"], **{**drawing, "seed": 4})
        assert {a.key for a in other}.isdisjoint(a.key for a in answers)
        assert [a.text for a in other] != [a.text for a in answers]

    @pytest.mark.parametrize("batch_size", [1, 5, 64])
    def test_neither_batches_nor_the_order_of_rows_change_keys_and_texts(self, tmp_path: Path, batch_size: int) -> None:
        suite().answer(tiny_model(), masks=MASKS, store=tmp_path / "a")
        rows = {"harm_rows": HARM[::-1], "skill_rows": dict(reversed(SKILLS.items()))}
        suite(**rows, batch_size=batch_size).answer(tiny_model(), masks=MASKS, store=tmp_path / "b")
        assert lines(tmp_path / "a") == lines(tmp_path / "b")

    def test_a_mask_that_is_on_the_model_anyway_is_another_model(self, tmp_path: Path) -> None:
        """Regression in the making: the samples of a fingerprint need not hold a weight of the mask."""
        model, one = tiny_model(), mask(1)
        suite().answer(model, attacks=["none"], store=tmp_path / "store")
        with (
            one.applied(model),
            pytest.raises(ArgumentError, match=r"store: expected a store of the same model.*digest"),
        ):
            suite().answer(model, attacks=["none"], store=tmp_path / "store")

    def test_a_row_that_is_there_twice_is_asked_once_and_one_id_names_one_row(self, tmp_path: Path) -> None:
        answers = suite(harm_rows=[*HARM, HARM[0]], skill_rows=None).answer(
            tiny_model(), attacks=["none"], store=tmp_path / "store"
        )
        assert len(answers) == 8
        rows = [{**HARM[0], "id": "x"}, {**HARM[1], "id": "x"}]
        with pytest.raises(ArgumentError, match=r"rows: harm, row 1 \(id 'x'\): expected an id of its own"):
            suite(harm_rows=rows, skill_rows=None).answer(tiny_model(), attacks=["none"], store=tmp_path / "other")
        with pytest.raises(ArgumentError, match="store: expected one row with the id 'x' among those of harm"):
            for row in rows:
                suite(harm_rows=[row], skill_rows=None).answer(tiny_model(), attacks=["none"], store=tmp_path / "third")


class TestKills:
    @pytest.mark.slow
    def test_a_kill_at_every_write_changes_nothing_in_the_end(self, tmp_path: Path) -> None:
        torch.set_num_threads(1)
        drawing = {"temperature": 0.9, "samples": 2}

        def work(store: Path):
            few = suite(harm_rows=HARM[:2], skill_rows=None, batch_size=2)
            return lambda: few.answer(tiny_model(), masks={"first": MASKS["first"]}, store=store, **drawing)

        work(tmp_path / "whole")()
        kills = 0
        for call in range(1, 1000):
            store = tmp_path / str(call)
            if not killed_at(work(store), call):
                break
            kills += 1
            if call % 6 == 0:  # and once more
                assert killed_at(work(store), 3) or lines(store) == lines(tmp_path / "whole")
            work(store)()
            for name in ("answers.jsonl", "rows.jsonl"):
                assert lines(store, name) == lines(tmp_path / "whole", name), f"killed in write {call}"
            assert (store / "store.json").read_bytes() == (tmp_path / "whole" / "store.json").read_bytes()
            assert sorted(os.listdir(store)) == sorted(os.listdir(tmp_path / "whole"))
        assert kills >= 24 + 4 + 2  # answers, rows, head and .gitignore

    def test_an_interrupted_run_goes_on_with_the_batches_that_it_would_have_had(self, tmp_path: Path) -> None:
        whole = suite().answer(tiny_model(), masks=MASKS, store=tmp_path / "store")
        path = tmp_path / "store" / "answers.jsonl"
        content = path.read_bytes().splitlines(keepends=True)
        for kept in (0, 1, 7, 20, len(content) - 1):
            path.write_bytes(b"".join(content[:kept]) + content[kept][:9])  # the next line is torn
            assert list(suite().answer(tiny_model(), masks=MASKS, store=tmp_path / "store")) == list(whole)
            assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(content)


class TestWhoReadsThem:
    def test_files_are_for_the_owner_and_stay_out_of_git(self, tmp_path: Path) -> None:
        store, modes = tmp_path / "store", set()

        def look(module: object, arguments: object) -> None:
            modes.update(stat.S_IMODE(path.stat().st_mode) for path in store.rglob("*"))

        model = tiny_model()
        model.register_forward_pre_hook(look)
        suite().answer(model, store=store)
        assert modes == {0o600}
        assert stat.S_IMODE(store.stat().st_mode) == 0o700
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        status = subprocess.run(
            ["git", "-C", tmp_path, "status", "--short"], check=True, capture_output=True, text=True
        )
        assert status.stdout == ""

    def test_texts_of_judged_answers_are_dropped_and_nothing_is_asked_again(self, tmp_path: Path) -> None:
        store, model = tmp_path / "store", tiny_model()
        rows = [{"prompt": f"w{i} MARK", "prefill": "w1", "response": "w2", "category": "c"} for i in range(3)]
        asked = suite(harm_rows=rows, skill_rows=None, refusal_tokens=None, max_new_tokens=4)
        answers = asked.answer(model, store=store)
        assert forget_texts(store) == (0, 6) and "MARK" in (store / "rows.jsonl").read_text()
        judged = [a for a in answers if a.row != answers[0].row] + [answers[0]]
        with (store / "judgements.jsonl").open("w") as file:
            file.writelines(json.dumps({"answer_key": a.key, "judge": "j", "score": 1.0}) + "\n" for a in judged)
        assert forget_texts(store) == (5, 1)
        kept = Answers.load(store)
        assert [a.text is None for a in kept].count(False) == 1
        assert [row.prompt for row in kept.rows.values()].count(None) == 2
        assert {a.key: a.new_tokens for a in kept} == {a.key: a.new_tokens for a in answers}
        for name in ("answers.jsonl", "rows.jsonl"):
            assert stat.S_IMODE((store / name).stat().st_mode) == 0o600
        model.register_forward_pre_hook(lambda module, arguments: pytest.fail("asked again"))
        assert len(asked.answer(model, store=store)) == 6

    def test_texts_are_in_no_repr_and_no_message(self, tmp_path: Path) -> None:
        rows = [{"prompt": "w1 SECRET", "prefill": "sure", "response": "w2 w3 SECRET", "id": "a"}]
        answers = suite(harm_rows=rows, skill_rows=None).answer(tiny_model(), store=tmp_path / "store")
        assert "SECRET" not in repr((answers, *answers, *answers.rows.values(), answers.counts()))
        assert "SECRET" not in (tmp_path / "store" / "store.json").read_text()
        assert answers[0].text and answers[0].text not in repr(answers[0])


class TestBadStores:
    def test_a_store_of_something_else_is_refused_by_name(self, tmp_path: Path) -> None:
        store = tmp_path / "store"
        suite().answer(tiny_model(), masks={"first": MASKS["first"]}, attacks=["none"], store=store)
        before = {path.name: path.read_bytes() for path in store.iterdir()}
        cases = [
            (suite(), tiny_model("gpt2"), {}, "same model.*architecture|same model.*digest"),
            (
                suite(format="chat"),
                tiny_model(),
                {},
                r'same encoding, got .*\(format: "raw" in the store, "chat" now',
            ),
            (suite(bos=False), tiny_model(), {}, "same encoding.*rule"),
            (suite(), tiny_model(), {"first": MASKS["second"]}, "masks: expected the mask that .* calls 'first'"),
            (suite(), tiny_model(), {"other": MASKS["first"]}, "'other', which has the weights of 'first'"),
            (suite(), tiny_model(), {"none": MASKS["first"]}, "'none' is the name of the unpruned model"),
        ]
        tokenizer = word_tokenizer()
        tokenizer.add_tokens(["w80"])
        cases.append((EvaluationSuite(tokenizer, **ROWS, **SETTINGS), tiny_model(), {}, "same tokenizer"))
        for each, model, masks, message in cases:
            with pytest.raises(ArgumentError, match=message):
                each.answer(model, masks=masks, attacks=["none"], store=store)
        assert {path.name: path.read_bytes() for path in store.iterdir()} == before

    def test_a_mask_that_does_not_fit_is_refused_before_anything_is_asked(self, tmp_path: Path) -> None:
        wrong = fastprune.PruneMask({NAME: torch.tensor([1])}, {NAME: (2, 3)})
        model = tiny_model()
        model.register_forward_pre_hook(lambda module, arguments: pytest.fail("asked"))
        with pytest.raises(MaskError):
            suite().answer(model, masks={"first": MASKS["first"], "wrong": wrong}, store=tmp_path / "store")
        assert not (tmp_path / "store").exists()

    def test_what_is_no_store_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="store: expected the folder of a store, found none"):
            Answers.load(tmp_path / "nowhere")
        (tmp_path / "folder").mkdir()
        with pytest.raises(ArtifactError, match=r"expected a store of answers, got a folder without store\.json"):
            Answers.load(tmp_path / "folder")
        (tmp_path / "folder" / "notes.txt").touch()
        with pytest.raises(ArgumentError, match=r"store: .*holds notes\.txt and no store\.json"):
            suite().answer(tiny_model(), store=tmp_path / "folder")
        assert os.listdir(tmp_path / "folder") == ["notes.txt"]
        (tmp_path / "file").touch()
        for place in ("file", "no/such/parent"):
            with pytest.raises(DiskError, match="store: expected a folder that can be written to"):
                suite().answer(tiny_model(), store=tmp_path / place)
        suite().answer(tiny_model(), attacks=["none"], store=tmp_path / "store")
        (tmp_path / "store" / "answers.jsonl").write_text("")
        with pytest.raises(ArtifactError, match="expected a store with answers, got one without any"):
            Answers.load(tmp_path / "store")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("store.json", "{", r"store\.json: expected the head of a store"),
            ("store.json", "[]", r"store\.json: expected the head of a store"),
            ("store.json", '{"version": 2}', "expected a store of version 1, got 2"),
            ("answers.jsonl", "{}\n{}\n", r"answers\.jsonl, line 1: expected the fields"),
            ("answers.jsonl", "nothing\n", r"answers\.jsonl, line 1: expected a JSON object"),
            ("rows.jsonl", '{"id": "a"}\n', r"rows\.jsonl, line 1: expected the fields"),
        ],
    )
    def test_a_damaged_store_is_said_and_kept(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        store = tmp_path / "store"
        suite().answer(tiny_model(), attacks=["none"], store=store)
        (store / name).write_text(content)
        for use in (Answers.load, lambda folder: suite().answer(tiny_model(), attacks=["none"], store=folder)):
            with pytest.raises(ArtifactError, match=message):
                use(store)
        assert (store / name).read_text() == content

    def test_a_store_in_use_is_refused_and_can_be_read(self, tmp_path: Path) -> None:
        store, model, refused = tmp_path / "store", tiny_model(), []

        def meanwhile(module: object, arguments: object) -> None:
            if not refused:
                with pytest.raises(ArgumentError, match="another process is writing to now") as stop:
                    suite().answer(tiny_model(), store=store)
                refused.append(stop.value)
                with pytest.raises(ArgumentError, match="another process is writing"):
                    forget_texts(store)

        model.register_forward_pre_hook(meanwhile)
        answers = suite().answer(model, store=store)
        assert refused and len(Answers.load(store)) == len(answers)

    def test_a_disk_without_room_is_said_before_anything_is_asked(self, tmp_path: Path, monkeypatch) -> None:
        model = tiny_model()
        model.register_forward_pre_hook(lambda module, arguments: pytest.fail("asked"))
        free = type("Usage", (), {"free": 10_000})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
        with pytest.raises(DiskError, match=r"store .*: expected 0\.0\d MiB of free space"):
            suite().answer(model, store=tmp_path / "store")

    def test_a_disk_that_fills_up_keeps_what_was_answered(self, tmp_path: Path, monkeypatch) -> None:
        store, write, left = tmp_path / "store", os.write, [20]

        def full(handle: int, data: bytes) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return write(handle, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskError, match=r"answers\.jsonl: its disk is full"):
            suite().answer(tiny_model(), store=store)
        monkeypatch.undo()
        kept = Answers.load(store)
        whole = suite().answer(tiny_model(), store=store)
        assert 0 < len(kept) < len(whole) and {a.key for a in kept} < {a.key for a in whole}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"seed": 0.5}, "seed: expected a whole number"),
            ({"samples": 2}, "samples: expected 1 at temperature 0"),
            ({"samples": 0, "temperature": 1.0}, "samples: expected a positive integer"),
            ({"temperature": -1.0}, "temperature"),
            ({"attacks": []}, "attack: expected at least one"),
            ({"attacks": ["fear"]}, "attack: expected one of"),
            ({"store": ""}, "store: expected a path"),
        ],
    )
    def test_arguments_are_named(self, tmp_path: Path, arguments: dict, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            suite().answer(tiny_model(), **{"store": tmp_path / "store", **arguments})
        assert not (tmp_path / "store").exists()

    def test_prompts_alone_can_be_asked_directly_and_not_begun(self, tmp_path: Path) -> None:
        prompts = [{"prompt": "w1"}, {"prompt": "w2"}]
        alone = suite(harm_rows=prompts, skill_rows=None, attack="none")
        assert len(alone.answer(tiny_model(), attacks=["none"], store=tmp_path / "store")) == 4
        with pytest.raises(CalibrationError, match=r"row 0.*: prefilling: expected a 'prefill' or a .*attack="):
            alone.answer(tiny_model(), store=tmp_path / "store")
