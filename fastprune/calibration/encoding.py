"""Text to token ids: how prompt, prefill and response become one example.

An :class:`Encoder` is made once, so that scoring, generation, recognition and perplexity give a model the same tokens
for the same text. Pieces are tokenized separately and verbatim and then joined, so that the border between context and
scored response is exact.

In: a tokenizer, a format and rows. Out: ids and labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastprune.calibration.chat_template import ChatTemplate
from fastprune.calibration.conversations import Turns
from fastprune.calibration.examples import UNSCORED, Example
from fastprune.calibration.prompts import PromptHashes
from fastprune.calibration.refusals import is_refusal
from fastprune.calibration.rows import FINISHES, Row
from fastprune.calibration.tokens import check_tokenizer, encode, special_ids
from fastprune.errors import ArgumentError, CalibrationError, setting

FORMATS = ("raw", "chat")


class Encoder:
    r"""Turns text into token ids, with one tokenizer and one format.

    ``raw`` is ``[BOS] | tok(prompt + "\n") | tok(prefill) | tok(response)``; ``chat`` is the tokenizer's template
    around a user turn, after the turns of a row's history, with the assistant's turn opened, then prefill, response and
    the end of the turn.

    Args:
        tokenizer: A Hugging Face tokenizer.
        format: ``"raw"`` or ``"chat"``.
        bos: Whether ``raw`` text begins with the tokenizer's BOS. ``"auto"``: if the tokenizer adds one by default, as
            in training; ``False``: never, the published recipe; ``True``: always. ``chat`` accepts ``"auto"`` only,
            since its template writes the BOS.
        template_args: Variables for the chat template, e.g. ``{"enable_thinking": False}``.
        system: The system turn of a chat; ``None`` leaves that to the template.

    Attributes:
        tokenizer: The tokenizer.
        format: The format.
        turn_ends: Special tokens with which the chat template ends the assistant's turn; none in ``raw``.
        facts: What the ids depend on besides the text, as JSON data for provenance.

    Raises:
        ArgumentError: An argument is unknown or does not go with the format.
        CalibrationError: ``chat`` without a usable template.

    Warns:
        FastpruneWarning: The chat template does something that a user may not expect.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        format: str = "raw",
        bos: str | bool = "auto",
        template_args: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise ArgumentError(f"expected one of {FORMATS}, got {format!r}", argument="format")
        check_tokenizer(tokenizer)
        if not (isinstance(bos, bool) or bos == "auto"):
            raise ArgumentError(f'expected "auto", True or False, got {bos!r}', argument="bos")
        self.tokenizer, self.format = tokenizer, format
        self._template: ChatTemplate | None = None
        self._prefix: list[int] = []
        self.facts: dict[str, Any]
        self.turn_ends: frozenset[int] = frozenset()
        if format == "chat":
            if bos != "auto":
                raise ArgumentError(
                    f"expected 'auto' with {setting('format', 'chat')}, whose template writes the BOS or not, "
                    f"got {bos!r}",
                    argument="bos",
                )
            self._template = ChatTemplate(tokenizer, system=system, template_args=template_args)
            # ordinary text with which a template may close a turn (a line break) does not end a reply
            self.turn_ends = frozenset(self._template.control_ids.intersection(self._template.end_of_turn))
            self.facts = {"format": format, "bos": {"rule": bos, "ids": None}, "template": self._template.facts}
            return
        for name, value in (("template_args", template_args), ("system", system)):
            if value is not None:
                raise ArgumentError(
                    f"expected {setting('format', 'chat')}, got {setting('format', 'raw')}, which uses no template",
                    argument=name,
                )
        self._prefix = _bos(tokenizer, bos)
        self.facts = {"format": format, "bos": {"rule": bos, "ids": self._prefix}, "template": None}

    def context(self, prompt: str, prefill: str = "", *, history: Turns = (), where: str = "row") -> list[int]:
        """Token ids of everything before the scored response; generation continues them.

        Args:
            prompt: The request.
            prefill: Start of the reply that counts as context.
            history: What came before the prompt, as of a :class:`Row`; for ``chat`` alone.
            where: Name of the row in messages.

        Raises:
            CalibrationError: The template fails, the text is already a rendered conversation, or there is a history in
                the raw format.
        """
        if self._template is None:
            if history:
                raise CalibrationError(
                    f"{where}: history: expected none with {setting('format', 'raw')}, which has no way to join turns, "
                    f"got {len(history)} turns; use {setting('format', 'chat')}"
                )
            opening = self.with_bos(self.tokens(prompt + "\n"))
        else:
            for number, (_, text) in enumerate(history, start=1):
                self._template.check_text(text, f"history, turn {number}", where)
            self._template.check_text(prompt, "prompt", where)
            self._template.check_text(prefill, "prefill", where)
            opening = self.tokens(self._template.opening(prompt, history, where))
        return opening + self.tokens(prefill)

    def example(self, row: Row, *, where: str = "row", finish: str | None = None) -> Example:
        """Tokenize one row. The response is scored and, in ``chat``, the end-of-turn token of a reply that ended.

        Args:
            row: The row.
            where: Name of the row in messages.
            finish: How the reply ended if the row does not say: ``"stop"`` (the same as ``None``), or ``"length"`` for
                a reply that was cut, whose end of turn is left out of the example.

        Returns:
            The example, never truncated.

        Raises:
            CalibrationError: The response is empty or gives no token that can be scored, or as :meth:`context`.
        """
        if row.id is not None:
            where = f"{where} (id {row.id!r})"
        context = self.context(row.prompt, row.prefill, history=row.history, where=where)
        if self._template is not None:
            self._template.check_text(row.response, "response", where)
        response = self.tokens(row.response)
        if not response:
            found = "text without a token" if row.response else "empty text"
            raise CalibrationError(f"{where}: response: expected at least one token to score, got {found}")
        labels = [UNSCORED] * len(context) + response
        closing: list[int] = []
        if self._template is not None and (row.finish or finish) != "length":
            closing = self._template.end_of_turn
            # only the last token is scored: a space or line break before it is the template's, not the reply's
            labels += [UNSCORED] * len(closing[:-1]) + closing[-1:]
        labels[0] = UNSCORED
        if all(label == UNSCORED for label in labels):
            raise CalibrationError(
                f"{where}: the context gives no token and the response only one, which nothing precedes"
            )
        ids = (*context, *response, *closing)
        return Example(
            ids,
            tuple(labels),
            id=row.id,
            category=row.category,
            ends_turn=bool(closing),
            finish=row.finish or finish,
            refusal=is_refusal(row.prefill + row.response),
            prompt=PromptHashes.of(row),
        )

    def tokens(self, text: str) -> list[int]:
        """Ids of a piece of text alone, without special tokens."""
        return encode(self.tokenizer, text)

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids after the BOS that this encoder writes, if any; a BOS that the text already has is not doubled."""
        prefix = self._prefix
        return ids if prefix and ids[: len(prefix)] == prefix else prefix + ids


def check_finish(finish: object) -> None:
    """Raise ArgumentError unless ``finish`` is one of :data:`FINISHES` or None."""
    if finish is not None and finish not in FINISHES:
        raise ArgumentError(f"expected one of {FINISHES} or None, got {finish!r}", argument="finish")


def control_texts(tokenizer: Any) -> list[str]:
    """Texts of a tokenizer's special tokens."""
    tokens = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
    return [token for token in tokens if isinstance(token, str) and token.strip()]


def count_holding(texts: Iterable[str], controls: Iterable[str]) -> int:
    """Number of texts that contain one of the control tokens."""
    controls = list(controls)
    return sum(any(control in text for control in controls) for text in texts)


def _bos(tokenizer: Any, rule: str | bool) -> list[int]:
    """Ids that a rule puts before a text.

    Whether a tokenizer adds a BOS shows only when it encodes a word: Gemma's adds one although its ``add_bos_token`` is
    ``False``, GPT-2's has a ``bos_token`` but adds none, and GLM's adds two tokens.
    """
    if rule is False:
        return []
    plain, default = (list(tokenizer("word", add_special_tokens=add)["input_ids"]) for add in (False, True))
    begin = next((n for n in range(len(default) - len(plain) + 1) if default[n : n + len(plain)] == plain), 0)
    if rule == "auto" or begin:
        return default[:begin]
    if tokenizer.bos_token_id is None:
        raise ArgumentError(
            f"expected a tokenizer with a BOS token, got a {type(tokenizer).__name__} without one; "
            f"use {setting('bos', 'auto')}, which adds what the tokenizer adds by default",
            argument="bos",
        )
    return [tokenizer.bos_token_id]
