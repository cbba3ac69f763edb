"""Rows, encoding and sets: what becomes of a file on its way to token ids, and what is refused by name."""

from __future__ import annotations

import csv
import json
import warnings

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastprune.calibration import CalibrationSet, Encoder, Example, load_calibration, read_rows
from fastprune.calibration.rows import Row
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning, NotFoundError

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<asst>", "<turn>", "\n", *"abcdefgh"]
TEMPLATE = (
    "<bos>{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<asst>' }}{{ m['content'] | trim }}<turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<asst>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter; it adds <bos> and <eos> unless told not to, as real ones do."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<asst>", "<turn>"],
    )


def ids(text: str) -> tuple[int, ...]:
    """``"<bos> a b"`` to ids, by hand; ``/`` stands for the line break."""
    return tuple(WORDS.index("\n" if word == "/" else word) for word in text.split())


def unscored(n: int) -> tuple[int, ...]:
    return (-100,) * n


ROWS = [
    {"prompt": "ab", "response": "cd", "prefill": "e", "category": "x", "id": "r0"},
    {"prompt": 'a,"b"\nü', "response": " d \u2028", "prefill": "", "category": None, "id": None},
]


def test_every_source_gives_the_same_rows(tmp_path):
    datasets = pytest.importorskip("datasets")

    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), "utf-8")
    lines = ["prompt,response,prefill,category,id", "ab,cd,e,x,r0", '"a,""b""\nü"," d \u2028",,,', ""]
    (tmp_path / "c.csv").write_bytes("\n".join(lines).encode())
    (tmp_path / "d.CSV").write_bytes(("\ufeff" + "\n".join(lines)).encode())
    expected = [Row("ab", "cd", "e", "x", "r0"), Row('a,"b"\nü', " d \u2028")]
    for source in ("a.jsonl", "b.jsonl", "c.csv", "d.CSV"):
        assert read_rows(tmp_path / source) == expected, source
        assert read_rows(str(tmp_path / source)) == expected, source
    dataset = datasets.Dataset.from_list(ROWS)
    for rows in (ROWS, iter(ROWS), expected, dataset, dataset.to_iterable_dataset()):
        assert read_rows(rows) == expected


def test_optional_values_may_be_absent_none_or_nan_and_other_columns_are_kept():
    rows = read_rows(
        [
            {"prompt": "a", "response": "b", "skill": "copy", "answer": 3},
            {"prompt": "a", "response": "b", "prefill": float("nan"), "category": float("nan"), "id": 7},
        ]
    )
    assert rows == [Row("a", "b", extra={"skill": "copy", "answer": 3}), Row("a", "b", id="7")]


def test_a_column_with_nearly_a_known_name_is_noted_once(tmp_path):
    """Regression: with `prefil` for `prefill`, another experiment was run without a word."""
    (tmp_path / "a.csv").write_text("prompt,response,prefil,category\na,b,c,\nd,e,f,\n")
    for source, column, meant in (
        (tmp_path / "a.csv", "prefil", "prefill"),
        ([{"prompt": "a", "response": "b", "Prefill": "c"}], "Prefill", "prefill"),
        ([{"prompt": "a", "response": "b", "prefix": "c", "prompt_id": 3}], "prefix", "prefill"),
        ([{"prompt": "a", "response": "b", "categories": "c"}] * 2, "categories", "category"),
    ):
        with pytest.warns(FastpruneWarning) as caught:
            read_rows(source)
        (warning,) = caught
        assert f"column {column!r} is not used; did you mean {meant!r}?" in str(warning.message)


