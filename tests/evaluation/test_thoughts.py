"""A thought apart from the answer, whether its tags are special tokens or text, and whoever opened it."""

from __future__ import annotations

import pytest
from support.generation import word_tokenizer
from tokenizers import AddedToken

from fastprune.evaluation.thoughts import Reply, read_reply


def tokenizer_with(*tags: str, special: bool):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens([AddedToken(tag, special=special) for tag in tags], special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("opens", "closes"), [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("◁think▷", "◁/think▷")]
)
def test_a_thought_is_separated(opens: str, closes: str, special: bool) -> None:
    tokenizer = tokenizer_with(opens, closes, special=special)

    def read(text: str, prefill: str = "") -> Reply:
        return read_reply(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], prefill)

    assert read("w1 w2") == Reply("w1 w2", None)
    assert read(f"{opens} w1 w2 {closes} w3 w4 <end>") == Reply("w3 w4", "w1 w2")
    assert read(f"{opens} {closes} w3") == Reply("w3", "")
    assert read(f"{opens} w1 w2") == Reply("", "w1 w2")
    assert read(f"{opens} w1 {closes}") == Reply("", "w1")
    assert read(f"w1 {closes} w3", prefill=f"{opens} w0") == Reply("w3", "w1")
    assert read("w1", prefill=f"{opens} w0 {closes} w2") == Reply("w1", None)
    # tags later in a reply are content
    assert read(f"w1 {opens} w2 {closes}").thought is None
    later = read(f"{opens} w1 {closes} w2 {opens} w3")
    assert later.thought == "w1" and later.text.startswith("w2")
    assert read("") == Reply("", None)
