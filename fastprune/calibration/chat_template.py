"""A tokenizer's chat template, checked once: what stands around a prompt and a reply, and what may not stand in them.

In: a tokenizer and the template's arguments. Out: :class:`ChatTemplate`, from which scoring, generation and evaluation
take the same texts. A template is a foreign program; one with which these would not be the same experiment is refused,
with the way out. ``docs/templates.md`` lists what is refused and what is noted.
It must not know files, batches or models.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastprune.calibration.template_marks import Marks
from fastprune.calibration.template_source import FROZEN_DATE, TemplateSource, failed
from fastprune.calibration.template_turns import (
    SYSTEM_MARKER,
    Difference,
    Turns,
    begins_thought,
    compare,
    completions,
    find_system,
    find_turns,
    find_user_header,
    shown,
    shown_after_prompt,
)
from fastprune.calibration.tokens import encode
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning

# Variables by which a template may be told not to think, and the values that tell it.
_SWITCH = re.compile("think|reason", re.IGNORECASE)
_OFF = (False, 0, "none", "off")


class ChatTemplate:
    """A tokenizer's chat template with its arguments fixed, checked once.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        system: Text of a system turn before the prompt; ``None`` leaves it to the template, ``""`` is an empty one.
        template_args: Values of variables that the template reads, such as ``{"enable_thinking": False}``; JSON data.

    Attributes:
        closing: Text that the template writes after a reply, up to the end.
        end_of_turn: Ids of what stands after a reply up to and including its end of turn; empty if nothing does.
        control_ids: Ids of the tokens that can end a turn or open one, see :func:`special_ids`.
        facts: JSON data for provenance: ``template_sha256``, ``template_args``, ``system_sha256`` (or ``None``),
            ``default_system`` (the system text that the template writes by itself, or ``None``), ``date`` (the one that
            stands in for the clock if the template asks it, or ``None``).

    Raises:
        ArgumentError: ``tokenizer`` is not one; ``template_args`` has a name that the template does not read, or a
            value that is not JSON; ``system`` is not text, or the template does not show it.
        CalibrationError: There is no template, it fails, or with it another experiment would be run.

    Warns:
        FastpruneWarning: The generation prompt differs, but harmlessly, from what stands before a reply.
    """

    closing: str
    end_of_turn: list[int]
    control_ids: frozenset[int]
    facts: dict[str, Any]

    def __init__(
        self, tokenizer: Any, *, system: str | None = None, template_args: Mapping[str, Any] | None = None
    ) -> None:
        if not callable(tokenizer):
            raise ArgumentError(f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer).__name__}")
        if system is not None and not isinstance(system, str):
            raise ArgumentError(f"system: expected text or None, got {type(system).__name__}")
        source = TemplateSource(_template_text(tokenizer))
        arguments = source.check_arguments(template_args)
        self._render = _Renderer(tokenizer, source.frozen, arguments, system)
        if system is not None:
            _check_system(self._render)
        self._turns = find_turns(self._render)
        _check_generation_prompt(self._turns, self._render, source)

        self.closing = self._turns.closing
        self.control_ids = frozenset(special_ids(tokenizer))
        self.end_of_turn = _up_to_first(self.control_ids, encode(tokenizer, self.closing))
        self.facts = {
            "template_sha256": source.sha256,
            "template_args": dict(arguments),
            "system_sha256": None if system is None else hashlib.sha256(system.encode("utf-8")).hexdigest(),
            "default_system": _default_system(self._render, self._turns.head) if system is None else None,
            "date": FROZEN_DATE.isoformat() if source.asks_clock else None,
        }
        self._marks = Marks(tokenizer, find_user_header(self._render, self.closing), self._turns)
        if system:
            self.check_text(system, "system", "chat template")

    def opening(self, prompt: str) -> str:
        """Text of everything before the reply: the system's turn, the user's, and the assistant's up to its content.

        Raises:
            CalibrationError: The template fails on this prompt, changes it (other than its white space), or writes
                something else around it than around others.
        """
        try:
            text = self._render(prompt, open=True)
        except CalibrationError as error:  # what a template raises may quote the prompt
            raise CalibrationError(f"the chat template failed on a prompt ({type(error.__cause__).__name__})") from None
        head, generation = self._turns.head, self._turns.generation
        middle = text[len(head) : len(text) - len(generation)]
        if head + middle + generation != text or (middle != prompt and middle.split() != prompt.split()):
            raise CalibrationError(
                "chat template: expected the same text around every prompt and the prompt as it is, got a prompt that "
                "the template changes or takes for an instruction to itself; leave it out, or use format='raw'"
            )
        return text

    def check_text(self, text: str, what: str, where: str) -> None:
        """Refuse text of a row that is already rendered or holds what ends or opens a turn.

        Tags around thoughts are content: a reply may hold them, and its thought is scored with it. But a reply may not
        open a thought where the template has just ended one.

        Args:
            text: The text; it is not quoted in messages.
            what: The column it is from.
            where: How messages call the row.

        Raises:
            CalibrationError: As described.
        """
        expected = f"{where}: {what}: expected"
        way_out = "take it out, or use format='raw' for rows that are already rendered"
        if (control := self._marks.control(text)) is not None:
            raise CalibrationError(f"{expected} text without control tokens, got {control!r} in it; {way_out}")
        if (header := self._marks.header(text)) is not None:
            raise CalibrationError(
                f"{expected} text that is not yet rendered, got the chat template's {shown(header)} at its beginning; "
                f"{way_out}"
            )
        if what != "prompt" and self._turns.thought_written and begins_thought(text):
            raise CalibrationError(
                f"{expected} a reply without a thought, since the chat template ends the thinking block before it, got "
                "one that opens another; take the thought out, or tell the template to think with template_args="
            )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special and other added tokens that can end a turn: not white space, and not the unknown word.

    Some tokenizers hold their end of turn as a token that was added without being called special; others (Gemma's,
    GPT-NeoX's) have added runs of spaces and line breaks in the same way.
    """
    special = set(tokenizer.all_special_ids)
    special |= {token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
    if tokenizer.unk_token_id != tokenizer.eos_token_id:  # GPT-2 has one token for both
        special.discard(tokenizer.unk_token_id)
    return special


@dataclass(frozen=True)
class _Renderer:
    """A template with all that it is rendered with."""

    tokenizer: Any
    text: str
    arguments: dict[str, Any]
    system: str | None

    def __call__(self, *contents: Any, open: bool) -> str:
        turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            # as text: with tokenize=True the pieces could not be joined token by token
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.text, tokenize=False, add_generation_prompt=open, **self.arguments
            )
        except Exception as error:  # a template is a foreign program: whatever it raises is a fact about the data
            raise failed(error) from error

    def variant(self, *, arguments: Mapping[str, Any] | None = None, addition: str = "") -> Turns | None:
        """The turns with other arguments or with an addition to the text, ``None`` where that does not work."""
        text = self.text.rstrip("\n") + addition if addition else self.text
        try:
            return find_turns(replace(self, text=text, arguments=self.arguments | dict(arguments or {})))
        except CalibrationError:
            return None