def test_columns_that_resemble_nothing_or_what_is_there_are_silent(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,prefill,prefix,category\na,b,,c,\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_rows(tmp_path / "a.csv") == [Row("a", "b", extra={"prefix": "c"})]
        read_rows([{"prompt": "a", "response": "b", "prompt_id": 1, "skill": "copy", "preference": 2, "profile": 3}])
        read_rows([Row("a", "b", extra={"prefix": "c"})])  # said when it was read


def test_line_breaks_inside_csv_cells_are_verbatim(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'prompt,response\r\n"a\r\nb","c\nd"\r\n')
    assert read_rows(tmp_path / "a.csv") == [Row("a\r\nb", "c\nd")]


def test_a_csv_cell_may_be_long(tmp_path):
    """Regression: above csv's own limit of 131,072 characters it was "line 1: not valid CSV"."""
    long = "a" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,response\nb,{long}\n")
    (tmp_path / "b.csv").write_text('prompt,response\nb,"c\n')
    before = csv.field_size_limit()
    assert read_rows(tmp_path / "a.csv") == [Row("b", long)]
    with pytest.raises(CalibrationError):
        read_rows(tmp_path / "b.csv")
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,answer\na,b\n", r"a\.csv: expected the column response, got \['prompt', 'answer'\]"),
        ("a.csv", "ask,reply\na,b\n", r"expected the columns prompt and response, got \['ask', 'reply'\]"),
        ("a.csv", "", "expected the columns prompt and response, got none"),
        ("a.csv", "prompt,response\n", "expected at least one row, got none"),
        ("a.csv", "prompt,response\na,b\nc\n", r"a\.csv, line 3: expected 2 fields"),
        ("a.csv", "prompt,response\na,b,c\n", r"a\.csv, line 2: expected 2 fields"),
        ("a.csv", "prompt,response,response\na,b,c\n", "expected each column once"),
        ("a.csv", 'prompt,response\na,"b\n', r"a\.csv, line 2: the row that begins here is not valid CSV"),
        ("a.csv", 'prompt,response\n"a\n\nb",c\n\nd,"e"f\n', r"a\.csv, line 6: the row that begins here is not valid"),
        ("a.csv", 'prompt,response\n"a\n\nb",c\n"d\ne"\n', r"a\.csv, line 5: expected 2 fields .*, got 1"),
        ("a.csv", '"prompt,response\na,b\n', r"a\.csv, line 1: the row that begins here is not valid"),
        ("a.jsonl", "", "expected at least one row, got none"),
        ("a.jsonl", "\n \n", "expected at least one row, got none"),
        ("a.jsonl", '{"prompt": "a", "response": "b"}\n\n{"prompt": "a"', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", '["a", "b"]', r"a\.jsonl, line 1: expected a JSON object, got list"),
        ("a.jsonl", '{"prompt": "a"}', r"a\.jsonl, line 1: expected the column response, got \['prompt'\]"),
        ("a.jsonl", '{"prompt": 3, "response": "b"}', "prompt: expected a string, got int"),
        ("a.jsonl", '{"prompt": "a", "response": null}', "response: expected a string, got NoneType"),
        ("a.jsonl", '{"prompt": "a", "response": "b", "prefill": ["c"]}', "prefill: expected a string, got list"),
        ("a.jsonl", '{"prompt": "a", "response": "b", "id": true}', "id: expected a string, got bool"),
        ("a.jsonl", '{"prompt": "a", "response": "\\ud800"}', "half a surrogate pair at character 0"),
        ("a.xml", "a", r"expected a \.csv or \.jsonl file, got the suffix '\.xml'"),
        ("a", "a", "got the suffix ''"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        read_rows(tmp_path / name)


def test_files_that_are_not_text_or_not_there(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_bytes(b"prompt,response\n\xff\xfe,b\n")
        with pytest.raises(CalibrationError, match=rf"{name}: expected UTF-8 text, byte 16 is not"):
            read_rows(tmp_path / name)
    with pytest.raises(NotFoundError, match=r"missing\.csv: expected a file of rows, found none"):
        read_rows(tmp_path / "missing.csv")
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least one row, got none"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "a"}], "rows, row 1: expected the column response"),
        (["ab"], "rows, row 0: expected a mapping, got str"),
        ({"prompt": ["a"], "response": ["b"]}, "expected an iterable of mappings, got one dict with the keys"),
        (3, "got int"),
    ],
)
def test_rows_in_memory_that_are_refused(rows, message):
    with pytest.raises(CalibrationError, match=message):
        read_rows(rows)


def test_a_dataset_says_what_it_lacks_before_it_is_read():
    datasets = pytest.importorskip("datasets")

    with pytest.raises(CalibrationError, match=r"^rows: expected the column response, got \['prompt'\]"):
        read_rows(datasets.Dataset.from_list([{"prompt": "a"}]))
    with pytest.raises(CalibrationError, match="of several splits pass one"):
        read_rows(datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}))


