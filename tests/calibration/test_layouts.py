"""Layouts and what is said about them: the same rows from every layout, and nothing guessed in silence."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.row_files import LAYOUTS, PROMPTS, TYPES, trl, write

from fastprune.calibration import Row, Table, read_rows, read_table
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning

TEXT = 'Name a "rhyme", please;\nwith\ttwo lines, for \u00fcber \u2028 \N{GRINNING FACE}'
ROWS = [
    Row(TEXT, " Sure,\r\n'so' ", category="rhymes", id="7"),
    Row("Count to three.", "[1, 2]", category="", id="8"),
    Row('{"a": 1}', "{}", category="steps", id="x-9"),
]
CHATS = [
    Row("And now?", "Now this.", id="0", history=(("user", TEXT), ("assistant", "That; \n this."))),
    Row("Hello", "Hi", id="1", history=(("system", "Be brief."),)),
    Row("Hello", "Hi", id="2"),
]


def fields(rows: list[Row]) -> list[tuple]:
    """The rows without other columns, whose empty cells a CSV does not keep; an empty category is none in it."""
    return [(r.prompt, r.response, r.prefill, r.category or None, r.id, r.finish, r.history) for r in rows]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_type_of_file_gives_the_same_rows(tmp_path, layout, kind):
    rows = [*ROWS, *CHATS] if layout in ("messages", "conversations") else ROWS
    path = write(tmp_path, kind, [LAYOUTS[layout](row) for row in rows])
    assert fields(read_rows(path)) == fields(rows)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("layout", PROMPTS)
def test_rows_without_responses_are_read_where_none_is_needed(tmp_path, layout, kind):
    rows = [Row(row.prompt, "", category=row.category, id=row.id) for row in ROWS]
    path = write(tmp_path, kind, [PROMPTS[layout](row) for row in rows])
    assert fields(read_rows(path, references=False)) == fields(rows)
    assert read_table(path).layout.without_response == len(rows)
    with pytest.raises(CalibrationError, match=r"generate") as caught:
        read_rows(path)
    assert "Count" not in str(caught.value) and "Name" not in str(caught.value)


def test_prompt_and_completion_may_be_lists_of_messages(tmp_path):
    path = write(tmp_path, "a.jsonl", [trl(row) for row in CHATS])
    assert read_rows(path) == CHATS
    assert read_table(path).layout.name == "prompt and completion"


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1)
name = st.one_of(st.none(), st.from_regex(r"[A-Za-z][\w-]{0,8}", fullmatch=True))
row = st.builds(Row, prompt=text, response=text, category=name, id=name)
exchange = st.tuples(st.tuples(st.just("user"), text), st.tuples(st.just("assistant"), text))
system = st.one_of(st.just(()), st.tuples(st.tuples(st.just("system"), text)))
history = st.builds(
    lambda first, pairs: (*first, *(t for pair in pairs for t in pair)), system, st.lists(exchange, max_size=2)
)
chat = st.builds(Row, prompt=text, response=text, category=name, id=name, history=history)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("kind", ["a.csv", "semicolon.csv", "a.tsv", "a.jsonl", "columns.json", "a.parquet"])
@quick
@given(rows=st.lists(row, min_size=1, max_size=4), layout=st.sampled_from([*LAYOUTS][:-2]))
def test_any_text_comes_back_from_any_layout(tmp_path, kind, rows, layout):
    path = write(tmp_path, kind, [LAYOUTS[layout](each) for each in rows])
    assert fields(read_rows(path)) == fields(rows)


@pytest.mark.parametrize("kind", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
@quick
@given(rows=st.lists(chat, min_size=1, max_size=3), layout=st.sampled_from(["messages", "conversations"]))
def test_any_conversation_comes_back(tmp_path, kind, rows, layout):
    assert read_rows(write(tmp_path, kind, [LAYOUTS[layout](each) for each in rows])) == rows


@pytest.mark.parametrize("kind", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
@quick
@given(row=chat, prefill=st.text("ab \n,;"), finish=st.sampled_from(["stop", "length", None]))
def test_a_row_written_in_our_own_layout_is_that_row(tmp_path, kind, row, prefill, finish):
    whole = Row(row.prompt, row.response, prefill, row.category, row.id, {"skill": "copy"}, finish, row.history)
    assert read_rows(write(tmp_path, kind, [whole.to_record()])) == [whole]


def test_what_stands_around_a_prompt_is_joined_where_it_is_not_empty():
    rows = [{"instruction": "Sort.", "input": text, "output": "b"} for text in ("c a", "", " ", None, float("nan"))]
    assert [row.prompt for row in read_rows([*rows, {"instruction": "Sort.", "output": "b"}])] == [
        "Sort.\n\nc a",
        *["Sort."] * 5,
    ]
    behaviors = [{"Behavior": "Ask.", "ContextString": text, "BehaviorID": "b"} for text in ("A text.", None)]
    assert [row.prompt for row in read_rows(behaviors, references=False)] == ["A text.\n\n---\n\nAsk.", "Ask."]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ("prompt response", "rows: 1 row; prompt, response"),
        ("prompt response id other", "rows: 1 row; prompt, response, id"),
        ("goal", 'rows: 1 row; prompt from "goal" (AdvBench; no responses)'),
        (
            "Goal Target",
            'rows: 1 row; prompt from "Goal", response from "Target" (AdvBench; the target is an affirmative start: '
            "with the columns prompt=goal,prefill=target it is context)",
        ),
        (
            "instruction input output text",
            'rows: 1 row; prompt from "instruction" and "input", response from "output" (Alpaca; not used: "text")',
        ),
        # the own layout wins, a layout with responses wins over one without, and both are said
        ("prompt response completion", 'rows: 1 row; prompt, response (not used: "completion")'),
        (
            "prompt question answer",
            'rows: 1 row; prompt from "question", response from "answer" (question and answer; not used: "prompt")',
        ),
        ("text goal", 'rows: 1 row; prompt from "goal" (AdvBench; not used: "text"; no responses)'),
    ],
)
def test_what_was_recognized_is_one_line(columns, line):
    assert str(read_table([dict.fromkeys(columns.split(), "a")]).layout) == line


def test_a_conversation_without_a_reply_is_a_prompt_and_counted():
    asked = [{"role": "user", "content": "a"}]
    table = read_table([{"messages": asked}, {"messages": [*asked, {"role": "assistant", "content": "b"}]}])
    assert [row.response for row in table] == ["", "b"]
    assert str(table.layout) == (
        'rows: 2 rows; prompt, response and history from "messages" (conversations; 1 without a response)'
    )
    with pytest.raises(CalibrationError, match="rows, row 0: messages: expected a conversation that ends in a reply"):
        read_rows([{"messages": asked}])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("goal target instruction output", r"those of AdvBench \(goal, target\) and of Alpaca .*'response': 'target'"),
        ("goal target messages", r"AdvBench \(goal, target\) and of conversations \(messages\)"),
        ("goal question", r"AdvBench \(goal\) and of question and answer \(question\).* columns=\{'prompt': 'goal'\}$"),
        ("instruction output response", r"Alpaca \(instruction, output\) and of Dolly \(instruction, response\)"),
        ("messages conversations", r"say which are meant with columns=\{'messages': 'messages'\}"),
        ("Goal goaL target", r"one column goal, got \['Goal', 'goaL'\], which differ in case alone"),
        ("ask reply", r"expected the columns prompt and response, got \['ask', 'reply'\]; name the columns with"),
        ("response", r"expected the column prompt, got \['response'\]"),
    ],
)
def test_columns_of_two_layouts_or_of_none_are_an_error_with_the_way_out(columns, message):
    with pytest.raises(CalibrationError, match=message):
        read_table([dict.fromkeys(columns.split(), "a")])


class TestMapping:
    ROWS = ({"goal": "a", "target": "b", "topic": "t", "category": "c"},)

    def test_it_is_the_whole_layout_where_it_has_the_prompt(self):
        assert read_rows(self.ROWS, columns={"prompt": "goal", "prefill": "target"}, references=False) == [
            Row("a", "", "b", "c", extra={"topic": "t"})
        ]
        assert read_rows(self.ROWS, columns={"prompt": "GOAL", "response": "Target"})[0].response == "b"
        with pytest.raises(CalibrationError, match=r"expected the column response, got \['goal', 'target', 'topic',"):
            read_rows(self.ROWS, columns={"prompt": "goal", "prefill": "target"})

    def test_it_changes_what_is_recognized_where_it_has_not(self):
        (row,) = read_rows(self.ROWS, columns={"category": "topic"})
        assert row == Row("a", "b", category="t", extra={"category": "c"})
        (row,) = read_rows(self.ROWS, columns={"category": None})
        assert row == Row("a", "b", extra={"topic": "t", "category": "c"})
        (row,) = read_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}], columns={"response": "chosen"})
        assert row == Row("a", "b", extra={"rejected": "c"})
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert read_rows([{"chat": chat, "goal": "x"}], columns={"messages": "chat"}) == [
            Row("a", "b", extra={"goal": "x"})
        ]

    def test_the_note_on_targets_is_for_those_who_score_them(self):
        assert "affirmative" in str(read_table(self.ROWS, columns={"category": "topic"}).layout)
        for columns in ({"prompt": "goal", "response": "target"}, {"response": "topic"}):
            assert "affirmative" not in str(read_table(self.ROWS, columns=columns).layout)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            (
                {"prompt": "gaol"},
                r"columns: rows, row 0: expected one of the columns \['goal', 'target', .* got 'gaol'",
            ),
            ({"answer": "goal"}, r"columns: expected one of \['prompt', .*'messages'\] to be mapped, got 'answer'"),
            ({"prompt": 3}, "columns: expected the name of a column for prompt"),
            ({"prompt": None}, "columns: expected a column for the prompt, got None"),
            ({"prompt": "goal", "id": "goal"}, "columns: expected a column for each field, got one for two"),
            ({"prompt": "goal", "messages": "topic"}, "columns: expected messages, which hold prompt, .* got both"),
            ("prompt=goal", "columns: expected a mapping such as"),
        ],
    )
    def test_what_is_no_mapping_is_refused(self, columns, message):
        with pytest.raises(ArgumentError, match=message):
            read_rows(self.ROWS, columns=columns)


def test_a_table_is_taken_where_rows_are_and_keeps_its_name(tmp_path):
    path = write(tmp_path, "a.csv", [{"goal": "a", "target": ""}, {"goal": "b", "target": "c"}])
    table = read_table(path)
    assert isinstance(table, Table) and len(table) == 2 and table[1] == Row("b", "c") and list(table[1:]) == [table[1]]
    assert table.name == str(path) and read_table(table) is table and read_table(table[1:]).name == str(path)
    assert read_rows(table, references=False) == list(table)
    with pytest.raises(CalibrationError, match=r"a\.csv, row 0: response: expected text, got none"):
        read_rows(table)
    with pytest.raises(CalibrationError, match=r"a\.csv: expected the column response, got \['goal', 'target'\]"):
        read_rows(read_table(path, columns={"prompt": "goal"}))
    assert repr(table) == f"Table({table.layout})"


def test_names_of_another_case_are_only_taken_where_the_layout_is_not_our_own():
    """Regression: a table of our own is read as before; a column in capitals is pointed out, as a misspelt one is."""
    with pytest.warns(FastpruneWarning, match="column 'Prefill' is not used; did you mean 'prefill'"):
        assert read_rows([{"prompt": "a", "response": "b", "Prefill": "c"}])[0].prefill == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rows([{"Prompt": "a", "Response": "b", "Prefill": "c"}])[0].prefill == "c"
    with pytest.warns(FastpruneWarning, match="column 'prefil' is not used"):
        read_rows([{"goal": "a", "target": "b", "prefil": "c"}])


def test_a_column_serves_one_field():
    rows = [{"goal": "a", "category": "b", "target": "c"}]
    assert read_rows(rows, columns={"prompt": "goal", "response": "category"}) == [Row("a", "b", extra={"target": "c"})]


def test_the_history_of_another_layout_is_something_else_and_said_to_be_unused():
    """LLaMA-Factory's column of that name holds pairs of question and answer."""
    table = read_table([{"instruction": "a", "output": "b", "history": [["c", "d"]]}])
    assert list(table) == [Row("a", "b", extra={"history": [["c", "d"]]})]
    assert str(table.layout).endswith('(Alpaca; not used: "history")')


def test_a_space_in_a_header_is_part_of_the_name(tmp_path):
    """As the values would begin with the space, too."""
    (tmp_path / "a.csv").write_text("prompt, response\na, b\n")
    with pytest.raises(CalibrationError, match=r"expected the column response, got \['prompt', '<column 2>'\]"):
        read_rows(tmp_path / "a.csv")


def test_a_record_has_prompt_and_response_even_where_they_are_empty():
    assert Row("", "", history=()).to_record() == {"prompt": "", "response": ""}
    assert Row("a", "b", "c", "x", "7", {"id": "other", "skill": "copy"}, "stop").to_record() == {
        **{"prompt": "a", "response": "b", "prefill": "c", "category": "x", "id": "7"},
        **{"skill": "copy", "finish": "stop"},
    }
