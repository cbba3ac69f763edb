"""What a chat template writes around the turns before a prompt, checked once for each shape of a conversation.

Templates treat a conversation otherwise than a single prompt: some move the system text, take thoughts out of earlier
replies, or keep the last turn only. So the text around earlier turns is found by rendering marker words, as it is for a
single prompt, and a row that the template then renders otherwise is refused.

In: a renderer and the text around a single exchange. Out: the text of a conversation up to its next reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastprune.calibration.conversations import Turns as History
from fastprune.calibration.conversations import check_history
from fastprune.calibration.template_render import Renderer
from fastprune.calibration.template_turns import SYSTEM_MARKER, Turns, find_turns, quoted
from fastprune.errors import CalibrationError, setting, warn


@dataclass(frozen=True)
class _Shape:
    """The text around the turns of a conversation.

    Attributes:
        order: Index of the turns in the order in which they are shown.
        texts: The text before each of them, and that between the last one and the prompt.
    """

    order: tuple[int, ...]
    texts: tuple[str, ...]


class Histories:
    """The openings of conversations.

    Args:
        render: The template, with the system text of the caller, if any.
        turns: The text that it writes around a single exchange.
    """

    def __init__(self, render: Renderer, turns: Turns) -> None:
        self._render, self._turns = render, turns
        self._shapes: dict[tuple[bool, int], _Shape] = {}
        self._noted = False

    def opening(self, history: History, prompt: str, where: str) -> str:
        """Text of a conversation up to the content of the next reply.

        Args:
            history: The turns before the prompt.
            prompt: The last user turn.
            where: Name of the row in messages.

        Raises:
            CalibrationError: The turns are in no order, have a system text beside the caller's, or the template does
                not show them as they are.
        """
        check_history(history, f"{where}: history")
        with_system = history[0][0] == "system"
        if with_system and self._render.system is not None:
            raise CalibrationError(
                f"{where}: history: expected no system turn beside {setting('system')}, got one; leave one of the two "
                "out"
            )
        shape = self._shape(with_system, len(history) - with_system, where)
        contents = [text for _, text in history]
        render = replace(self._render, system=contents[0]) if with_system else self._render
        try:
            text = render(*contents[with_system:], prompt, open=True)
        except CalibrationError as error:  # what a template raises may quote a turn
            raise CalibrationError(
                f"{where}: the chat template failed on a conversation ({type(error.__cause__).__name__})"
            ) from None
        shown = [contents[index] for index in shape.order]
        if not _consists_of(text, [*shape.texts, self._turns.generation], [*shown, prompt]):
            raise CalibrationError(
                f"{where}: history: expected turns that the chat template shows as they are, got one that it changes "
                "by more than white space, takes out (a thought in an earlier reply?) or takes for an instruction to "
                "itself; change that turn, or leave the row out"
            )
        return text

    def _shape(self, with_system: bool, n_turns: int, where: str) -> _Shape:
        found = self._shapes.get((with_system, n_turns))
        if found is None:
            found = self._shapes[with_system, n_turns] = self._find(with_system, n_turns, where)
        return found

    def _find(self, with_system: bool, n_turns: int, where: str) -> _Shape:
        words = [f"FastpruneEarlierTurn{number}Ends" for number in range(n_turns)]
        render = replace(self._render, system=SYSTEM_MARKER) if with_system else self._render
        try:
            turns = find_turns(lambda *contents, open: render(*words, *contents, open=open))
        except CalibrationError as error:
            raise CalibrationError(f"{where}: history: {error}{_ways_out(with_system)}") from error
        markers = [SYSTEM_MARKER, *words] if with_system else words
        if with_system and not turns.head.count(SYSTEM_MARKER):
            raise CalibrationError(
                f"{where}: history: expected no system turn, which the chat template leaves out, got one"
                f"{_ways_out(with_system)}"
            )
        places = [turns.head.find(marker) for marker in markers]
        # a system text may be moved, as Mistral's templates do: they write it before the last prompt
        if any(turns.head.count(marker) != 1 for marker in markers) or places[with_system:] != sorted(
            places[with_system:]
        ):
            raise CalibrationError(
                f"{where}: history: expected a chat template that shows every earlier turn once and in order, got one "
                f"that does not; it gives {quoted(turns.head)}. Leave out rows with earlier turns"
            )
        self._compare(turns, where)
        order = sorted(range(len(markers)), key=places.__getitem__)
        texts, rest = [], turns.head
        for index in order:
            before, _, rest = rest.partition(markers[index])
            texts.append(before)
        return _Shape(tuple(order), (*texts, rest))

    def _compare(self, turns: Turns, where: str) -> None:
        """The text around the prompt and after the reply has to be that around a single prompt, which was checked."""
        single = self._turns
        for name in ("generation", "before_reply", "closing"):
            expected, got = getattr(single, name), getattr(turns, name)
            if expected != got:
                raise CalibrationError(
                    f"{where}: history: expected a chat template that writes the same text around a reply after "
                    f"earlier turns as after a single prompt, {quoted(expected)}, got {quoted(got)}; leave out rows "
                    "with earlier turns"
                )
        if turns.head != turns.finished_head and single.head == single.finished_head and not self._noted:
            self._noted = True
            warn(
                "chat template: in generation it writes another text before a prompt with earlier turns or a system "
                f"text than in a finished conversation: {quoted(turns.head)} and {quoted(turns.finished_head)}"
            )


def _ways_out(with_system: bool) -> str:
    beginning = "; write the system text at the beginning of the first user turn, or" if with_system else ";"
    return f"{beginning} leave out rows with earlier turns"


def _consists_of(text: str, around: Sequence[str], contents: Sequence[str]) -> bool:
    """Whether a text is ``around[0] contents[0] around[1] … around[-1]``, white space at and in contents apart."""
    if not text.startswith(around[0]):
        return False
    position = len(around[0])
    for number, (content, after) in enumerate(zip(contents, around[1:], strict=True), start=1):
        for index, word in enumerate(content.split()):
            start = _after_space(text, position)
            if not text.startswith(word, start) or (index and start == position):
                return False
            position = start + len(word)
        last = number == len(contents)
        starts = range(position, _after_space(text, position) + 1)
        found = (
            start for start in starts if text.startswith(after, start) and (not last or start + len(after) == len(text))
        )
        start = next(found, -1)
        if start < 0:
            return False
        position = start + len(after)
    return True


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
