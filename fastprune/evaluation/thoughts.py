"""What a model thinks before it answers, and the answer.

In: the ids that a model wrote. Out: a :class:`Reply`, whose text is what judges see. Tags around thoughts are found by
their text, since one tokenizer has them as special tokens, which decoding leaves out, and the next as ordinary ones.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastprune.calibration.template_turns import THOUGHT_TAG, begins_thought, closes_thought, open_thought
from fastprune.calibration.tokens import decode


@dataclass(frozen=True)
class Reply:
    """A reply in its two parts.

    Attributes:
        text: The answer; empty if the model never came to one.
        thought: The text between the tags, or ``None`` if the model did not think.
    """

    text: str
    thought: str | None = None


def read_reply(tokenizer: Any, ids: Sequence[int], prefill: str = "") -> Reply:
    """Separate the thought with which a reply begins from the answer.

    Args:
        tokenizer: The model's.
        ids: What the model wrote, without the token that ended it.
        prefill: What it was given of the reply; a thought may have been opened there.

    Returns:
        Both without tags and special tokens. Tags later in a reply are content.
    """
    ids = list(ids)
    written = _with_tags(tokenizer, ids)
    if open_thought(prefill) is None and not begins_thought(written):
        return Reply(decode(tokenizer, ids))
    # The closing tag is whole once so many tokens are there.
    end = bisect.bisect_left(range(len(ids) + 1), True, key=lambda n: _ends(_with_tags(tokenizer, ids[:n])))
    thought = THOUGHT_TAG.sub("", decode(tokenizer, ids[:end])).strip()
    return Reply(decode(tokenizer, ids[end:]).lstrip(), thought)


def _with_tags(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _ends(text: str) -> bool:
    return any(closes_thought(tag) for tag in THOUGHT_TAG.finditer(text))
