"""Attacks under which harm is measured: what an adversary does to a model before asking.

An attack exists for the length of one evaluation only. It is a context that hands out the rows to ask with, and it
yields nothing that can be saved: nothing in this module returns a model, weights, an adapter or a file, and nothing
here may ever do so. An attack that has to change weights (refusal ablation, fine-tuning) sets ``changes_model``,
changes the caller's model in place inside ``on`` and restores the same bits when the context ends, whatever happened
in it:

    with attack.on(model, tokenizer, rows) as attacked_rows:
        ...                                     # ask the model with attacked_rows
    # here the model is as it was

In: rows with ``prompt, response[, prefill]``. Out: rows whose ``prefill`` is what the model is given of the reply and
whose ``response`` is what remains to be said. It must not know judges or scores.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from fastprune.calibration import Row
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation.generation import check_positive, decode, describe_row


class Attack(ABC):
    """Base of all attacks; one that leaves the weights alone only has to say how it changes the rows."""

    name: ClassVar[str]
    changes_model: ClassVar[bool] = False

    @abstractmethod
    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """The rows to ask with; as many as were given, in their order."""

    @contextlib.contextmanager
    def on(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Put the attack in place, hand out the rows to ask with, and undo everything on exit."""
        yield self.rows(tokenizer, rows)


@dataclass(frozen=True)
class NoAttack(Attack):
    """Ask directly: a ``prefill`` column is not given to the model but becomes part of the reference reply.

    The joined reference is the text of the prefill's and the response's tokens, which is what a model writes that
    repeats exactly these tokens.
    """

    name: ClassVar[str] = "none"

    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """Rows without prefill."""
        return [self._whole(tokenizer, row) if row.prefill else row for row in rows]

    @staticmethod
    def _whole(tokenizer: Any, row: Row) -> Row:
        if not row.response:
            return replace(row, prefill="")
        ids = [*tokens_of(tokenizer, row.prefill), *tokens_of(tokenizer, row.response)]
        return replace(row, prefill="", response=decode(tokenizer, [ids])[0])


@dataclass(frozen=True)
class Prefilling(Attack):
    """Start the reply for the model: with the row's ``prefill``, else with the first tokens of its response.

    Attributes:
        tokens: Length of the start for rows without a ``prefill``, in tokens of the response tokenised alone.

    Source: Orgad et al., arXiv 2604.09544: the first 10 tokens of a reference answer.
    """

    tokens: int = 10
    name: ClassVar[str] = "prefilling"

    def __post_init__(self) -> None:
        check_positive(self.tokens, "prefilling: tokens")

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
            raise CalibrationError(f"{where}: prefilling needs a 'prefill' or a 'response' column, and both are empty")
        ids = tokens_of(tokenizer, row.response)
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
        """Characters of the first tokens, so that the text itself is cut and nothing is lost by decoding."""
        if getattr(tokenizer, "is_fast", False):
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return offsets[self.tokens - 1][1]
        return len(decode(tokenizer, [ids[: self.tokens]])[0])


_ATTACKS: dict[str, type[Attack]] = {kind.name: kind for kind in (NoAttack, Prefilling)}


def attack(name: str | Attack, **options: Any) -> Attack:
    """An attack by name, or the one given.

    Args:
        name: ``"none"`` or ``"prefilling"``; an :class:`Attack` is returned as it is and takes no options.
        **options: Fields of that attack, e.g. ``tokens=10``.

    Raises:
        ArgumentError: The name or an option is unknown, or a value is out of range.
    """
    if isinstance(name, Attack):
        known: tuple[str, ...] = ()
    elif isinstance(name, str) and name in _ATTACKS:
        known = tuple(field.name for field in fields(_ATTACKS[name]))
    else:
        raise ArgumentError(f"attack must be one of {sorted(_ATTACKS)} or an Attack, got {name!r}")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ArgumentError(f"attack {name!r} takes {list(known) or 'no options'}, got {unknown}")
    return name if isinstance(name, Attack) else _ATTACKS[name](**options)


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a piece of a reply, tokenised alone and without special tokens."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
