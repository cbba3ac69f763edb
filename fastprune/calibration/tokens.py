"""A piece of text to token ids and back, without special tokens; and which tokens are special."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fastprune.errors import ArgumentError


def check_tokenizer(tokenizer: object) -> None:
    """Raise ArgumentError unless ``tokenizer`` can be one of Hugging Face's."""
    if not callable(tokenizer):
        raise ArgumentError(f"expected a Hugging Face tokenizer, got {type(tokenizer).__name__}", argument="tokenizer")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a piece of text, tokenized alone and without special tokens."""
    # verbose=False: max_length limits the length of a row, so the tokenizer need not warn about it.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out and spaces kept as they are."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that can end a turn: special and other added ones, except white space and the unknown word.

    Some tokenizers have their end of turn as an added token that is not marked special; others (Gemma's, GPT-NeoX's)
    have runs of spaces and line breaks as such tokens.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 uses one token for both
        special.discard(tokenizer.unk_token_id)
    return special


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and rules, which its chat template is not part of."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # How the last call padded and cut is a state of the tokenizer, not a rule.
        rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    rules["special"] = sorted(special_ids(tokenizer))
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
