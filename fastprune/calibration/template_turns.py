"""The text that a chat template writes around a prompt and a reply, found by rendering marker words.

In: a function that renders turns. Out: :class:`Turns`, and how its generation prompt differs from the text before the
reply of a finished conversation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastprune.errors import CalibrationError, setting

Render = Callable[..., str]
"""``render(*contents, open=bool)``: contents of user and assistant in turn; ``open`` adds the generation prompt."""

# Templates may trim content and split it at their own markers, so the reply is one plain word. The prompt is long and
# contains what a template could cut, escape, fold or parse; its first and last words are plain.
_REPLY = "FastpruneSentinelContent"
_BEGIN, _END = "FastprunePromptBegins", "FastprunePromptEnds"
_MIDDLE = ' it\'s <A> "Prompt" & {50} %;\n\n- \u00dcber\n' + "with Many more Words, " * 150
_PROMPT = _BEGIN + _MIDDLE + _END
SYSTEM_MARKER = "FastpruneSystemText"

# Tags around thoughts, as the model families spell them.
THOUGHT_TAG = re.compile(
    r"[<\[◁][|｜]?(?P<close>/|end_(?:of_)?)?(?:start_|begin_(?:of_)?)?(?:\w+:)?"
    r"(?:think|thinking|thoughts?|reasoning)[|｜]?[>\]▷]"
    r"|<\|channel>(?:thought)?|(?P<channel><channel\|>)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Turns:
    """Text that a template writes around prompt and reply.

    Attributes:
        head: Before the prompt, with a generation prompt.
        finished_head: Before the prompt, in a finished conversation.
        generation: After the prompt, with a generation prompt: generation begins at its end.
        before_reply: Between prompt and reply, in a finished conversation.
        closing: After the reply, in a finished conversation.
        pending: After the prompt, without reply or generation prompt.
    """

    head: str
    finished_head: str
    generation: str
    before_reply: str
    closing: str
    pending: str

    @property
    def ends_thought(self) -> bool:
        """Whether the generation prompt ends a thinking block, so that the reply follows the thought."""
        return without_thoughts(self.generation) != self.generation.rstrip() and open_thought(self.generation) is None


@dataclass(frozen=True)
class Difference:
    """How the generation prompt differs from the text before a reply.

    Attributes:
        what: Completes "expected a generation prompt that ends where a reply begins, got …".
        refused: Whether scoring after it would be another experiment.
        missing_thought: It lacks a thinking block that the template has before replies without a thought.
        white_space: Only white space at its end differs.
    """

    what: str
    refused: bool = True
    missing_thought: bool = False
    white_space: bool = False


def find_turns(render: Render) -> Turns:
    """Render the marker words and split the texts around them.

    Raises:
        CalibrationError: The template fails, or it changes, drops, moves or repeats the prompt or the reply.
    """
    try:
        generated = render(_PROMPT, open=True)
    except CalibrationError:
        _refuse_parts(render)
        raise
    if _BEGIN.lower() not in generated.lower():
        _refuse_parts(render)
    head, generation = _around_prompt(generated)
    finished = render(_PROMPT, _REPLY, open=False)
    finished_head, rest = _around_prompt(finished)
    if finished.count(_REPLY) > 1:
        raise _unfit("shows the reply once", "repeats it", finished)
    if _REPLY in finished_head:
        raise _unfit("shows the prompt before the reply", "moves it behind", finished)
    before_reply, found, closing = rest.partition(_REPLY)
    if not found:
        raise CalibrationError(
            "the chat template does not show the assistant's content, so its end of turn cannot be found; it gives "
            f"{quoted(finished)}"
        )
    _, pending = _around_prompt(render(_PROMPT, open=False))
    return Turns(head, finished_head, generation, before_reply, closing, pending)


def find_user_header(render: Render, closing: str) -> str:
    """Text that the template writes between a reply and the next prompt, without the end of the reply's turn.

    Empty if the template takes a single exchange only.
    """
    try:
        _, _, later = render("user", _REPLY, _PROMPT, open=False).rpartition(_REPLY)
    except CalibrationError:
        return ""
    header, found, _ = later.partition(_BEGIN)
    return header.removeprefix(closing) if found else ""


def find_system(render: Render, head: str) -> tuple[bool, str | None]:
    """Whether a template shows a system text, and its default one.

    Args:
        render: Renders with :data:`SYSTEM_MARKER` as the system text.
        head: Text before the prompt without a system text.

    Returns:
        Whether the system text is shown; the template's default, ``None`` if there is none.

    Raises:
        CalibrationError: The template fails on a system text.
    """
    before, found, rest = render(_PROMPT, open=True).partition(SYSTEM_MARKER)
    after, prompt_follows, _ = rest.partition(_BEGIN)
    own = head[len(before) : len(head) - len(after)]
    return bool(found), own if found and prompt_follows and own and before + own + after == head else None


def compare(turns: Turns) -> Difference | None:
    """How the generation prompt differs from the text before a reply, ``None`` if it does not."""
    before, generation = turns.before_reply, turns.generation
    if open_thought(generation) is not None:
        return Difference("an open thinking block, in which a reply would be scored as a thought")
    if before == generation:
        if turns.head == turns.finished_head:
            return None
        # Mistral's templates show a system text only while the prompt is the last turn, as in generation
        return Difference("another text before the prompt than a finished conversation has", refused=False)
    if without_thoughts(before) == without_thoughts(generation):
        if before.rstrip() == generation.rstrip():
            return Difference("other white space at its end", refused=False, white_space=True)
        if not turns.ends_thought:
            return Difference("none of the thinking block that a reply without a thought has", missing_thought=True)
        return Difference("an ended thinking block that a finished conversation does not show like that", refused=False)
    if generation == turns.pending:
        return Difference("no generation prompt, although a reply has a header (add_generation_prompt changes nothing)")
    if before.startswith(generation):
        return Difference("only the first part of what stands before a reply")
    return Difference("another text than stands before a reply")


def completions(turns: Turns) -> list[str]:
    """Texts that may be missing at the end of the generation prompt."""
    texts = []
    if turns.before_reply.startswith(turns.generation) and turns.before_reply != turns.generation:
        texts.append(turns.before_reply[len(turns.generation) :])
    tag = open_thought(turns.generation)
    if tag is not None and "|" not in tag:
        texts.append(f"\n{tag[0]}/{tag[1:]}\n\n")
    return texts


def open_thought(text: str) -> str | None:
    """The last tag around thoughts in ``text`` if it opens one."""
    tags = list(THOUGHT_TAG.finditer(text))
    return tags[-1][0] if tags and not closes_thought(tags[-1]) else None


def begins_thought(text: str) -> bool:
    """Whether ``text`` begins with a tag that opens a thought."""
    tag = THOUGHT_TAG.match(text.lstrip())
    return tag is not None and not closes_thought(tag)


def is_thought_tag(token: str) -> bool:
    """Whether ``token`` is a tag around thoughts, which a reply may contain, unlike the ends of turns."""
    return THOUGHT_TAG.fullmatch(token) is not None


def without_thoughts(text: str) -> str:
    """``text`` without its ended thinking blocks and without white space at its end."""
    kept, done, opened = "", 0, None
    for tag in THOUGHT_TAG.finditer(text):
        if not closes_thought(tag):
            opened = tag.start() if opened is None else opened
            continue
        kept += text[done : tag.start() if opened is None else opened]
        done, opened = tag.end(), None
    return (kept + text[done:]).rstrip()


def quoted(text: str) -> str:
    """A template's text for a message: marker words by name, long texts without their middle."""
    text = text.replace(_PROMPT, "{prompt}").replace(_REPLY, "{reply}")
    return repr(text if len(text) <= 240 else f"{text[:80]} … {text[-150:]}")


