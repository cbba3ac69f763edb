"""One record of a table, as its layout reads it, to the checked values of a row.

In: a mapping with the columns of a file. Out: the fields of a :class:`fastprune.calibration.Row` by name. Messages name
the column and the place of the record, and never a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.calibration import cells
from fastprune.calibration.conversations import Turns, check_history, is_turns, only_reply, parse_turns, split
from fastprune.calibration.layouts import Layout
from fastprune.errors import CalibrationError, setting

GENERATE = "leave such rows out, or let the model write responses with `fastprune generate`"


def row_values(
    record: Mapping[str, Any], where: str, layout: Layout, *, blank: bool, references: bool
) -> dict[str, Any]:
    """The fields of a row.

    Args:
        record: The record.
        where: Its place, for messages.
        layout: Which columns are which fields.
        blank: Whether an empty text means no value where one may be absent.
        references: Whether it has to have a response.

    Raises:
        CalibrationError: A column is missing, or a value is not what it has to be.
    """
    found = _Record(record, where, layout, blank)
    unused = {key: value for key, value in record.items() if key not in layout.used}
    history, prompt, response = found.exchange(references)
    prefill = found.value("prefill")
    return {
        "prompt": prompt,
        "response": response,
        "prefill": "" if prefill is None else cells.text(prefill, found.column("prefill"), where),
        "category": cells.name(found.value("category"), "category", found.column("category"), where),
        "id": cells.name(found.value("id"), "id", found.column("id"), where),
        "finish": cells.finish(found.value("finish"), found.column("finish"), where),
        "history": history,
        "extra": {key: value for key, value in unused.items() if not (blank and value == "")},
    }


class _Record:
    """A record, read by field."""

    def __init__(self, record: Mapping[str, Any], where: str, layout: Layout, blank: bool) -> None:
        self._record, self._where, self._layout, self._blank = record, where, layout, blank

    def column(self, field: str) -> str:
        """The column of a field, as messages name it."""
        return self._layout.needed if field == "prompt" else self._layout.sources.get(field, (field,))[0]

    def place(self, field: str) -> str:
        return f"{self._where}: {self.column(field)}"

    def value(self, field: str) -> Any:
        """The value of an optional field, ``None`` where it is absent."""
        value = self._record.get(self.column(field)) if field in self._layout.sources else None
        return None if self._missing(value) else value

    def exchange(self, references: bool) -> tuple[Turns, str, str]:
        """What came before the prompt, the prompt, and the response (``""`` without one)."""
        value = self._present("prompt")
        own = self._history()
        if not self._layout.conversation and not is_turns(value):
            return own, self._prompt(value), self._response(references)
        history, prompt, reply = split(parse_turns(value, self.column("prompt"), self._where), self.place("prompt"))
        if history and own:
            raise CalibrationError(f"{self.place('history')}: expected none beside the turns of the prompt, got some")
        if self._layout.conversation:
            if reply is None and references:
                raise CalibrationError(
                    f"{self.place('prompt')}: expected a conversation that ends in a reply, got one that ends in a "
                    f"user's turn; {GENERATE}"
                )
            return history or own, prompt, reply or ""
        if reply is not None:
            raise CalibrationError(f"{self.place('prompt')}: expected turns that end in a user's, got a reply last")
        return history or own, prompt, self._response(references)

    def _prompt(self, value: Any) -> str:
        """The prompt, with the texts that stand before or after it where these are not empty."""
        parts = []
        for column in self._layout.sources["prompt"]:
            part = value if column == self._layout.needed else self._record.get(column)
            if column == self._layout.needed or not cells.absent(part):
                parts.append((column, cells.text(part, column, self._where)))
        texts = [part for column, part in parts if column == self._layout.needed or part.strip()]
        return self._layout.joint.join(texts)

    def _response(self, references: bool) -> str:
        if "response" not in self._layout.sources:
            return ""
        if not references and self._missing(self._record.get(self.column("response"))):
            return ""
        value = self._present("response")
        if is_turns(value):
            return only_reply(parse_turns(value, self.column("response"), self._where), self.place("response"))
        if not isinstance(value, str):
            other = f"or name another column with {setting('columns', {'response': 'COLUMN'})} (None: no responses)"
            raise CalibrationError(
                f"{self.place('response')}: expected a string, got {type(value).__name__}; "
                f"{GENERATE if cells.absent(value) else f'leave such rows out, {other}'}"
            )
        return cells.text(value, self.column("response"), self._where)

    def _history(self) -> Turns:
        value = self.value("history")
        turns = () if value is None else parse_turns(value, self.column("history"), self._where)
        check_history(turns, self.place("history"))
        return turns

    def _present(self, field: str) -> Any:
        column = self.column(field)
        if column not in self._record:
            raise CalibrationError(f"{self._where}: expected the column {column}, got {cells.shown(self._record)}")
        return self._record[column]

    def _missing(self, value: Any) -> bool:
        return cells.absent(value) or (self._blank and isinstance(value, str) and not value)
