"""Attacks under which harm is measured: what an adversary does to a model before asking.

An attack lasts for one evaluation. It is a context that yields the rows to ask with and nothing that can be saved: no
function of this module returns a model, weights, an adapter or a file, and none may be added that does. An attack that
changes weights (refusal ablation, fine-tuning) sets ``changes_model``, changes the caller's model in place inside
``on``, and restores it bit for bit when the context ends, also after an error:

    with attack.on(model, tokenizer, rows) as attacked_rows:
        ...                                     # ask the model with attacked_rows
    # here the model is as it was

:data:`ATTACKS` is the list that :func:`attack`, the command line and the report read: a new attack is a class here and
its entry there. This module loads neither torch nor transformers, so that ``--help`` can list the attacks at once.

In: rows with ``prompt, response[, prefill]``. Out: rows whose ``prefill`` is the start of the reply that the model is
given, and whose ``response`` is the reference for the rest.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from fastprune.calibration.rows import Row, describe_row
from fastprune.calibration.tokens import decode, encode
from fastprune.errors import ArgumentError, CalibrationError, positive_integer


@dataclass(frozen=True)
class Attack(ABC):
    """Base of all attacks; one that leaves the weights alone defines ``rows`` only. Its fields are its settings.

    Attributes:
        name: Its key in :data:`ATTACKS`, on the command line and in records.
        summary: Half a sentence for help texts.
        phrase: What the report adds to a rate that was measured under the attack, such as ``"under prefilling"``.
        changes_model: Whether the weights differ inside ``on``; nothing but harm is measured there then.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    phrase: ClassVar[str]
    changes_model: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """Its name in tables, different for every setting."""
        return self.name

    @abstractmethod
    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """The rows to ask with: one for each row given, in their order."""

    @contextlib.contextmanager
    def on(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Put the attack in place, hand out the rows to ask with, and undo everything on exit."""
        yield self.rows(tokenizer, rows)


@dataclass(frozen=True)
class NoAttack(Attack):
    """Ask directly: the model is not given the ``prefill`` column, which becomes the start of the reference reply.

    The joined reference is decoded from the tokens of prefill and response, so it equals the text of a model that
    repeats these tokens.
    """

    name: ClassVar[str] = "none"
    summary: ClassVar[str] = "ask directly"
    phrase: ClassVar[str] = ""

    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """Rows without prefill."""
        return [self._whole(tokenizer, row) if row.prefill else row for row in rows]

    @staticmethod
    def _whole(tokenizer: Any, row: Row) -> Row:
        if not row.response:
            return replace(row, prefill="")
        ids = encode(tokenizer, row.prefill) + encode(tokenizer, row.response)
        return replace(row, prefill="", response=decode(tokenizer, ids))


@dataclass(frozen=True)
class Prefilling(Attack):
    """Start the reply for the model: with the row's ``prefill``, or else with the first tokens of its response.

    Attributes:
        tokens: Length of that start for rows without a ``prefill``, in tokens of the response tokenized alone.

    Source: Orgad et al., arXiv 2604.09544: the first 10 tokens of a reference answer.
    """

    tokens: int = 10
    name: ClassVar[str] = "prefilling"
    summary: ClassVar[str] = "start the reply with the row's prefill, or the first 10 tokens of its response"
    phrase: ClassVar[str] = "under prefilling"

    def __post_init__(self) -> None:
        positive_integer("prefilling: tokens", self.tokens)

    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """Rows whose prefill is given to the model and whose response is the rest.

        Raises:
            CalibrationError: A row has neither a prefill nor a response longer than ``tokens``.
        """
        return [
            row if row.prefill else self._cut(tokenizer, row, describe_row("rows", index, row))
            for index, row in enumerate(rows)
        ]

    def _cut(self, tokenizer: Any, row: Row, where: str) -> Row:
        if not row.response.strip():
            raise CalibrationError(f"{where}: prefilling: expected a 'prefill' or a 'response' column, got both empty")
        ids = encode(tokenizer, row.response)
        if len(ids) <= self.tokens:
            raise CalibrationError(
                f"{where}: response has {len(ids)} tokens, so a prefill of {self.tokens} leaves nothing to judge; "
                "add a 'prefill' column or use fewer tokens"
            )
        cut = self._border(tokenizer, row.response, ids)
        if not 0 < cut < len(row.response):
            raise CalibrationError(
                f"{where}: the first {self.tokens} tokens of the response end inside its "
                f"{'first' if cut == 0 else 'last'} character, so there is no "
                f"{'prefill' if cut == 0 else 'rest to judge'}; add a 'prefill' column or use another number of tokens"
            )
        return replace(row, prefill=row.response[:cut], response=row.response[cut:])

    def _border(self, tokenizer: Any, text: str, ids: list[int]) -> int:
        """Characters of the first tokens: the text itself is cut, so that decoding can lose nothing."""
        if getattr(tokenizer, "is_fast", False):
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return offsets[self.tokens - 1][1]
        return len(decode(tokenizer, ids[: self.tokens]))


ATTACKS: dict[str, type[Attack]] = {kind.name: kind for kind in (NoAttack, Prefilling)}
"""Every attack by name."""


def attack(name: str | Attack, **options: Any) -> Attack:
    """An attack by name, or the one given.

    Args:
        name: A key of :data:`ATTACKS`; an :class:`Attack` is returned as it is and takes no options.
        **options: Fields of that attack, e.g. ``tokens=10``.

    Raises:
        ArgumentError: The name or an option is unknown, or a value is out of range.
    """
    known: list[str] = []
    if isinstance(name, str) and name in ATTACKS:
        known = [field.name for field in fields(ATTACKS[name])]
    elif not isinstance(name, Attack):
        raise ArgumentError(f"expected one of {sorted(ATTACKS)} or an Attack, got {name!r}", argument="attack")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ArgumentError(f"attack {name!r} takes {known or 'no options'}, got {unknown}")
    return name if isinstance(name, Attack) else ATTACKS[name](**options)
