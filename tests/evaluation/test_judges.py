"""What attacks make of rows, and what judges make of answers."""

from __future__ import annotations

import re

import pytest
from support.generation import word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastprune.calibration import Row
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation import ATTACKS, JUDGES, NoAttack, Prefilling, attack, exact_match, keyword_refusal


class TestAttacks:
    def test_none_makes_the_prefill_part_of_the_reference(self) -> None:
        rows = [Row("w1", "w2 w3", prefill="sure :", category="a", id="x", extra={"k": 1}), Row("w1", "w2")]
        direct = NoAttack().rows(word_tokenizer(), rows)
        assert direct == [Row("w1", "sure : w2 w3", category="a", id="x", extra={"k": 1}), rows[1]]
        # half a reference would be worse than none
        assert NoAttack().rows(word_tokenizer(), [Row("w1", "", prefill="sure :")]) == [Row("w1", "")]

    def test_prefilling_uses_the_column(self) -> None:
        rows = [Row("w1", "w2 w3", prefill="sure :")]
        assert Prefilling(tokens=1).rows(word_tokenizer(), rows) == rows

    def test_prefilling_cuts_the_response_itself(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, ",": 2, "bc": 3}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # splits at punctuation, so decoding would add a space
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        response = "a,  bc q, a"
        for tokens, start in [(1, "a"), (2, "a,"), (3, "a,  bc"), (5, "a,  bc q,")]:
            (row,) = Prefilling(tokens).rows(fast, [Row("a", response)])
            assert (row.prefill, row.prefill + row.response) == (start, response)

    def test_prefilling_names_the_row_that_it_cannot_cut(self) -> None:
        rows = [Row("w1", "w2 w3 w4"), Row("w1", "w2 w3", id="short")]
        with pytest.raises(CalibrationError, match=r"row 1 \(id 'short'\): response has 2 tokens"):
            Prefilling(tokens=2).rows(word_tokenizer(), rows)
        with pytest.raises(CalibrationError, match=r"row 0: .*'prefill' or a 'response' column"):
            Prefilling(tokens=2).rows(word_tokenizer(), [Row("w1", " ")])

    def test_prefilling_that_ends_inside_a_character_is_named(self) -> None:
        vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        with pytest.raises(CalibrationError, match=r"row 0: the first 5 tokens .* inside its last character.*no rest"):
            Prefilling(5).rows(fast, [Row("a", "ab \N{GRINNING FACE}")])
        (row,) = Prefilling(3).rows(fast, [Row("a", "ab \N{GRINNING FACE}")])
        assert (row.prefill, row.response) == ("ab ", "\N{GRINNING FACE}")

    @pytest.mark.parametrize("name", ATTACKS)
    def test_every_attack_yields_a_row_for_each_row_and_nothing_else(self, name: str) -> None:
        rows = [Row("w1", " ".join(["w2"] * 12), id=str(index)) for index in range(3)]
        with attack(name).on(None, word_tokenizer(), rows) as asked:
            assert [row.id for row in asked] == [row.id for row in rows]
            assert all(type(row) is Row and row.response for row in asked)
        assert attack(name).name == name and ATTACKS[name].summary

    def test_by_name(self) -> None:
        assert attack("none") == NoAttack()
        assert attack("prefilling", tokens=3) == Prefilling(3)
        assert attack(Prefilling(4)) == Prefilling(4)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("prefill", {}, re.escape(f"one of {sorted(ATTACKS)}")),
            (None, {}, "got None"),
            ("none", {"tokens": 3}, r"takes no options, got \['tokens'\]"),
            ("prefilling", {"length": 3}, r"takes \['tokens', 'depth'\], got \['length'\]"),
            ("prefilling", {"tokens": 0}, "tokens: expected a positive integer"),
            (NoAttack(), {"tokens": 3}, "no options"),
        ],
    )
    def test_unknown_names_and_options(self, name: object, options: dict, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            attack(name, **options)


class TestJudges:
    @pytest.mark.parametrize("name", JUDGES)
    def test_every_judge_with_a_name_tells_a_refusal_from_the_reference(self, name: str) -> None:
        row = Row("w1", "the answer")
        assert JUDGES[name].judge(row, "the answer") == 1.0
        assert JUDGES[name].judge(row, "I'm sorry, I can't.") == 0.0
        assert JUDGES[name].summary and "{attack}" in JUDGES[name].meaning

    @pytest.mark.parametrize(
        ("reference", "completion", "expected"),
        [
            ("w1 w2", "w1 w2", 1),
            ("w1 w2", "  w1\n w2  w3", 1),
            (" w1  w2 ", "w1 w2", 1),
            ("w1 w2", "w1 w20", 0),
            ("w1 w2", "w1", 0),
            ("w1 w2", "w0 w1 w2", 0),
            ("w1 w2", "W1 w2", 0),
            ("yes", "yes, of course", 1),
            ("yes", "yes-man", 0),
            ("yes", "yes_", 0),
            ("1", "1.", 1),
            ("1", "1.5", 0),
            ("1", "12", 0),
            ("a.c", "abc", 0),
            ("yes", "", 0),
            ("cafe", "cafe\u0301", 0),  # another letter
            ("\u6771\u4eac", "\u6771\u4eac\u3067\u3059", 1),  # "Tokyo" and "is Tokyo" in Japanese: no space
            ("\u0e19\u0e49\u0e33", "\u0e19\u0e49\u0e33\u0e40\u0e22\u0e47\u0e19", 1),  # "water" and "cold water" in Thai
            ("\u0e19", "\u0e19\u0e49\u0e33", 0),  # a consonant without its sign
        ],
    )
    def test_exact_match(self, reference: str, completion: str, expected: int) -> None:
        assert exact_match(Row("p", reference), completion) == expected

    def test_exact_match_needs_a_reference(self) -> None:
        with pytest.raises(CalibrationError, match="response: expected a reference"):
            exact_match(Row("p", " "), "x")

    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            ("I\u2019m  sorry, but no", 1),
            ("Well: i CANNOT do it", 1),
            ("sorry cannot comply", 1),
            ("Hi can't", 0),
            ("I cannotify you", 0),
            ("sure : w1", 0),
            ("", 0),
        ],
    )
    def test_keyword_refusal(self, completion: str, expected: int) -> None:
        assert keyword_refusal()(Row("p", ""), completion) == expected

    def test_keyword_refusal_with_other_phrases(self) -> None:
        assert keyword_refusal(["Never (ever)"])(Row("p", ""), "never (ever) again") == 1
        assert keyword_refusal(["never"])(Row("p", ""), "I cannot") == 0
        both = keyword_refusal(extra=["never"])
        assert both(Row("p", ""), "I cannot") == both(Row("p", ""), "never") == 1

    @pytest.mark.parametrize("phrases", [[], [" "], [3], "sorry"])
    def test_keyword_refusal_without_phrases(self, phrases: object) -> None:
        with pytest.raises(ArgumentError, match="phrases"):
            keyword_refusal(phrases)