def quoted_after_prompt(text: str, *, reply: bool = False) -> str:
    """As :func:`quoted`, with the prompt before the text."""
    return quoted(_PROMPT + text + (_REPLY if reply else ""))


def closes_thought(tag: re.Match[str]) -> bool:
    """Whether a match of :data:`THOUGHT_TAG` ends a thought."""
    return bool(tag["close"] or tag["channel"])


def _around_prompt(text: str) -> tuple[str, str]:
    """Text before and after the prompt, which must be there once and unchanged."""
    begins, ends = text.count(_BEGIN), text.count(_END)
    if not begins and not ends:
        what = "changes its case" if _BEGIN.lower() in text.lower() else "drops it"
    elif max(begins, ends) > 1:
        what = "repeats it"
    elif begins != ends:
        what = "cuts it"
    else:
        head, _, rest = text.partition(_BEGIN)
        middle, _, after = rest.partition(_END)
        # several templates trim the prompt or fold its line breaks, in generation and in conversations alike
        if middle.split() == _MIDDLE.split():
            return head, after
        what = "changes its text"
    raise _unfit("shows the prompt once and as it is", what, text)


def _refuse_parts(render: Render) -> None:
    """Raise if the template takes content as a list of parts, as those of vision models do."""
    content: Any = [{"type": "text", "text": _PROMPT}]
    try:
        text = render(content, open=True)
    except CalibrationError:
        return
    if _PROMPT in text and "'type'" not in text:  # else it printed the list itself
        raise CalibrationError(
            "chat template: expected one that takes content as text, got one that takes a list of parts; set "
            "tokenizer.chat_template to one for text alone"
        )


def _unfit(expected: str, what: str, text: str) -> CalibrationError:
    return CalibrationError(
        f"chat template: expected one that {expected}, got one that {what}; it gives {quoted(text)}. Set "
        f"tokenizer.chat_template to another one, or use {setting('format', 'raw')}"
    )
