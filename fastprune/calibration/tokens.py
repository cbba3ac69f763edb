"""A piece of text to token ids and back, without special tokens: one rule for every caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a piece of text, tokenised alone and without special tokens."""
    # verbose=False: max_length limits the length of a row, so the tokenizer need not warn about it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out and spaces kept as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
