"""Prompts without responses are measured wherever no reference is used."""

from __future__ import annotations

import pytest
from support.generation import tiny_model, word_tokenizer

from fastprune.calibration import Row
from fastprune.errors import CalibrationError
from fastprune.evaluation import harm, refusal, utility

PROMPTS = [{"goal": "w1 w2"}, {"goal": "w3"}]


def any_answer(row: Row, completion: str) -> float:
    return float(row.prompt == "w3")


def test_with_a_limit_and_a_judge_of_ones_own() -> None:
    model, tokenizer, limit = tiny_model(), word_tokenizer(), {"max_new_tokens": 2}
    assert harm(model, tokenizer, PROMPTS, attack="none", judge=any_answer, **limit).rate == 0.5
    assert refusal(model, tokenizer, PROMPTS, **limit).n == 2
    assert utility(model, tokenizer, {"skill": PROMPTS}, judges={"skill": any_answer}, **limit).mean == 0.5
    named = [{**row, "skill": "skill"} for row in PROMPTS]
    assert utility(model, tokenizer, named, judges={"skill": any_answer}, **limit).mean == 0.5


def test_a_budget_or_an_attack_by_reference_says_which_row_lacks_it() -> None:
    model, tokenizer = tiny_model(), word_tokenizer()
    for attack in ("none", "prefilling"):
        with pytest.raises(CalibrationError, match=r"row 0: .*'response'"):
            harm(model, tokenizer, PROMPTS, attack=attack, judge=any_answer)
