"""What a folder of ``resume=`` holds is never lost: strangers' files, other versions, damaged lines."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.architectures import BENIGN, HARM, build

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ArgumentError, ArtifactError, FastpruneError, FastpruneWarning
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.journal import VERSION, Journal
from fastprune.scoring.processes import Processes

KEY = {"segments": 2, "data": "a"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def line(record: object) -> bytes:
    payload = json.dumps(record)
    return f"{hashlib.sha256(payload.encode()).hexdigest()[:32]} {payload}\n".encode()


def begun(folder: Path, segments: int = 0) -> list[bytes]:
    """The lines of a real journal with some finished segments."""
    journal, gradients = Journal(folder, KEY, Processes()), ActivationStore("disk", torch.device("cpu"), folder)
    for number in reversed(range(segments)):
        journal.note({"values": torch.ones(2)})
        journal.add_segment(number, gradients, None)
    journal.close()
    return (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)


STRANGERS = {
    "json": b'{"entry": "dear diary"}\n',
    "text": b"dear diary",
    "one line of hexadecimal": b"0123456789abcdef0123456789abcdef\n",
    "hash of something else": b"0123456789abcdef0123456789abcdef  ubuntu.iso",
    "binary": bytes(range(256)) * 8,
    "a line break": b"\n",
    "a record that does not start": line({"kind": "segment", "number": 1}),
    "a list with its hash": line([1, 2]),
    "a damaged first line": b"0" + line({"kind": "start", "version": VERSION, "key": KEY})[1:],
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("beside", [True, False])
def test_a_strangers_file_stays_as_it_is(name: str, beside: bool, tmp_path: Path) -> None:
    """Regression: a file called journal.jsonl was emptied if its first line was none of ours."""
    (tmp_path / "journal.jsonl").write_bytes(STRANGERS[name])
    if beside:
        (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"resume: .* is no journal of fastprune.*; name another folder"):
            Journal(tmp_path, KEY, Processes())
        assert contents(tmp_path) == before


@pytest.mark.parametrize("length", [0, 5, 32, 33, 40, 60, -1])
def test_a_start_that_was_cut_off_is_a_fresh_start_in_a_folder_of_its_own(length: int, tmp_path: Path) -> None:
    expected = begun(tmp_path / "whole")
    for folder in ("alone", "shared"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "journal.jsonl").write_bytes(expected[0][:length])
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert begun(tmp_path / "alone") == expected
    before = contents(tmp_path / "shared")
    with pytest.raises(ArtifactError, match="no journal of fastprune"):
        begun(tmp_path / "shared")
    assert contents(tmp_path / "shared") == before


@pytest.mark.parametrize("at", [1, 2, 3])
def test_complete_lines_that_are_dropped_are_counted(at: int, tmp_path: Path) -> None:
    lines = begun(tmp_path, segments=3)
    assert len(lines) == 4
    path = tmp_path / "journal.jsonl"
    damaged = [*lines[:at], b"x" + lines[at][1:], *lines[at + 1 :]]
    path.write_bytes(b"".join(damaged) + b"half a li")
    with pytest.warns(FastpruneWarning, match=rf"resume: line {at + 1} of .* is damaged; {4 - at} lines .* dropped"):
        Journal(tmp_path, KEY, Processes()).close()
    assert path.read_bytes() == b"".join(lines[:at])
    path.write_bytes(b"".join(damaged))
    with warnings.catch_warnings(), pytest.raises(FastpruneWarning):
        warnings.simplefilter("error")
        Journal(tmp_path, KEY, Processes())
    assert path.read_bytes() == b"".join(damaged)


def test_a_last_line_that_was_cut_off_is_not_worth_a_word(tmp_path: Path) -> None:
    lines = begun(tmp_path, segments=3)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(lines)[:-9])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Journal(tmp_path, KEY, Processes()).close()
    assert (tmp_path / "journal.jsonl").read_bytes() == b"".join(lines[:-1])


@pytest.mark.parametrize("version", [None, 1, VERSION + 1])
def test_another_version_is_refused_with_the_way_out(version: int | None, tmp_path: Path) -> None:
    begun(tmp_path, segments=1)
    start = {"kind": "start", "version": version, "key": KEY}
    if version is None:
        del start["version"]
    (tmp_path / "journal.jsonl").write_bytes(line(start))
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=rf"version {version or 1}, .* version {VERSION}; remove .*score --resume"):
        Journal(tmp_path, KEY, Processes())
    assert contents(tmp_path) == before


def process(rank: int) -> Processes:
    """One of two processes, the other of which is not asked."""
    return SimpleNamespace(rank=rank, size=2, gather=lambda value: [value])  # type: ignore[return-value]


def test_several_processes_lose_nothing_either(tmp_path: Path) -> None:
    Journal(tmp_path / "ours", KEY, process(0)).close()
    Journal(tmp_path / "ours", KEY, process(1)).close()
    stranger = tmp_path / "ours" / "process-1-of-2" / "journal.jsonl"
    stranger.write_bytes(b"dear diary\n")
    before = contents(tmp_path)
    with pytest.raises(ArtifactError, match=r"process-1-of-2.journal\.jsonl is no journal"):
        Journal(tmp_path / "ours", KEY, process(1))
    assert contents(tmp_path) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"resume: .*home holds other things"):
        Journal(tmp_path / "home", KEY, process(0))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["notes.txt"]


def test_places_that_are_no_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd" / "journal.jsonl").mkdir(parents=True)
    (tmp_path / "odd" / "journal.jsonl" / "mine").write_text("mine")
    for name in ("dangling", "file", "odd"):
        with pytest.raises(FastpruneError, match=r"^resume: "):
            Journal(tmp_path / name, KEY, Processes())
    assert not (tmp_path / "nowhere").exists()


def test_score_refuses_it_too(tmp_path: Path) -> None:
    """The folder as a user meets it, behind every other check of a pass."""
    folder = tmp_path / "diary"
    folder.mkdir()
    (folder / "journal.jsonl").write_text('{"entry": "dear diary"}\n')
    before = contents(folder)
    build("Llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ArtifactError, match="no journal of fastprune"):
        fastprune.score(tmp_path / "model", CalibrationSet(HARM), CalibrationSet(BENIGN), resume=folder, progress=False)
    assert contents(folder) == before
