"""A tokenizer's chat template, checked once: the text around prompt and reply, and what these may not contain.

A template is a foreign program. One that would make scoring, generation and evaluation different experiments is
refused, with a fix; ``docs/templates.md`` lists what is refused and what is noted.

In: a tokenizer and the template's arguments. Out: :class:`ChatTemplate`, the source of these texts for all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastprune.calibration.conversations import Turns
from fastprune.calibration.generation_prompt import check_generation_prompt
from fastprune.calibration.template_history import Histories
from fastprune.calibration.template_markers import TurnMarkers
from fastprune.calibration.template_render import Renderer, template_text
from fastprune.calibration.template_source import FROZEN_DATE, TemplateSource
from fastprune.calibration.template_turns import (
    SYSTEM_MARKER,
    begins_thought,
    find_system,
    find_turns,
    find_user_header,
    quoted,
)
from fastprune.calibration.tokens import check_tokenizer, encode, special_ids
from fastprune.errors import ArgumentError, CalibrationError, setting

# Texts that follow the generation prompt, or could; a thought in them would be the second one where it ends in one.
_REPLIES = ("prefill", "response", "system")


class ChatTemplate:
    """A tokenizer's chat template with its arguments fixed and checked.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        system: Text of a system turn before the prompt; ``None`` leaves it to the template, ``""`` is an empty one.
        template_args: Values of variables that the template reads, such as ``{"enable_thinking": False}``; JSON data.

    Attributes:
        closing: Text that the template writes after a reply, up to the end.
        end_of_turn: Ids of the text after a reply up to and including its end of turn; empty if there is none.
        control_ids: Ids of the tokens that can end or open a turn.
        facts: JSON data for provenance: ``template_sha256``, ``template_args``, ``system_sha256`` (or ``None``),
            ``default_system`` (the template's own system text, or ``None``), ``date`` (the fixed one that a template
            with a clock is given, or ``None``).

    Raises:
        ArgumentError: ``tokenizer`` is not one; ``template_args`` has a name that the template does not read, or a
            value that is not JSON; ``system`` is not text, or the template does not show it.
        CalibrationError: There is no template, it fails, or it would change the experiment.

    Warns:
        FastpruneWarning: The generation prompt differs harmlessly from the text before a reply.
    """

    closing: str
    end_of_turn: list[int]
    control_ids: frozenset[int]
    facts: dict[str, Any]

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, template_args: Mapping[str, Any] | None = None
    ) -> None:
        check_tokenizer(tokenizer)
        if system is not None and not isinstance(system, str):
            raise ArgumentError(f"expected text or None, got {type(system).__name__}", argument="system")
        source = TemplateSource(template_text(tokenizer))
        arguments = source.check_arguments(template_args)
        self._render = Renderer(tokenizer, source.frozen, arguments, system)
        if system is not None:
            _check_system(self._render)
        self._turns = find_turns(self._render)
        check_generation_prompt(self._turns, self._render, source)
        self._histories = Histories(self._render, self._turns)

        self.closing = self._turns.closing
        self.control_ids = frozenset(special_ids(tokenizer))
        self.end_of_turn = _up_to_first(self.control_ids, encode(tokenizer, self.closing))
        self.facts = {
            "template_sha256": source.sha256,
            "template_args": dict(arguments),
            "system_sha256": None if system is None else hashlib.sha256(system.encode("utf-8")).hexdigest(),
            "default_system": _default_system(self._render, self._turns.head) if system is None else None,
            "date": FROZEN_DATE.isoformat() if source.reads_clock else None,
        }
        self._markers = TurnMarkers(tokenizer, find_user_header(self._render, self.closing), self._turns)
        if system:
            self.check_text(system, "system", "chat template")

    def opening(self, prompt: str, history: Turns = (), where: str = "row") -> str:
        """Text of everything before the reply: system turn, user turn, and the assistant's turn up to its content.

        Args:
            prompt: The content of the user turn.
            history: The turns before it, ``(role, text)`` each.
            where: Name of the row in messages.

        Raises:
            CalibrationError: The template fails on these turns, changes more of them than white space, or writes
                another text around them than around others.
        """
        if history:
            return self._histories.opening(history, prompt, where)
        try:
            text = self._render(prompt, open=True)
        except CalibrationError as error:  # what a template raises may quote the prompt
            raise CalibrationError(f"the chat template failed on a prompt ({type(error.__cause__).__name__})") from None
        head, generation = self._turns.head, self._turns.generation
        middle = text[len(head) : len(text) - len(generation)]
        if head + middle + generation != text or (middle != prompt and middle.split() != prompt.split()):
            raise CalibrationError(
                "chat template: expected the same text around every prompt and the prompt as it is, got a prompt that "
                "the template changes or takes for an instruction to itself; leave it out, or use "
                f"{setting('format', 'raw')}"
            )
        return text

    def check_text(self, text: str, what: str, where: str) -> None:
        """Refuse text of a row that is already rendered or contains what ends or opens a turn.

        Tags around thoughts are content: a reply may contain them, and its thought is scored with it. A reply may not
        open a thought, however, if the template has just ended one.

        Args:
            text: The text, which messages do not quote.
            what: Its column.
            where: Name of the row in messages.

        Raises:
            CalibrationError: The text is refused.
        """
        expected = f"{where}: {what}: expected"
        way_out = f"take it out, or use {setting('format', 'raw')} for rows that are already rendered"
        if (control := self._markers.control(text)) is not None:
            raise CalibrationError(f"{expected} text without control tokens, got {control!r} in it; {way_out}")
        if (header := self._markers.header(text)) is not None:
            raise CalibrationError(
                f"{expected} text that is not yet rendered, got the chat template's {quoted(header)} at its beginning; "
                f"{way_out}"
            )
        if what in _REPLIES and self._turns.ends_thought and begins_thought(text):
            raise CalibrationError(
                f"{expected} a reply without a thought, since the chat template ends the thinking block before it, got "
                "one that opens another; take the thought out, or tell the template to think with "
                f"{setting('template_args')}"
            )


def _check_system(render: Renderer) -> None:
    """Refuse a system text if the template does not show it."""
    reason = "it leaves the text out"
    try:
        if find_system(replace(render, system=SYSTEM_MARKER), "")[0]:
            return
    except CalibrationError as error:
        reason = str(error)
    find_turns(replace(render, system=None))  # raises the error of a template that fails without a system text, too
    raise ArgumentError(
        f"expected None for a chat template without a system turn, got text ({reason}); "
        "write it at the beginning of each prompt instead",
        argument="system",
    )


def _default_system(render: Renderer, head: str) -> str | None:
    try:
        return find_system(replace(render, system=SYSTEM_MARKER), head)[1]
    except CalibrationError:
        return None


def _up_to_first(control_ids: frozenset[int], ids: list[int]) -> list[int]:
    # Not up to `eos_token`, with which many models do not end a turn. Tokens before the first special one (a space, a
    # line break) are the template's. Without a special token, the first token that the template writes ends the turn.
    end = next((index for index, token in enumerate(ids) if token in control_ids), 0)
    return ids[: end + 1]