def _template_text(tokenizer: Any) -> str:
    templates = getattr(tokenizer, "chat_template", None)
    if templates is None:
        raise CalibrationError(
            f"format='chat' needs a chat template and this {type(tokenizer).__name__} has none; "
            "use format='raw' or set tokenizer.chat_template"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise CalibrationError(
            f"chat template: expected one, or several with one named 'default', got {sorted(templates)}; "
            "set tokenizer.chat_template to one of them"
        ) from error


def _check_system(render: _Renderer) -> None:
    """Refuse a system text that the template does not show."""
    reason = "it leaves the text out"
    try:
        if find_system(replace(render, system=SYSTEM_MARKER), "")[0]:
            return
    except CalibrationError as error:
        reason = str(error)
    find_turns(replace(render, system=None))  # a template that fails anyway says so itself
    raise ArgumentError(
        f"system: expected None for a chat template without a system turn, got text ({reason}); "
        "write it at the beginning of each prompt instead"
    )


def _default_system(render: _Renderer, head: str) -> str | None:
    try:
        return find_system(replace(render, system=SYSTEM_MARKER), head)[1]
    except CalibrationError:
        return None


def _check_generation_prompt(turns: Turns, render: _Renderer, source: TemplateSource) -> None:
    """Refuse or note what differs between the generation prompt and what stands before a reply."""
    switches = sorted(name for name in source.arguments if _SWITCH.search(name))
    thinks = any(render.arguments.get(name) not in (None, *_OFF) for name in switches)
    difference = compare(turns)
    if difference is None or not difference.refused:
        difference = _thinks_by_default(turns, render, [] if thinks else switches) or difference
    if difference is None or (difference.white_space and _same_tokens(turns, render.tokenizer)):
        return
    message = (
        f"chat template: expected a generation prompt that ends where a reply begins, got {difference.what}: "
        f"it writes {shown_after_prompt(turns.generation)}, "
        f"and a finished conversation has {shown_after_prompt(turns.before_reply, reply=True)}"
    )
    if turns.head != turns.finished_head:
        message += f", after {shown(turns.head)} and {shown(turns.finished_head)}"
    if difference.missing_thought and thinks:
        message += "; responses have to hold their thoughts themselves"
    elif difference.refused:
        ways = [*_switched(render, switches, difference, thinks), *_completed(turns, render, difference)]
        raise CalibrationError(
            f"{message}. Way out: {'; or '.join(ways or ['set tokenizer.chat_template to another'])}"
        )
    elif difference.white_space:
        message += "; a response has to begin with white space where its first token has it"
    warnings.warn(message, FastpruneWarning, stacklevel=3)


def _thinks_by_default(turns: Turns, render: _Renderer, switches: list[str]) -> Difference | None:
    """Whether a switch that was not given would have put an ended thinking block before the reply."""
    for name in switches:
        switched = render.variant(arguments={name: False})
        if switched is not None and switched.thought_written and not turns.thought_written:
            return Difference("one after which the model thinks first unless told otherwise", missing_thought=True)
    return None


def _switched(render: _Renderer, switches: list[str], difference: Difference, thinks: bool) -> Iterator[str]:
    """Arguments, tried out, with which a reply without a thought, or one with its thought, stands where it should."""
    for name in switches:
        for value in _OFF:
            turns = render.variant(arguments={name: value})
            if _mends(turns, difference):
                yield f"pass template_args={render.arguments | {name: value}!r}"
                if difference.missing_thought and not thinks:
                    yield f"template_args={render.arguments | {name: True}!r} for responses that hold their thoughts"
                break


def _completed(turns: Turns, render: _Renderer, difference: Difference) -> Iterator[str]:
    """An addition to the template, tried out, with which the generation prompt ends where a reply begins."""
    for text in completions(turns):
        addition = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(text, ensure_ascii=False)} }}}}{{% endif %}}"
        if _mends(render.variant(addition=addition), difference):
            yield f"add {addition} to the end of the last line of the chat template"
            return


def _mends(turns: Turns | None, difference: Difference) -> bool:
    """Whether with these turns nothing is refused, and a thinking block that was missing is there."""
    if turns is None or (difference.missing_thought and not turns.thought_written):
        return False
    left = compare(turns)
    return left is None or not left.refused


def _same_tokens(turns: Turns, tokenizer: Any) -> bool:
    """Whether the tokens are the same all the same: many tokenizers begin a text with a space of their own."""
    begin, reply = turns.head + "user", "Reply"
    apart = encode(tokenizer, begin + turns.generation) + encode(tokenizer, reply)
    return apart == encode(tokenizer, begin + turns.before_reply + reply)


def _up_to_first(control_ids: frozenset[int], ids: list[int]) -> list[int]:
    # Not simply up to `eos_token`, with which many models do not end a turn. What stands before the first special token
    # (a space, a line break) is the template's; without one, the first token that the template writes ends the turn.
    end = next((place for place, token in enumerate(ids) if token in control_ids), 0)
    return ids[: end + 1]
