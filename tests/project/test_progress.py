"""A bar on a terminal, a line a minute elsewhere, and nothing where none is wanted."""

from __future__ import annotations

import io

import pytest
from support.generation import tiny_model, word_tokenizer

from fastprune.evaluation import generate
from fastprune.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_elsewhere_a_line_a_minute_says_what_is_done_and_left() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(40, "answering", "row", True, stream=out, clock=clock) as bar:
        for _ in range(40):
            clock.now += 25
            bar.advance()
    lines = out.getvalue().splitlines()
    assert lines[0] == "answering: 3 of 40 rows, 75 s so far, about 15 min left"
    assert lines[-1] == "answering: 39 of 40 rows, 16 min so far, about 25 s left"
    assert len(lines) == 13  # every 75 s: no step ends at 60


def test_short_work_says_nothing_elsewhere() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(3, "answering", "row", True, stream=out, clock=clock) as bar:
        for _ in bar.each(range(3)):
            clock.now += 19
    assert out.getvalue() == ""


def test_parts_of_steps_add_up_and_a_note_stands_behind_them() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(2, "scoring", "step", True, stream=out, clock=clock) as bar:
        bar.note("blocks 3-5")
        for _ in range(20):
            clock.now += 61
            bar.advance(0.1)
    lines = out.getvalue().splitlines()
    assert lines[4].startswith("scoring: 0 of 2 steps") and lines[9].startswith("scoring: 1 of 2 steps")
    assert lines[-1] == "scoring: 2 of 2 steps, 20 min so far, about 1 s left, blocks 3-5"


@pytest.mark.parametrize(("show", "stream"), [(False, Terminal()), (False, io.StringIO())])
def test_nothing_is_shown_where_none_is_wanted(show: bool, stream: io.StringIO) -> None:
    clock = Clock()
    with Progress(3, "answering", "row", show, stream=stream, clock=clock) as bar:
        for _ in bar.each(range(3)):
            clock.now += 100
    assert stream.getvalue() == ""


def test_a_terminal_has_a_bar_that_goes_away() -> None:
    out = Terminal()
    with Progress(4, "answering", "row", True, stream=out) as bar:
        for _ in range(40):
            bar.advance(0.1)
        bar.note("blocks 1-2")
        assert "answering" in out.getvalue() and "/4" in out.getvalue()
    assert out.getvalue().endswith("\r")


def test_generation_moves_it_in_the_middle_of_a_batch(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    clock = Clock()
    model = tiny_model()
    model.register_forward_pre_hook(lambda module, arguments: setattr(clock, "now", clock.now + 40))
    monkeypatch.setitem(Progress.__init__.__kwdefaults__, "clock", clock)
    generate(model, word_tokenizer(), ["w1", "w2 w3"], max_new_tokens=9, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("answering: ") and " of 2 rows" in line for line in lines)
    assert "0 of 2 rows" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (5400, "1 h 30 min")]
)
def test_durations_are_as_exact_as_people_plan_with(seconds: float, text: str) -> None:
    assert duration(seconds) == text
