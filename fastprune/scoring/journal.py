"""What an interrupted pass has finished, so that it can go on and end with a bit-identical result.

In: a folder, and a key that names everything the result depends on. Out: the records of finished work. Files are
complete on the disk before the line that names them is appended to ``journal.jsonl``, and every line carries a hash of
itself, so a kill at any moment leaves a valid beginning. A file that cannot be the beginning of a journal belongs to
somebody else, and stays as it is. :class:`NullJournal` is the journal of a run that keeps none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastprune.artifact import read_artifact, write_artifact
from fastprune.errors import ArgumentError, ArtifactError, warn
from fastprune.files import sha256, sync, try_lock
from fastprune.scoring.activation_store import ActivationStore, disk_errors
from fastprune.scoring.processes import Processes

VERSION = 2  # version 1 had no such field
_LINES = "journal.jsonl"
_START = b'{"kind": "start"'  # of what the first line says, behind its hash


class NullJournal:
    """The journal of a run without ``resume=``: nothing was finished before, and nothing is recorded."""

    folder: Path | None = None

    def close(self) -> None:
        """Nothing was opened."""

    def unfinished(self, n_segments: int) -> int:
        """Every segment is still to run."""
        return n_segments

    def ready(self, boundaries: ActivationStore, end: int) -> int:
        """No boundary was recorded."""
        return 0

    def gradient_store(self, boundaries: ActivationStore) -> ActivationStore:
        """Gradients share the store of the hidden states."""
        return boundaries

    def finished(self, end: int, gradients: ActivationStore) -> list[dict[str, torch.Tensor]]:
        """No segment is finished."""
        return []

    def note(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing is recorded."""

    def add_boundary(self, boundaries: ActivationStore, name: str) -> None:
        """Nothing is recorded."""

    def add_segment(self, number: int, gradients: ActivationStore, gradient: str | None) -> None:
        """Nothing is recorded."""


