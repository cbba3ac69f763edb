"""Names from files reach a terminal escaped: they cannot move its cursor, color it or turn a line round."""

from __future__ import annotations

import io
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.reporting_record import make_record

from fastprune import PruneMask
from fastprune.cli.frame import show_warning
from fastprune.cli.processes import note, say
from fastprune.cli.wording import Wording
from fastprune.errors import FastpruneWarning, printable
from fastprune.reporting import terminal

HOSTILE = "a\x1b[31m\r\u202eb\u2066\x07\x9b2K"
SHOWN = r"a\x1b[31m\r\u202eb\u2066\x07\x9b2K"


def is_harmless(text: str) -> bool:
    """No control character but line breaks, and nothing that changes the order of what is shown."""
    turning = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
    return not any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in text) and turning.isdisjoint(text)


def test_what_is_escaped_and_what_stays() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("one\ntwo, naïve 日本語 👩‍👩‍👧 עברית 100 %") == "one\ntwo, naïve 日本語 👩‍👩‍👧 עברית 100 %"
    assert printable("\x00\t\x7f\u2028\udc80") == r"\x00\t\x7f\u2028\udc80"
    for code in range(0x3000):
        assert is_harmless(printable(chr(code)))


def test_errors_name_what_files_hold_escaped(tmp_path: Path, capfd, model: torch.nn.Module) -> None:
    """A parameter's name in the header of a mask."""
    model.save_pretrained(tmp_path / "model")
    mask = PruneMask({HOSTILE: torch.tensor([0])}, {HOSTILE: (2, 2)}).save(tmp_path / "mask.safetensors")
    capfd.readouterr()  # the bar of transformers
    assert run("patch", tmp_path / "model", mask, "--out", tmp_path / "out") == 1
    shown = capfd.readouterr().err
    assert SHOWN in shown.replace(r"\\", "\\") and is_harmless(shown)


def test_notes_and_results_are_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    note(HOSTILE)
    say(f"{HOSTILE}\nsecond line")
    show_warning(Wording(), FastpruneWarning(HOSTILE), FastpruneWarning)
    with warnings.catch_warnings():
        show_warning(Wording(), HOSTILE, UserWarning)
    shown = capfd.readouterr()
    assert shown.out == f"{SHOWN}\nsecond line\n"
    assert shown.err.count(SHOWN) == 3 and is_harmless(shown.err)


def test_tables_are_escaped() -> None:
    from rich.console import Console

    hostile = make_record()
    for row in hostile["results"]:
        row["model"] = row["model"] + HOSTILE if row["model"] == "sft" else row["model"]
    hostile["checks"][0]["claim"] = HOSTILE
    hostile["checks"][0]["holds"] = False
    console = Console(file=io.StringIO(), width=200, color_system=None)
    terminal.print_results(hostile, console, {HOSTILE: Path(HOSTILE)})
    assert is_harmless(console.file.getvalue())