def test_a_data_frame_is_refused_with_the_way_out():
    class DataFrame:
        """What pandas' one shows: iterated, it gives the names of its columns."""

        columns = ("prompt", "response")

        def __iter__(self):
            return iter(self.columns)

        def to_dict(self, orient):
            return [dict.fromkeys(self.columns, orient)]

    with pytest.raises(CalibrationError, match=r"got a DataFrame; pass its \.to_dict\('records'\)"):
        read_rows(DataFrame())
    assert read_rows(DataFrame().to_dict("records")) == [Row("records", "records")]


def test_raw_is_bos_prompt_line_break_prefill_response(tokenizer):
    example = Encoder(tokenizer).example(Row("ab", "cd", "e", "x", "r0"))
    assert example == Example(ids("<bos> a b / e c d"), unscored(5) + ids("c d"), id="r0", category="x")
    example = Encoder(tokenizer, bos=False).example(Row("ab", "cd", "e", "x", "r0"))
    assert example == Example(ids("a b / e c d"), unscored(4) + ids("c d"), id="r0", category="x")
    assert Encoder(tokenizer, bos=False).context("ab", "e") == list(ids("a b / e"))
    assert Encoder(tokenizer, bos=False).context("") == list(ids("/"))


def test_chat_is_the_template_with_the_prefill_opening_the_turn_and_its_end_scored(tokenizer):
    tokenizer.chat_template = TEMPLATE
    example = Encoder(tokenizer, format="chat").example(Row("ab", "cd", "e"))
    context = ids("<bos> <user> a b <turn> / <asst> e")
    assert example == Example(context + ids("c d <turn>"), unscored(len(context)) + ids("c d <turn>"))
    assert Encoder(tokenizer, format="chat").context("ab", "e") == list(context)


def test_chat_without_anything_after_the_content_scores_nothing_extra(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(tokenizer, format="chat").example(Row("ab", "cd")) == Example(
        ids("a b c d"), unscored(2) + ids("c d")
    )


@pytest.mark.parametrize(
    ("after", "closing", "scored"),
    [
        ("<turn>\n<eos>", "<turn>", "<turn>"),
        ("\n<turn>\n", "/ <turn>", "<turn>"),
        ("\n\n<eos>", "/ / <eos>", "<eos>"),
        ("Z<turn>", "<unk> <turn>", "<turn>"),  # an unknown word is called special too, and ends nothing
        ("\na", "/", "/"),  # no special token: the first one, whatever it is
    ],
)
def test_chat_ends_at_the_first_special_token_after_the_content(tokenizer, after, closing, scored):
    """Regression: where a space or a line break came first, it was scored and the end of the turn was left out."""
    ends = f"{{{{ '<turn>' if m['role'] == 'user' else {after!r} }}}}"
    tokenizer.chat_template = TEMPLATE.replace("<turn>\n", ends)
    example = Encoder(tokenizer, format="chat").example(Row("a", "b"))
    context = Encoder(tokenizer, format="chat").context("a")
    between = len(ids(closing)) - 1
    assert example.input_ids == (*context, *ids("b " + closing))
    assert example.labels == (*unscored(len(context)), *ids("b"), *unscored(between), *ids(scored))


def test_added_white_space_does_not_end_a_turn_but_an_added_marker_does(tokenizer):
    """Gemma's tokenizer has added runs of line breaks; some markers are added without being called special."""
    tokenizer.add_tokens(["\n\n", "<|end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n\n<|end|>\n{% endfor %}"
    end = tokenizer.convert_tokens_to_ids(["\n\n", "<|end|>"])
    example = Encoder(tokenizer, format="chat").example(Row("a", "b"))
    assert (example.input_ids[-3:], example.labels[-3:]) == ((*ids("b"), *end), (*ids("b"), -100, end[1]))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "needs a chat template and this .* has none"),
        ("{{ raise_exception('no system turn') }}", "chat template failed .*no system turn"),
        (
            "{% for m in messages %}{{ m['content'] if m['role'] == 'user' }}{% endfor %}",
            "does not show the assistant's",
        ),
    ],
)
def test_chat_without_a_usable_template_is_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(CalibrationError, match=message):
        load_calibration(ROWS[:1], tokenizer, format="chat")