class Journal:
    """Opens the journal of a folder, or begins one.

    Args:
        folder: Made if it does not exist; its parent has to.
        key: JSON-able facts that name the inputs and settings of the run.
        processes: The processes of the run; each writes a folder of its own below ``folder``.

    Attributes:
        folder: That of this process.

    Raises:
        ArgumentError: The journal there is of other inputs (names the first that differs), or in use, or the folder
            holds other things and no journal.
        ArtifactError: ``journal.jsonl`` belongs to somebody else, or is of another version. It stays as it is.

    Warns:
        FastpruneWarning: A line in the middle is damaged; what it and those after it name is formed again.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], processes: Processes) -> None:
        folder = Path(folder)
        dangling = folder.is_symlink() and not folder.exists()
        if not folder.absolute().parent.is_dir() or (folder.exists() and not folder.is_dir()) or dangling:
            raise ArgumentError(
                f"expected a folder (or a name for one in an existing folder), got {folder}", argument="resume"
            )
        self._processes = processes
        self.folder = _folder_of(folder, processes)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        if processes.size > 1 and not all(re.fullmatch(r"process-\d+-of-\d+", path.name) for path in folder.iterdir()):
            raise ArgumentError(
                f"{folder} holds other things than journals of several processes; name another", argument="resume"
            )
        self.folder.mkdir(exist_ok=True)
        names = {path.name for path in self.folder.iterdir()}
        if names and not (self.folder / _LINES).is_file():
            raise ArgumentError(
                f"{self.folder} is not empty and holds no journal; name another folder", argument="resume"
            )
        self._noted: dict[str, torch.Tensor] = {}
        self._segments: dict[int, dict[str, Any]] = {}
        self._boundary_records: dict[str, dict[str, Any]] = {}
        key = json.loads(json.dumps({**key, "process": [processes.rank, processes.size]}))
        self._file = (self.folder / _LINES).open("a+b")
        try:
            if not try_lock(self._file.fileno()):
                raise ArgumentError(f"another process is at work in {self.folder}", argument="resume")
            self._read(key, alone=names <= {_LINES})
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def segments_of(folder: str | Path, processes: Processes) -> int | None:
        """Number of segments with which the journal of a folder was begun, if there is one.

        A plan follows the memory that is free, and could choose another number now.
        """
        begun = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            with (_folder_of(Path(folder), processes) / _LINES).open(encoding="utf-8") as lines:
                digest, _, payload = lines.readline().rstrip("\n").partition(" ")
            if digest == _line_digest(payload):
                begun = int(json.loads(payload)["key"]["segments"])
        return max((found for found in processes.all_gather(begun) if found is not None), default=None)

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()

    def unfinished(self, n_segments: int) -> int:
        """Number of segments still to run: the finished ones are the last, on every process."""
        end = n_segments
        while end - 1 in self._segments:
            end -= 1
        return max(self._processes.all_gather(end))

    def ready(self, boundaries: ActivationStore, end: int) -> int:
        """Take over the boundaries on disk: up to which number, at most ``end - 1``, all of them are there."""
        number = 0
        while number < end - 1:
            record = self._boundary_records.get(f"boundary-{number + 1}")
            if record is None or boundaries.tier != "disk" or not boundaries.reopen(record):
                break
            number += 1
        common = min(self._processes.all_gather(number))
        for further in range(common + 1, number + 1):  # formed again, into empty files
            boundaries.drop(f"boundary-{further}")
        return common

    def gradient_store(self, boundaries: ActivationStore) -> ActivationStore:
        """A store of gradients on disk, whose files this journal can name."""
        return ActivationStore("disk", boundaries.device, self.folder)

    def finished(self, end: int, gradients: ActivationStore) -> list[dict[str, torch.Tensor]]:
        """What was noted of each finished segment, the last segment first; the gradients below them are taken over.

        Raises:
            ArtifactError: A file was changed or removed since; nothing can go on from the folder.
        """
        found = []
        # A run that was killed after it recorded a segment may not have freed what that segment had used up.
        for leftover in [*self.folder.glob("boundary-*.bin"), *self.folder.glob("gradient-*.bin")]:
            kind, _, used_up = leftover.stem.partition("-")
            if used_up.isdecimal() and int(used_up) > (end if kind == "gradient" else end - 1):
                leftover.unlink()
        for number in sorted((number for number in self._segments if number >= end), reverse=True):
            record = self._segments[number]
            path = self.folder / record["file"]
            if not path.is_file() or sha256(path) != record["sha256"]:
                raise ArtifactError(
                    f"{path} is missing or was changed; remove {self.folder} and start again", argument="resume"
                )
            found.append(read_artifact(path, "segment")[0])
            if number == end and record["gradient"] is not None and not gradients.reopen(record["gradient"]):
                raise ArtifactError(
                    f"the gradients below segment {number} in {self.folder} are missing or were changed; "
                    "remove the folder and start again",
                    argument="resume",
                )
        return found

    def note(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add to what belongs to the segment in progress."""
        self._noted.update(tensors)

    def add_boundary(self, boundaries: ActivationStore, name: str) -> None:
        """Record hidden states that are on disk; a later run forms others again."""
        if boundaries.tier == "disk":
            self._append({"kind": "boundary", **boundaries.sealed(name)})

    def add_segment(self, number: int, gradients: ActivationStore, gradient: str | None) -> None:
        """Record a finished segment on every process: what was noted, and the gradients at its lower boundary."""
        path = self.folder / f"segment-{number}.safetensors"
        with disk_errors(self.folder, "the journal"):
            write_artifact(path, "segment", self._noted, {"number": number}, durable=True)
        sealed = gradients.sealed(gradient) if gradient is not None and gradients.holds(gradient) else None
        self._append(
            {"kind": "segment", "number": number, "file": path.name, "sha256": sha256(path), "gradient": sealed}
        )
        self._noted = {}
        self._processes.barrier()  # nobody frees what the unfinished segment of another one would need again

    def _append(self, record: Mapping[str, Any]) -> None:
        payload = json.dumps(record)
        with disk_errors(self.folder, "the journal"):
            self._file.write(f"{_line_digest(payload)} {payload}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def _read(self, key: Mapping[str, Any], *, alone: bool) -> None:
        """Take over the valid lines and cut off the others; ``alone`` means that nothing else is in the folder."""
        self._file.seek(0)
        lines = self._file.readlines()
        records: list[dict[str, Any]] = []
        for line in lines:
            record = _record(line)
            if record is None:
                break
            records.append(record)
        if records:
            self._check_start(records[0], key)
        elif not (alone and _may_be_begun(b"".join(lines))):
            raise self._foreign()
        # A line without its end was cut off by a kill while it was written, which is no damage.
        dropped = sum(line.endswith(b"\n") for line in lines[len(records) :])
        if dropped:
            warn(
                f"line {len(records) + 1} of {self.folder / _LINES} is damaged; {dropped} lines from there on are "
                "dropped, and what they name is formed again",
                argument="resume",
            )
        for record in records[1:]:
            if record["kind"] == "boundary":
                self._boundary_records[record["name"]] = record
            else:
                self._segments[record["number"]] = record
        self._file.truncate(sum(map(len, lines[: len(records)])))
        if not records:
            self._append({"kind": "start", "version": VERSION, "key": key})
            sync(self.folder)

    def _foreign(self) -> ArtifactError:
        return ArtifactError(
            f"{self.folder / _LINES} is no journal of fastprune, or its first line is damaged; it stays as it "
            "is; name another folder, or remove this one to start anew",
            argument="resume",
        )

    def _check_start(self, record: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        if not isinstance(record.get("key"), dict):
            raise self._foreign()
        if record.get("version", 1) != VERSION:
            raise ArtifactError(
                f"the journal in {self.folder} has version {record.get('version', 1)}, this fastprune reads "
                f"version {VERSION}; remove the folder and run the same `fastprune score --resume` again",
                argument="resume",
            )
        self._check_key(record["key"], key)

    def _check_key(self, found: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        for name in {**found, **key}:
            if found.get(name) != key.get(name):
                raise ArgumentError(
                    f"the journal in {self.folder} is of another {name}: {found.get(name)!r} there, "
                    f"{key.get(name)!r} now; name another folder, or start with the same inputs",
                    argument="resume",
                )


def _folder_of(folder: Path, processes: Processes) -> Path:
    return folder if processes.size == 1 else folder / f"process-{processes.rank}-of-{processes.size}"


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line; ``None`` if the line is not as it was written."""
    digest, _, payload = line.decode(errors="replace").rstrip("\n").partition(" ")
    if not line.endswith(b"\n") or digest != _line_digest(payload):
        return None
    record = json.loads(payload)
    return record if isinstance(record, dict) else None


def _may_be_begun(content: bytes) -> bool:
    """Whether a process that was killed at the first line can have left this: nothing, or the beginning of it."""
    hexadecimal, start = content[:32], content[33:]
    return (
        b"\n" not in content
        and re.fullmatch(rb"[0-9a-f]*", hexadecimal) is not None
        and content[32:33] in (b"", b" ")
        and (_START.startswith(start) or start.startswith(_START))
    )


def _line_digest(payload: str) -> str:
    return hashlib.sha256(payload.encode()).hexdigest()[:32]
