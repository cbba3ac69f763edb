"""What a row may not hold in the chat format: the control tokens of a tokenizer, the markers and headers of a template.

In: a tokenizer, and what its template writes around turns. Out: :class:`Marks`, asked once for every text of every row,
so it searches strings and tokenises nothing. It must not know rows or how templates are rendered.
"""

from __future__ import annotations

import re
from typing import Any

from fastprune.calibration.template_turns import Turns, is_thought_tag

# A marker that a template writes as ordinary text, where the tokenizer has no token for it: <|user|>, [INST], [|user|].
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]{2,}\]|\[\|[^\[\]\s]+\|\]")

# Special tokens that people write as well: <filename>, <mask>, <unk>, [MASK].
_PLAIN = re.compile(r"<\w+>|\[\w+\]")


class Marks:
    """Texts that end or open a turn.

    These are the tokens that begin and end texts, the tokens and markers that the template writes around turns, and
    every special token that looks like nothing else (``<|endoftext|>``). The rest is content: tags around thoughts,
    special tokens that are a word in brackets (``<filename>``, ``<unk>``), and added tokens that are not special
    (Gemma's ``<h1>``, Qwen's ``<tool_call>``).

    Args:
        tokenizer: A Hugging Face tokenizer.
        user_header: What the template writes before a prompt that is not the first.
        turns: What it writes around the first ones.
    """

    def __init__(self, tokenizer: Any, user_header: str, turns: Turns) -> None:
        around = "\n".join((user_header, turns.generation, turns.before_reply, turns.closing))
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        texts = {token.content for token in added if token.content in around} | set(_MARKER.findall(around))
        texts |= {text for text in special if text in turns.head or not _PLAIN.fullmatch(text)}
        names = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token")
        texts |= {text for text in (getattr(tokenizer, name, None) for name in names) if text}
        # by their first two characters: few rows hold any of these pairs
        self._controls: dict[str, list[str]] = {}
        for text in sorted(texts):
            if text.strip() and not text.isalnum() and not is_thought_tag(text):
                self._controls.setdefault(text[:2], []).append(text)

        begins = {user_header, turns.head, turns.before_reply, turns.generation.removeprefix(turns.pending)}
        begins = {text.strip().removeprefix(tokenizer.bos_token or "").strip() for text in begins}
        # one that ends in a letter would take "Users …" for "User"
        self._headers = tuple(sorted(text for text in begins if text and not text[-1].isalnum()))

    def control(self, text: str) -> str | None:
        """A control token or marker that ``text`` holds."""
        for beginning, controls in self._controls.items():
            if beginning in text:
                for control in controls:
                    if control in text:
                        return control
        return None

    def header(self, text: str) -> str | None:
        """The header of a turn that ``text`` begins with, where the template marks turns by plain text (``USER:``)."""
        begin = text.lstrip()
        return next((header for header in self._headers if begin.startswith(header)), None)