def test_pieces_are_tokenised_apart():
    """A merge across the border of prompt and response would move a scored token into the context."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 2, "\n": 3, "ab": 4, "\na": 5}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("\n", "a")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert tokenizer("b\nab", add_special_tokens=False)["input_ids"] == [2, 3, 4]
    assert Encoder(tokenizer).example(Row("b", "b", "a")) == Example((2, 3, 1, 2), (-100, -100, -100, 2))
    assert Encoder(tokenizer).example(Row("b", "ab")) == Example((2, 3, 4), (-100, -100, 4))
    assert Encoder(tokenizer).example(Row("", "b", "a")).input_ids == (3, 1, 2)


def test_without_any_context_the_first_response_token_is_not_scored(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(tokenizer, format="chat").example(Row("", "cd")) == Example(ids("c d"), (-100, *ids("d")))
    with pytest.raises(CalibrationError, match="which nothing precedes"):
        Encoder(tokenizer, format="chat").example(Row("", "c"))


def test_a_row_without_response_tokens_is_refused_by_name(tokenizer, tmp_path):
    rows = [ROWS[0], {"prompt": "a", "response": "", "id": "empty-one"}]
    with pytest.raises(
        CalibrationError,
        match=r"rows, row 1 \(id 'empty-one'\): response: expected at least one token to score, got empty text",
    ):
        load_calibration(rows, tokenizer)
    (tmp_path / "a.csv").write_text("prompt,response\na,\n")
    with pytest.raises(
        CalibrationError, match=r"a\.csv, row 0: response: expected at least one token to score, got empty text"
    ):
        load_calibration(tmp_path / "a.csv", tokenizer)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(CalibrationError, match="row 0: response: expected at least one token to score, got text"):
        load_calibration([{"prompt": "a", "response": " \n"}], PreTrainedTokenizerFast(tokenizer_object=backend))


def test_arguments_are_checked_before_anything_is_read(tokenizer):
    with pytest.raises(ArgumentError, match=r"format: expected one of \('raw', 'chat'\), got 'alpaca'"):
        load_calibration("missing.csv", tokenizer, format="alpaca")
    with pytest.raises(ArgumentError, match="tokenizer: expected a Hugging Face tokenizer, got str"):
        load_calibration("missing.csv", "some/model")
    for value in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="max_length: expected a positive integer"):
            load_calibration("missing.csv", tokenizer, max_length=value)


LETTERS = [{"prompt": "a" * n, "response": "b", "category": "xy"[n % 2], "id": str(n)} for n in range(1, 7)]


def test_long_rows_are_dropped_whole_and_counted(tokenizer):
    with pytest.warns(FastpruneWarning, match="left out 2 of 6 rows, longer than max_length=6 tokens"):
        kept = load_calibration(LETTERS, tokenizer, max_length=6, bos=False)
    assert kept.counts == {"kept": 4, "too_long": 2}
    assert [len(example) for example in kept] == [3, 4, 5, 6]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_calibration(LETTERS, tokenizer).counts == {"kept": 6, "too_long": 0}
    some = [row | {"prefill": "c" * (index % 2)} for index, row in enumerate(LETTERS)]
    assert load_calibration(some, tokenizer).prefilled == 3
    with pytest.raises(CalibrationError, match="all 6 rows are longer than max_length=2"):
        load_calibration(LETTERS, tokenizer, max_length=2)


def test_a_set_knows_its_format_and_hands_it_on(tokenizer):
    letters = load_calibration(LETTERS, tokenizer)
    sets = [letters, letters[:2], letters.subset(category="x"), letters.loader().calibration]
    assert [group.format for group in sets] == ["raw"] * 4
    tokenizer.chat_template = TEMPLATE
    assert load_calibration(LETTERS, tokenizer, format="chat").format == "chat"
    assert CalibrationSet(letters.examples).format is None
    assert CalibrationSet(letters.examples).hash == letters.hash  # which journals and files are told apart by


def test_the_hash_is_that_of_the_multiset_of_ids_and_labels(tokenizer):
    whole = load_calibration(LETTERS, tokenizer)
    renamed = [{**row, "id": "other", "category": None} for row in LETTERS]
    assert load_calibration(renamed[::-1], tokenizer).hash == whole.hash
    assert load_calibration(LETTERS + LETTERS[:1], tokenizer).hash != whole.hash
    assert whole[1:].hash != whole.hash
    assert (
        CalibrationSet([Example((1, 2, 3), (-100, 2, 3))]).hash
        != CalibrationSet([Example((1, 2, 3), (-100, -100, 3))]).hash
    )
    # the border between two examples counts, not only the concatenation of their numbers
    one, other = Example((1, 1), (-100, 1)), Example((1, 1, 1), (-100, 1, 1))
    assert CalibrationSet([one, one, one]).hash != CalibrationSet([other, other]).hash


def test_a_set_is_a_sequence_of_examples_with_subsets(tokenizer):
    whole = load_calibration(LETTERS, tokenizer)
    assert len(whole) == 6 and list(whole) == list(whole.examples) and whole[0].id == "1"
    assert [example.id for example in whole[1:3]] == ["2", "3"] and isinstance(whole[1:3], CalibrationSet)
    assert [example.id for example in whole.subset(category="x")] == ["2", "4", "6"]
    assert len(whole.subset(category=["x", "y"])) == 6
    with pytest.raises(CalibrationError, match=r"category: expected one of \['x', 'y'\], got \['z'\]"):
        whole.subset(category="z")
    with pytest.raises(CalibrationError, match="examples: expected at least one"):
        whole[6:]


@pytest.mark.parametrize(
    ("input_ids", "labels", "message"),
    [
        ((1, 2), (-100,), "2 input_ids but 1 labels"),
        ((1, 2), (1, 2), "first label of an example must be -100"),
        ((), (), "first label"),
        ((1, 2), (-100, -100), "no scored token"),
    ],
)
def test_examples_that_cannot_be_scored_cannot_be_made(input_ids, labels, message):
    with pytest.raises(CalibrationError, match=message):
        Example(input_ids, labels)


def test_the_loader_yields_hf_batches_as_often_as_it_is_read(tokenizer):
    loader = load_calibration(LETTERS, tokenizer, bos=False).loader(batch_tokens=12)
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == 4 and loader.batch_tokens == 12
    for batch, again in zip(first, second, strict=True):
        assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
        assert batch["input_ids"].numel() <= 12
        batch["labels"].fill_(7)  # a caller that writes into a batch does not change the next reading
        assert (again["labels"] != 7).all()
    with pytest.raises(ArgumentError, match="batch_tokens: expected a positive integer, got 0"):
        loader.calibration.loader(batch_tokens=0)
