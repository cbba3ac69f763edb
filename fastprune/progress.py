"""How far long work is: a bar on a terminal, and elsewhere (a log, a batch job) a line a minute.

In: a total and steps. Out: text on standard error, and nothing where none is wanted. It must not know what the work is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

_EVERY = 60.0  # seconds between lines


class Progress:
    """Progress of one piece of work; a context.

    Args:
        total: Number of steps.
        what: What is done, for people.
        unit: What a step is, in the singular.
        show: Whether to show anything.
        stream: Where to; standard error by default.
        clock: Seconds from any beginning.
    """

    def __init__(
        self,
        total: int,
        what: str,
        unit: str,
        show: bool,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._total, self._what, self._unit, self._clock = total, what, unit, clock
        self._done, self._shown, self._note = 0.0, 0, ""
        self._bar: tqdm | None = None
        self._lines: TextIO | None = None
        if show and stream.isatty():
            self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, file=stream)
        elif show:
            self._lines = stream
        self._begin = self._last = clock()

    def advance(self, steps: float = 1) -> None:
        """So many steps more are done; parts of steps add up."""
        self._done = min(self._done + steps, float(self._total))
        if self._bar is not None:
            # added up, tenths fall a little short of the whole
            self._bar.update(int(self._done + 1e-6) - self._shown)
            self._shown = int(self._done + 1e-6)
        elif self._lines is not None and self._clock() - self._last >= _EVERY:
            self._last = self._clock()
            print(self._line(), file=self._lines, flush=True)

    def note(self, text: str) -> None:
        """What is being done now, behind the numbers."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each of them a step."""
        for item in items:
            yield item
            self.advance()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _line(self) -> str:
        passed = self._clock() - self._begin
        parts = [f"{self._what}: {int(self._done + 1e-6)} of {self._total} {self._unit}s", f"{duration(passed)} so far"]
        if self._done:
            parts.append(f"about {duration(passed / self._done * (self._total - self._done))} left")
        return ", ".join([*parts, self._note] if self._note else parts)


def announce(text: str) -> None:
    """A line on standard error, before work that takes long."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """``"40 s"``, ``"3 min"`` or ``"2 h 5 min"``: as exact as people plan with."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
