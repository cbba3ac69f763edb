"""What a row may not contain in the chat format: a tokenizer's control tokens, a template's markers and headers.

In: a tokenizer, and the text that its template writes around turns. Out: :class:`TurnMarkers`. Every text of every row
is checked, so the check searches strings and tokenizes nothing.
"""

from __future__ import annotations

import re
from typing import Any

from fastprune.calibration.template_turns import Turns, is_thought_tag

# Markers that a template writes as ordinary text, without a token of their own: <|user|>, [INST], [|user|].
_MARKER = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]{2,}\]|\[\|[^\[\]\s]+\|\]")

# Special tokens that also occur in ordinary text: <filename>, <mask>, <unk>, [MASK].
_PLAIN = re.compile(r"<\w+>|\[\w+\]")


class TurnMarkers:
    """Texts that end or open a turn.

    These are the tokens that begin and end texts, the tokens and markers that the template writes around turns, and
    special tokens that ordinary text does not contain (``<|endoftext|>``). All else is content: tags around thoughts,
    special tokens that are a word in brackets (``<filename>``, ``<unk>``), and added tokens that are not special
    (Gemma's ``<h1>``, Qwen's ``<tool_call>``).

    Args:
        tokenizer: A Hugging Face tokenizer.
        user_header: Text that the template writes before a prompt that is not the first.
        turns: Text that it writes around the first prompt and reply.
    """

    def __init__(self, tokenizer: Any, user_header: str, turns: Turns) -> None:
        around = "\n".join((user_header, turns.generation, turns.before_reply, turns.closing))
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        texts = {token.content for token in added if token.content in around} | set(_MARKER.findall(around))
        texts |= {text for text in special if text in turns.head or not _PLAIN.fullmatch(text)}
        names = ("bos_token", "eos_token", "pad_token", "sep_token", "cls_token")
        texts |= {text for text in (getattr(tokenizer, name, None) for name in names) if text}
        # by their first two characters, which few rows contain
        self._controls: dict[str, list[str]] = {}
        for text in sorted(texts):
            if text.strip() and not text.isalnum() and not is_thought_tag(text):
                self._controls.setdefault(text[:2], []).append(text)

        headers = {user_header, turns.head, turns.before_reply, turns.generation.removeprefix(turns.pending)}
        headers = {text.strip().removeprefix(tokenizer.bos_token or "").strip() for text in headers}
        # a header that ends in a letter would match other words ("User" in "Users …")
        self._headers = tuple(sorted(text for text in headers if text and not text[-1].isalnum()))

    def control(self, text: str) -> str | None:
        """A control token or marker in ``text``, ``None`` if there is none."""
        candidates = (control for start, controls in self._controls.items() if start in text for control in controls)
        return next((control for control in candidates if control in text), None)

    def header(self, text: str) -> str | None:
        """The plain-text header of a turn (``USER:``) with which ``text`` begins, ``None`` if there is none."""
        start = text.lstrip()
        return next((header for header in self._headers if start.startswith(header)), None)
