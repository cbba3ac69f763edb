"""Types of files and objects in memory: what is read, and what is refused without showing a text of it."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pandas
import pyarrow
import pytest

from fastprune.calibration import Row, load_calibration, read_rows, read_table
from fastprune.errors import ArgumentError, CalibrationError, NotFoundError

MARK = "Zanzibar"  # in every text of a row, and in no message


def spoken(*turns: str) -> list[dict]:
    """Messages of these roles."""
    return [{"role": role, "content": f"{MARK} says"} for role in turns]


FULL = {"prompt": f"{MARK} one", "response": f"{MARK} two"}
REFUSED = {
    # two columns without a header: what stands in the first line is a text
    "headless.csv": (f'{MARK} how do I,"{MARK} sure"\n{MARK} b,c\n', "expected the columns prompt and response"),
    "commas.csv": (f"{MARK} one, two\n{MARK} three\n", "expected 2 fields as in the header"),
    "word.csv": (f"{MARK}\n{MARK} two\n", "expected a known column, or prompts without a header"),
    "twice.csv": (f"prompt,prompt\n{MARK},{MARK} b\n", "expected each column once"),
    "quote.csv": (f'prompt,response\n{MARK} a,"{MARK}\n', "line 2: the row that begins here is not valid CSV"),
    "short.tsv": (f"goal\ttarget\n{MARK} a\n", r"line 2: expected 2 fields as in the header \['goal', 'target'\]"),
    "finish.csv": (f"prompt,response,finish\n{MARK},{MARK},{MARK}\n", "finish: expected one of"),
    "latin.csv": (f"goal,target\n{MARK} \u00e9,b\n".encode("latin-1"), "UTF-8 text, byte 21 .*save the file as"),
    "wide.txt": (f"{MARK} one\n".encode("utf-16"), "expected UTF-8 text, byte 0"),
    "blank.txt": (" \n\n", "expected at least one row, got none"),
    "prompts.txt": (f"{MARK} one\n", "expected the column response, got one prompt a line"),
    "map.json": (json.dumps({f"{MARK} how do I": f"{MARK} sure"}), r"keys \['<column 1>'\]; save the rows alone"),
    "splits.json": (json.dumps({"train": [FULL], "test": [FULL]}), r"keys \['train', 'test'\]"),
    "uneven.json": (json.dumps({"prompt": [MARK], "response": []}), "expected columns of one length"),
    "lines.json": (json.dumps(FULL) + "\n" + json.dumps(FULL), "not valid JSON .*is called .jsonl"),
    "text.json": (json.dumps(f"{MARK} a"), "expected a list of objects, got str"),
    "mixed.json": (json.dumps([FULL, f"{MARK} a"]), "row 1: expected a JSON object, got str"),
    "nested.json": (json.dumps([[FULL]]), "row 0: expected a JSON object, got list"),
    "again.jsonl": (f'{{"prompt": "{MARK} a", "prompt": "{MARK} b"}}', "line 1: expected each column once"),
    "half.jsonl": (json.dumps({**FULL, "response": f"{MARK} \ud800"}), "half a surrogate pair at character 9"),
    "half-goal.jsonl": (json.dumps({"goal": f"{MARK} \ud800", "target": "a"}), "goal: expected valid Unicode"),
    "number.jsonl": (json.dumps({**FULL, "prompt": 3}), "line 1: prompt: expected a string, got int"),
    "none.jsonl": (json.dumps({**FULL, "response": None}), "response: expected a string, got NoneType; leave such"),
    "choice.jsonl": (
        json.dumps({"question": f"{MARK} a", "answer": 3}),
        r"answer: .* got int; .*\{'response': 'COLUMN'\}",
    ),
    "torn.parquet": (b"PAR1" + f"{MARK}".encode() * 9 + b"\x09\0\0\0PAR1", r"cannot be read \(OSError\)"),
    "late.jsonl": (json.dumps(FULL) + f'\n{{"prompt": "{MARK} a"}}', r"line 2: expected the column response, got"),
    "dict.jsonl": (json.dumps({**FULL, "category": {MARK: True}}), r"got dict; leave .* columns=\{'category': None\}"),
    "history.jsonl": (json.dumps({**FULL, "history": spoken("user")}), "history: expected the turns before a prompt"),
    "reply.jsonl": (json.dumps({"prompt": spoken("user", "assistant"), "completion": MARK}), "got a reply last"),
    "two.jsonl": (json.dumps({"prompt": MARK, "completion": spoken("assistant", "user")}), "got 2 turns"),
    "first.jsonl": (json.dumps({"messages": spoken("assistant", "user", "assistant")}), "a user turn as turn 1"),
    "alone.jsonl": (json.dumps({"messages": spoken("system")}), "got a conversation without one"),
    "empty.jsonl": (json.dumps({"messages": []}), "got a conversation without one"),
    "twice.jsonl": (json.dumps({"messages": spoken("user", "user", "assistant")}), "an assistant turn as turn 2"),
    "late-system.jsonl": (json.dumps({"messages": spoken("user", "system", "assistant")}), "as turn 2 .*got a system"),
    "tool.jsonl": (
        json.dumps({"messages": [*spoken("user"), {"role": MARK, "content": MARK}]}),
        "turn 2: expected the",
    ),
    "call.jsonl": (
        json.dumps({"messages": [*spoken("user"), {**spoken("assistant")[0], "tool_calls": [MARK]}]}),
        "got a call of a tool",
    ),
    "picture.jsonl": (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "url": MARK}]}]}),
        "turn 1: content: expected a string, got list",
    ),
    "keys.jsonl": (json.dumps({"messages": [{"speaker": "user", "text": MARK}]}), "expected the keys role and content"),
    "repr.csv": (f"messages\n\"[{{'role': 'user', 'content': '{MARK}'}}]\"\n", "as JSON, got text that is none"),
    "torn.jsonl.gz": (gzip.compress(json.dumps(FULL).encode())[:-9], r"cannot be unpacked \(EOFError\)"),
    "not.csv.gz": (f"prompt,response\n{MARK},{MARK}\n".encode(), r"cannot be unpacked \(BadGzipFile\)"),
    "not.parquet": (f"{MARK}" * 9, r"cannot be read \(ArrowInvalid\)"),
    "rows.xlsx": (f"{MARK}", r"expected a \.csv or \.jsonl file, got the suffix '\.xlsx'; \.tsv"),
}


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_file_and_column_and_without_its_text(tmp_path, name):
    content, message = REFUSED[name]
    path = put(tmp_path / name, content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_rows(path)
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert chain[0].startswith(f"{path}") and MARK not in "".join(chain).replace(str(tmp_path), "")


def test_history_stands_beside_the_turns_of_a_prompt_or_in_them():
    row = {"prompt": spoken("user", "assistant", "user"), "response": MARK, "history": spoken("user", "assistant")}
    with pytest.raises(CalibrationError, match="history: expected none beside the turns of the prompt") as caught:
        read_rows([row])
    assert MARK not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "One,\r\n\r\n  two \nthree", ["One,", "  two ", "three"]),
        ("a.txt", "\ufeff\u00fcber\u2028x\n", ["\u00fcber\u2028x"]),
        ("a.txt.gz", gzip.compress(b"one\ntwo\n", mtime=0), ["one", "two"]),
        # the header of one column is known, or there is none
        ("a.csv", 'How do I rhyme?\n"One, two"\n\n"a ""b""\nc"\n', ["How do I rhyme?", "One, two", 'a "b"\nc']),
        ("a.csv", "\ufeffHow do I\r\nwhy\r\n", ["How do I", "why"]),
        ("a.csv", "Goal\nHow do I\nwhy\n", ["How do I", "why"]),
        ("a.csv", "prompt;category\nHow, do I;x\n", ["How, do I"]),
        ("a.csv", "How do I; or why\nagain\n", None),
        ("a.json", '["one", "two"]', ["one", "two"]),
        ("a.json", '{"prompts": ["one", "two"], "version": 2}', ["one", "two"]),
        ("a.json", '{"rows": [{"text": "one"}], "text": ["a", "note"], "version": 2}', ["one"]),
    ],
)
def test_prompts_alone_come_one_a_line_or_in_a_list(tmp_path, name, content, prompts):
    path = put(tmp_path / name, content)
    found = [row.prompt for row in read_rows(path, references=False)]
    assert found == (prompts or ["How do I; or why", "again"])


def test_an_empty_cell_of_another_column_is_no_value(tmp_path):
    put(tmp_path / "a.csv", "goal,target,skill,topic\na,b,,c\n")
    assert read_rows(tmp_path / "a.csv") == [Row("a", "b", extra={"topic": "c"})]


def test_the_line_of_each_prompt_is_named(tmp_path):
    put(tmp_path / "a.csv", 'How do I\n\n"a b\nc"\nlast one\n')
    table = read_table(tmp_path / "a.csv")
    assert str(table.layout) == f"{tmp_path / 'a.csv'}: 3 rows; one prompt a line (no responses)"
    put(tmp_path / "b.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}')
    with pytest.raises(CalibrationError, match=r"b\.jsonl, line 3: prompt: expected a string"):
        read_table(tmp_path / "b.jsonl")


class TestFolder:
    """A file of prompts for each category, as HEx-PHI comes."""

    def test_its_files_are_categories(self, tmp_path):
        put(tmp_path / "hex" / "category_2.csv", '"Why, then?"\n')
        put(tmp_path / "hex" / "category_1.csv", "How do I\nwhy not\n")
        put(tmp_path / "hex" / "README.md", "# Prompts")
        put(tmp_path / "hex" / ".hidden.csv", "a,b")
        table = read_table(tmp_path / "hex")
        assert [(row.category, row.prompt) for row in table] == [
            ("category_1", "How do I"),
            ("category_1", "why not"),
            ("category_2", "Why, then?"),
        ]
        assert str(table.layout) == f"{tmp_path / 'hex'}: 3 rows of 2 files; one prompt a line, category (no responses)"

    def test_files_of_text_serve_as_well(self, tmp_path):
        put(tmp_path / "a.txt", "one\n")
        put(tmp_path / "b.v2.txt.gz", gzip.compress(b"two\n", mtime=0))
        assert [(row.category, row.prompt) for row in read_table(tmp_path)] == [("a", "one"), ("b.v2", "two")]

    @pytest.mark.parametrize("files", [(), ("a.csv", "b.txt"), ("a.jsonl", "b.jsonl"), ("a.parquet",), ("a.md",)])
    def test_a_folder_of_anything_else_is_no_set(self, tmp_path, files):
        for name in files:
            put(tmp_path / name, json.dumps(FULL))
        with pytest.raises(NotFoundError, match=r"of \.csv files with one prompt a line, found"):
            read_table(tmp_path)

    def test_nor_is_one_with_a_file_of_several_columns(self, tmp_path):
        put(tmp_path / "b.csv", f"goal,target\n{MARK},b\n")
        with pytest.raises(CalibrationError, match=r"b\.csv: expected one prompt a line"):
            read_table(tmp_path)
        put(tmp_path / "a.csv", "one prompt\n")
        with pytest.raises(CalibrationError, match=r"b\.csv: expected one prompt a line, .* \['goal', 'target'\]"):
            read_table(tmp_path)


class TestMemory:
    RECORDS = ({"goal": "a", "target": "b", "id": 1}, {"goal": "c", "target": "d", "id": None})
    EXPECTED = (Row("a", "b", id="1"), Row("c", "d"))

    def test_frames_and_data_sets_are_read_like_files(self):
        datasets = pytest.importorskip("datasets")
        records = list(self.RECORDS)
        dataset = datasets.Dataset.from_list(records)
        for source in (
            records,
            iter(records),
            pandas.DataFrame(records),
            pyarrow.Table.from_pylist(records),
            dataset,
            dataset.to_iterable_dataset(),
        ):
            assert read_rows(source) == list(self.EXPECTED)

    def test_a_frame_of_another_library_is_one_by_what_it_offers(self):
        class Polars:
            columns = ("goal", "target", "id")

            def to_dicts(self) -> list[dict]:
                return list(TestMemory.RECORDS)

        assert read_rows(Polars()) == list(self.EXPECTED)

    def test_messages_survive_the_arrays_of_a_frame(self, tmp_path):
        rows = [{"messages": spoken("system", "user", "assistant")}]
        pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        expected = read_rows(rows)
        assert read_rows(pandas.read_parquet(tmp_path / "a.parquet")) == read_rows(tmp_path / "a.parquet") == expected

    def test_missing_values_of_a_frame_are_none(self):
        frame = pandas.DataFrame(
            {"prompt": ["a", "b"], "response": ["c", None], "id": [1, None], "category": ["x", pandas.NA]}
        )
        assert read_rows(frame, references=False) == [Row("a", "c", id="1", category="x"), Row("b", "")]
        with pytest.raises(CalibrationError, match="rows, row 1: response: expected a string, got "):
            read_rows(frame)

    def test_a_frame_with_a_column_twice_or_without_names_is_refused(self):
        with pytest.raises(CalibrationError, match="rows: expected each column once"):
            read_rows(pandas.DataFrame([["a", "b", "c"]], columns=["prompt", "response", "response"]))
        with pytest.raises(CalibrationError, match=r"got \['<column 1>', '<column 2>'\]"):
            read_rows(pandas.DataFrame([["a", "b"]]))

    def test_of_several_splits_one_is_passed(self):
        datasets = pytest.importorskip("datasets")
        splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(list(self.RECORDS))})
        with pytest.raises(
            CalibrationError, match=r"DatasetDict with the keys \['train'\]; .* such as data\['train'\]"
        ):
            read_rows(splits)
        assert read_rows(splits["train"]) == list(self.EXPECTED)

    def test_rows_may_stand_among_mappings(self):
        assert read_rows([Row("a", "b", id="1"), {"prompt": "c", "response": "d"}]) == list(self.EXPECTED)


def test_parquet_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    put(tmp_path / "a.parquet", b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CalibrationError, match=r"a\.parquet: .* needs pyarrow; pip install 'fastprune\[data\]'"):
        read_rows(tmp_path / "a.parquet")


def test_calibration_says_which_columns_there_are_and_where_responses_come_from(tmp_path, word_tokenizer):
    path = put(tmp_path / "a.csv", f"goal,reply\n{MARK} a,{MARK} b\n")
    expected = (
        rf"^{path}: expected the column response, got \['goal', 'reply'\]; name the column with "
        r"columns=\{'response': 'COLUMN'\}, or let the model write responses with `fastprune generate`$"
    )
    for source in (path, read_table(path)):
        with pytest.raises(CalibrationError, match=expected):
            load_calibration(source, word_tokenizer)
    found = load_calibration(path, word_tokenizer, columns={"response": "reply"})
    assert (
        len(found) == 1
        and found.hash == load_calibration([{"prompt": f"{MARK} a", "response": f"{MARK} b"}], word_tokenizer).hash
    )
    put(path, "goal,target\nw1, \n")
    with pytest.raises(CalibrationError, match=rf"^{path}, row 0: response: expected at least one token"):
        load_calibration(read_table(path), word_tokenizer)
    with pytest.raises(ArgumentError, match="columns: expected a mapping"):
        load_calibration("missing.csv", word_tokenizer, columns="reply")


@pytest.fixture
def word_tokenizer():
    from support.generation import word_tokenizer

    return word_tokenizer()
