"""Whether a template's generation prompt ends where a reply begins, and how to fix one that does not.

A reply is scored after the generation prompt, as in generation. If a finished conversation has another text before a
reply, the model was not trained to begin replies there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from fastprune.calibration.template_render import Renderer
from fastprune.calibration.template_source import TemplateSource
from fastprune.calibration.template_turns import Difference, Turns, compare, completions, quoted, quoted_after_prompt
from fastprune.calibration.tokens import encode
from fastprune.errors import CalibrationError, setting, warn

# Variables by which a template may be told not to think, and the values that tell it so.
_SWITCH = re.compile("think|reason", re.IGNORECASE)
_OFF = (False, 0, "none", "off")


def check_generation_prompt(turns: Turns, render: Renderer, source: TemplateSource) -> None:
    """Compare the generation prompt with the text before a reply; refuse a difference, or warn of a harmless one.

    Raises:
        CalibrationError: Scoring after the generation prompt would be another experiment. The message shows both texts
            and fixes that were tried out.

    Warns:
        FastpruneWarning: The two differ harmlessly.
    """
    switches = sorted(name for name in source.arguments if _SWITCH.search(name))
    thinks = any(render.arguments.get(name) not in (None, *_OFF) for name in switches)
    difference = compare(turns)
    if difference is None or not difference.refused:
        difference = _thinks_by_default(turns, render, [] if thinks else switches) or difference
    if difference is None or (difference.white_space and _same_tokens(turns, render.tokenizer)):
        return
    message = (
        f"chat template: expected a generation prompt that ends where a reply begins, got {difference.what}: "
        f"it writes {quoted_after_prompt(turns.generation)}, "
        f"and a finished conversation has {quoted_after_prompt(turns.before_reply, reply=True)}"
    )
    if turns.head != turns.finished_head:
        message += f", after {quoted(turns.head)} and {quoted(turns.finished_head)}"
    if difference.missing_thought and thinks:
        message += "; responses have to hold their thoughts themselves"
    elif difference.refused:
        ways = [*_argument_fixes(render, switches, difference, thinks), *_addition_fixes(turns, render, difference)]
        raise CalibrationError(
            f"{message}. Way out: {'; or '.join(ways or ['set tokenizer.chat_template to another'])}"
        )
    elif difference.white_space:
        message += "; a response has to begin with white space where its first token has it"
    warn(message)


def _thinks_by_default(turns: Turns, render: Renderer, switches: list[str]) -> Difference | None:
    """The difference if a switch that was not given would have put an ended thinking block before the reply."""
    for name in switches:
        switched = render.variant(arguments={name: False})
        if switched is not None and switched.ends_thought and not turns.ends_thought:
            return Difference("one after which the model thinks first unless told otherwise", missing_thought=True)
    return None


def _argument_fixes(render: Renderer, switches: list[str], difference: Difference, thinks: bool) -> Iterator[str]:
    """Template arguments, tried out, with which a reply (without a thought, or with its own) fits the template."""
    for name in switches:
        for value in _OFF:
            turns = render.variant(arguments={name: value})
            if _fixes(turns, difference):
                yield f"pass {setting('template_args', render.arguments | {name: value})}"
                if difference.missing_thought and not thinks:
                    thinking = setting("template_args", render.arguments | {name: True})
                    yield f"{thinking} for responses that hold their thoughts"
                break


def _addition_fixes(turns: Turns, render: Renderer, difference: Difference) -> Iterator[str]:
    """An addition to the template, tried out, after which the generation prompt ends where a reply begins."""
    for text in completions(turns):
        addition = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(text, ensure_ascii=False)} }}}}{{% endif %}}"
        if _fixes(render.variant(addition=addition), difference):
            yield f"add {addition} to the end of the last line of the chat template"
            return


def _fixes(turns: Turns | None, difference: Difference) -> bool:
    """Whether nothing is refused with these turns, and a thinking block that was missing is present."""
    if turns is None or (difference.missing_thought and not turns.ends_thought):
        return False
    remaining = compare(turns)
    return remaining is None or not remaining.refused


def _same_tokens(turns: Turns, tokenizer: Any) -> bool:
    """Whether both texts give the same tokens: many tokenizers add a space before a text themselves."""
    begin, reply = turns.head + "user", "Reply"
    apart = encode(tokenizer, begin + turns.generation) + encode(tokenizer, reply)
    return apart == encode(tokenizer, begin + turns.before_reply + reply)
