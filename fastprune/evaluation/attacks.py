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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from fastprune.calibration.rows import Row, describe_row
from fastprune.calibration.tokens import decode, encode
from fastprune.errors import ArgumentError, CalibrationError, positive_integer, setting, warn


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
        """Its name in tables, different for settings that are compared with each other."""
        return self.name

    @property
    def facts(self) -> dict[str, Any]:
        """Name and settings, as JSON data for records and for the keys of answers."""
        return {"name": self.name, **asdict(self)}

    @abstractmethod
    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """The rows to ask with, in their order and with their ids; rows that the attack cannot use are left out."""

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
    """Start the reply for the model.

    One depth overstates what a mask removes: a model that no longer begins may go on where a little more was begun for
    it. So depths are compared, each of them the same for every row.

    Attributes:
        tokens: Length of the start for rows without a ``prefill``, in tokens of the response tokenized alone; used
            without a ``depth``, where rows with a ``prefill`` start with that.
        depth: ``"row"``: the row's own ``prefill``. A number: so many tokens of the reference reply (``prefill`` and
            ``response``), whatever of it is the row's own prefill. ``None``: as ``tokens`` says.

    Source: Orgad et al., arXiv 2604.09544: the first 10 tokens of a reference answer.
    """

    tokens: int = 10
    depth: int | str | None = None
    name: ClassVar[str] = "prefilling"
    summary: ClassVar[str] = "start the reply with the row's prefill, or the first 10 tokens of its response"
    phrase: ClassVar[str] = "under prefilling"

    def __post_init__(self) -> None:
        positive_integer("prefilling: tokens", self.tokens)
        if self.depth not in (None, "row"):
            positive_integer("prefilling: depth", self.depth)

    @property
    def label(self) -> str:
        """``"prefilling"``, ``"prefilling row"`` or ``"prefilling 20"``."""
        return self.name if self.depth is None else f"{self.name} {self.depth}"

    def rows(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        """Rows whose prefill is given to the model and whose response is the rest.

        Raises:
            CalibrationError: A row has neither a prefill nor a response longer than ``tokens``. At a ``depth``: no row
                has a prefill, or a reply that is longer.

        Warns:
            FastpruneWarning: Rows have no prefill, or too short a reply for the ``depth``, and are left out.
        """
        if self.depth is None:
            return [
                row if row.prefill else self._begun(tokenizer, row, describe_row("rows", index, row))
                for index, row in enumerate(rows)
            ]
        if self.depth == "row":
            chosen, lacking = [row for row in rows if row.prefill], "no prefill of their own"
        else:
            chosen, lacking = self._at_depth(tokenizer, rows), f"no more than {self.depth} tokens of a reply"
        if not chosen:
            raise CalibrationError(
                f"{self.label}: expected rows that can be asked at this depth, got {len(rows)} with {lacking}; add "
                f"longer responses, or see {setting('prefill_tokens')}"
            )
        if len(chosen) < len(rows):
            warn(f"{self.label}: left out {len(rows) - len(chosen)} of {len(rows)} rows, with {lacking}")
        return chosen

    def _begun(self, tokenizer: Any, row: Row, where: str) -> Row:
        """A row without a prefill, its response begun."""
        if not row.response.strip():
            raise CalibrationError(
                f"{where}: prefilling: expected a 'prefill' or a 'response' column, got both empty; add one, or ask "
                f"with {setting('attack', 'none')}"
            )
        length = len(encode(tokenizer, row.response))
        if length <= self.tokens:
            raise CalibrationError(
                f"{where}: response has {length} tokens, so a prefill of {self.tokens} leaves nothing to judge; "
                "add a 'prefill' column or use fewer tokens"
            )
        begun, rest = _split(tokenizer, row.response, self.tokens)
        if not begun or not rest:
            raise CalibrationError(
                f"{where}: the first {self.tokens} tokens of the response end inside its "
                f"{'last' if begun else 'first'} character, so there is no "
                f"{'rest to judge' if begun else 'prefill'}; add a 'prefill' column or use another number of tokens"
            )
        return replace(row, prefill=begun, response=rest)

    def _at_depth(self, tokenizer: Any, rows: Sequence[Row]) -> list[Row]:
        chosen = []
        for row in rows:
            # Joined as tokens: between two texts that are tokenized apart, a word tokenizer has a space.
            ids = encode(tokenizer, row.prefill) + encode(tokenizer, row.response)
            depth = int(self.depth or 0)
            while depth < len(ids) and decode(tokenizer, ids[:depth]).endswith("\ufffd"):
                depth += 1  # inside a character of several tokens
            begun, rest = decode(tokenizer, ids[:depth]), decode(tokenizer, ids[depth:])
            if begun and rest.strip():
                chosen.append(replace(row, prefill=begun, response=rest))
        return chosen


def _split(tokenizer: Any, text: str, tokens: int) -> tuple[str, str]:
    """A text behind its first tokens; all of it comes first if it has no more. Decoding could lose something."""
    ids = encode(tokenizer, text)
    if len(ids) <= tokens:
        return text, ""
    if tokens == 0:
        return "", text
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        border = offsets[tokens - 1][1]
    else:
        border = len(decode(tokenizer, ids[:tokens]))
    return text[:border], text[border:]


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


def attacks_of(
    given: str | Attack | Iterable[str | Attack], depths: Iterable[int | str] | None = None
) -> tuple[Attack, ...]:
    """Several attacks, each once.

    Args:
        given: Attacks, or names of them.
        depths: Depths at which ``"prefilling"`` is measured, each ``"row"`` or a number of tokens.

    Raises:
        ArgumentError: There is none, a name is unknown, or there are depths and no prefilling.
    """
    chosen = [attack(each) for each in ([given] if isinstance(given, str | Attack) else given)]
    if not chosen:
        raise ArgumentError("expected at least one, got none", argument="attack")
    if depths is not None:
        if Prefilling() not in chosen:
            raise ArgumentError(f"expected {setting('attack', 'prefilling')}, got none", argument="prefill_tokens")
        at = chosen.index(Prefilling())
        chosen[at : at + 1] = [Prefilling(depth=depth) for depth in depths]
    return tuple({each.label: each for each in chosen}.values())
