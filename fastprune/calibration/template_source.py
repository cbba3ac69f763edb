"""The text of a chat template: the variables, the clock and the randomness that it uses.

In: a tokenizer's Jinja text. Out: the same text with its clock stopped, and the names that it reads. Nothing is
rendered here.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastprune.errors import ArgumentError, CalibrationError, setting

FROZEN_DATE = datetime.date(2024, 7, 26)
"""The date, at midnight, that every template gets from its clock.

With the real date the same rows would give other tokens, hashes and masks every day. The templates of Llama 3.1 and 3.2
fall back to this date without a clock, so the most common models that use the date have seen it.
"""

# Output of `strftime` for FROZEN_DATE, in English whatever the locale of the process. Written out because transformers
# passes only plain data to a template, neither functions nor date objects.
_DIRECTIVES = {
    **{"a": "Fri", "A": "Friday", "b": "Jul", "B": "July", "h": "Jul", "p": "AM", "Z": "", "z": ""},
    **{"d": "26", "e": "26", "-d": "26", "-e": "26", "m": "07", "-m": "7", "y": "24", "-y": "24", "Y": "2024"},
    **{"C": "20", "g": "24", "G": "2024", "j": "208", "-j": "208", "u": "5", "w": "5", "U": "29", "V": "30", "W": "30"},
    **{"H": "00", "-H": "0", "k": " 0", "I": "12", "-I": "12", "l": "12", "M": "00", "-M": "0", "S": "00", "-S": "0"},
    **{"f": "000000", "s": "1721952000", "n": "\n", "t": "\t"},
    **{"F": "2024-07-26", "D": "07/26/24", "x": "07/26/24", "T": "00:00:00", "X": "00:00:00", "R": "00:00"},
    **{"r": "12:00:00 AM", "c": "Fri Jul 26 00:00:00 2024"},
}

# A macro hides the global of its name, also inside other macros. `trim_blocks` removes the line break after it, so the
# template's own first characters are unchanged.
_FROZEN_CLOCK = (
    f"{{% macro strftime_now(format) %}}{{% set written = {json.dumps(_DIRECTIVES)} %}}"
    "{% for text in format.split('%%') %}{{ '' if loop.first else '%' }}"
    "{% for piece in text.split('%') %}{% set n = 2 if piece[:1] == '-' else 1 %}"
    "{{ piece if loop.first else written.get(piece[:n], '%' ~ piece[:n]) ~ piece[n:] }}"
    "{% endfor %}{% endfor %}{% endmacro %}\n"
)

# Names set by fastprune, by transformers or by Jinja, which `template_args` may not set.
_RESERVED = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "continue_final_message"}
    | {"conversation", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"}
    | {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}
    | {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}
    | {"raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace"}
    | {"loop", "self", "caller", "varargs", "kwargs"}
)


class TemplateSource:
    """A chat template's text, read once.

    Attributes:
        text: The text as given.
        frozen: The text to render: ``text``, with its clock stopped at :data:`FROZEN_DATE` if it reads one.
        reads_clock: Whether it uses ``strftime_now``, the only clock that transformers gives a template.
        arguments: Names that it reads and that ``template_args`` may set.
        sha256: SHA-256 of ``text`` as UTF-8.

    Raises:
        CalibrationError: The text is not a template, or it draws at random.
    """

    def __init__(self, text: str) -> None:
        # As transformers makes it, but without globals, so that every name from outside is found.
        environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
        environment.globals.clear()
        try:
            tree = environment.parse(text)
            names = meta.find_undeclared_variables(tree)
        except Exception as error:  # whatever a foreign template raises is a fact about the data
            raise template_error(error) from error
        _refuse_randomness(tree, names)
        self.text = text
        self.reads_clock = "strftime_now" in names
        self.frozen = _FROZEN_CLOCK + text if self.reads_clock else text
        self.arguments = frozenset(names - _RESERVED)
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()

    def check_arguments(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """``template_args`` as plain JSON data.

        Raises:
            ArgumentError: ``given`` is not a mapping, a name is reserved or not read by the template, or a value is not
                JSON.
        """
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise ArgumentError(
                f"expected a mapping of names to values, got {type(given).__name__}", argument="template_args"
            )
        return {name: self._check_argument(name, value) for name, value in given.items()}

    def _check_argument(self, name: Any, value: Any) -> Any:
        if name in _RESERVED:
            raise ArgumentError(
                f"expected {_listed(self.arguments)}, got {name!r}, which is set by fastprune or by "
                f"transformers; leave it out (a system text is given as {setting('system')})",
                argument="template_args",
            )
        if name not in self.arguments:
            near = difflib.get_close_matches(str(name), self.arguments, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "; leave it out"
            raise ArgumentError(
                f"expected {_listed(self.arguments)}, got {name!r}, which the chat template does not read{hint}",
                argument="template_args",
            )
        if isinstance(value, str) and value.strip().lower() in ("true", "false", "none", "null"):
            # in a template every text that is not empty is true
            raise ArgumentError(
                f"template_args[{name!r}]: expected a JSON value, got the text {value!r}; pass True, False or None"
            )
        try:
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"template_args[{name!r}]: expected a JSON value, got {value!r}") from error


def template_error(error: Exception) -> CalibrationError:
    """The error for a template that cannot be read or rendered."""
    return CalibrationError(f"the tokenizer's chat template failed ({type(error).__name__}: {error})")


class _Generation(Extension):
    """Parses ``{% generation %}``, which marks the reply for training, as the text inside it."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]  # jinja2 reads it from the class, annotated or not

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse_randomness(tree: nodes.Template, names: Collection[str]) -> None:
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    # `map` takes the name of a filter as a string
    by_name = "map" in filters and any(node.value == "random" for node in tree.find_all(nodes.Const))
    draw = "random" if "random" in filters or by_name else "lipsum" if "lipsum" in names else None
    if draw is not None:
        raise CalibrationError(
            "chat template: expected one that gives the same text each time, got one that draws at random "
            f"({draw!r}); set tokenizer.chat_template to a copy with one of the choices written out"
        )


def _listed(names: Collection[str]) -> str:
    return f"one of {sorted(names)}" if names else "no name, since the chat template reads no variable"
