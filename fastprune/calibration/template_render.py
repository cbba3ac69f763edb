"""Rendering a chat template: turns in, text out.

Everything that a foreign template raises becomes a CalibrationError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastprune.calibration.template_source import template_error
from fastprune.calibration.template_turns import Turns, find_turns
from fastprune.errors import CalibrationError, setting


@dataclass(frozen=True)
class Renderer:
    """A template with its tokenizer, variables and system text; call it with the contents of the turns."""

    tokenizer: Any
    text: str
    arguments: dict[str, Any]
    system: str | None

    def __call__(self, *contents: Any, open: bool) -> str:
        """Text of a conversation: contents of user and assistant in turn; ``open`` adds the generation prompt."""
        turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
        if self.system is not None:
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            # as text: the ids of tokenize=True could not be joined with those of prefill and response
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.text, tokenize=False, add_generation_prompt=open, **self.arguments
            )
        except Exception as error:  # whatever a foreign template raises is a fact about the data
            raise template_error(error) from error

    def variant(self, *, arguments: Mapping[str, Any] | None = None, addition: str = "") -> Turns | None:
        """The turns with other arguments or with an addition to the text; ``None`` if the template fails then."""
        text = self.text.rstrip("\n") + addition if addition else self.text
        try:
            return find_turns(replace(self, text=text, arguments=self.arguments | dict(arguments or {})))
        except CalibrationError:
            return None


def template_text(tokenizer: Any) -> str:
    """The tokenizer's template, the one named 'default' if there are several.

    Raises:
        CalibrationError: There is none, or several without a default.
    """
    templates = getattr(tokenizer, "chat_template", None)
    if templates is None:
        raise CalibrationError(
            f"{setting('format', 'chat')} needs a chat template and this {type(tokenizer).__name__} has none; "
            f"use {setting('format', 'raw')} or set tokenizer.chat_template"
        )
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise CalibrationError(
            f"chat template: expected one, or several with one named 'default', got {sorted(templates)}; "
            "set tokenizer.chat_template to one of them"
        ) from error
