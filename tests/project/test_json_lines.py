"""Files of JSON lines: private, whole after every kill, and never silently short of a line in the middle."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastprune.errors import ArgumentError, ArtifactError, DiskError
from fastprune.files import JsonLines, private_replacing, read_json_lines

TEXTS = st.text(max_size=20)
RECORDS = st.lists(st.dictionaries(TEXTS, TEXTS | st.integers() | st.none(), max_size=4), max_size=6)


@pytest.fixture(autouse=True)
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@given(records=RECORDS, torn=st.integers(0, 60))
def test_what_was_written_before_a_torn_line_is_read(tmp_path_factory, records: list[dict], torn: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    with JsonLines(path, "out") as lines:
        assert lines.records == []
        for record in records:
            lines.append(record)
    content = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == len(records), "a record takes more than one line"
    left = content[: len(content) - min(torn, len(content))]
    path.write_bytes(left)
    whole = records[: sum(end <= len(left) for end in ends)]
    assert read_json_lines(path) == whole
    with JsonLines(path, "out") as lines:
        assert lines.records == whole
        lines.append({"next": 1})
    assert read_json_lines(path) == [*whole, {"next": 1}]


@pytest.mark.parametrize("damage", [b"[1]\n", b"{\n", b"\n", b"\xff{}\n"])
def test_a_damaged_line_in_the_middle_is_said_by_its_number(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + damage + b'{"a": 2}\n')
    for opened in (read_json_lines, lambda path: JsonLines(path, "out")):
        with pytest.raises(ArtifactError, match=r"lines\.jsonl, line 2: expected a JSON object"):
            opened(path)
    assert len(path.read_bytes()) == 18 + len(damage)


def test_only_the_owner_can_read_them(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.touch(0o644)
    with JsonLines(path, "out") as lines:
        lines.append({"a": 1})
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with private_replacing(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.write_text("text")  # as a library would
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_a_new_file_is_private_from_its_first_moment(tmp_path: Path, monkeypatch) -> None:
    modes = []
    monkeypatch.setattr(os, "fchmod", lambda handle, mode: modes.append(stat.S_IMODE(os.fstat(handle).st_mode)))
    JsonLines(tmp_path / "lines.jsonl", "out").__exit__()
    assert modes == [0o600]


def test_a_line_is_one_write_and_a_short_one_is_finished(tmp_path: Path, monkeypatch) -> None:
    sizes, write = [], os.write
    monkeypatch.setattr(os, "write", lambda handle, data: sizes.append(len(data)) or write(handle, data))
    with JsonLines(tmp_path / "lines.jsonl", "out") as lines:
        lines.append({"text": "é" * 5000})
        assert len(sizes) == 1
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
        lines.append({"text": "short"})
    assert [record["text"][:5] for record in read_json_lines(tmp_path / "lines.jsonl")] == ["ééééé", "short"]


def test_a_full_disk_is_said_and_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch) -> None:
    write, calls = os.write, []

    def full(handle: int, data: bytes) -> int:
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(handle, data[:5])

    with JsonLines(tmp_path / "lines.jsonl", "out") as lines:
        lines.append({"a": 1})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(DiskError, match=r"lines\.jsonl: its disk is full"):
            lines.append({"a": 2})
    assert (tmp_path / "lines.jsonl").read_bytes() == b'{"a": 1}\n'


def test_two_at_once_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with JsonLines(path, "out") as lines:
        with pytest.raises(ArgumentError, match=r"out: expected a file that nobody else is writing to"):
            JsonLines(path, "out")
        lines.append({"a": 1})
        assert read_json_lines(path) == [{"a": 1}]
    JsonLines(path, "out").__exit__()
