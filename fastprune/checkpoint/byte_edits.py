"""Single bytes of a file, by their offsets: read, written, and hashed as if they had other values.

In: a file and ascending byte offsets. Out: bytes, hashes, or the file (or a copy) with other bytes at the offsets.
Nothing is mapped and no tensor is loaded: resident memory is one window of the file and about ten bytes for each
changed byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Hashing reads the whole file: the windows are large enough for calls to cost nothing, and small in any budget.
_STREAM_BYTES = 1 << 23
# Reading and writing single weights touches only windows that hold one: a page-sized read costs as much as one byte.
_WINDOW_BYTES = 1 << 16


@dataclass(frozen=True, eq=False)
class Edits:
    """Changes to one file.

    Attributes:
        offsets: ``(n,)`` int64, ascending, offsets of the bytes.
        old: ``(n,)`` uint8, the bytes before.
        new: ``(n,)`` uint8, the bytes after.
    """

    offsets: np.ndarray
    old: np.ndarray
    new: np.ndarray


def gather(path: Path, offsets: np.ndarray) -> np.ndarray:
    """The bytes at some offsets: uint8 ``(n,)``."""
    found = np.empty(len(offsets), dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for start, part in _windows(offsets):
            window = os.pread(file.fileno(), _WINDOW_BYTES, start)
            found[part] = np.frombuffer(window, dtype=np.uint8)[offsets[part] - start]
    return found


def scatter(path: Path, offsets: np.ndarray, values: np.ndarray) -> None:
    """Write bytes at some offsets; they are on the disk when this returns. Other bytes of a window are rewritten."""
    with path.open("r+b", buffering=0) as file:
        for start, part in _windows(offsets):
            window = bytearray(os.pread(file.fileno(), _WINDOW_BYTES, start))
            np.frombuffer(window, dtype=np.uint8)[offsets[part] - start] = values[part]
            if os.pwrite(file.fileno(), window, start) != len(window):
                raise OSError(errno.EIO, "a write was cut short", str(path))
        os.fsync(file.fileno())


def hashes(path: Path, offsets: np.ndarray, values: np.ndarray, copy_to: Path | None = None) -> tuple[str, str]:
    """SHA-256 of a file, and of the file with other bytes at some offsets, in one pass.

    Args:
        path: The file; it is not changed.
        offsets: ``(n,)`` int64, ascending.
        values: ``(n,)`` uint8, the other bytes.
        copy_to: Path for the file with the other bytes, if it is to be written.

    Returns:
        Both hashes, as 64 hexadecimal digits.
    """
    as_it_is, edited = hashlib.sha256(), hashlib.sha256()
    buffer = bytearray(_STREAM_BYTES)
    start = first = 0
    with (
        path.open("rb", buffering=0) as file,
        copy_to.open("wb", buffering=0) if copy_to is not None else nullcontext() as copy,
    ):
        while length := file.readinto(buffer):
            window = memoryview(buffer)[:length]
            as_it_is.update(window)
            last = int(np.searchsorted(offsets, start + length))
            np.frombuffer(window, dtype=np.uint8)[offsets[first:last] - start] = values[first:last]
            edited.update(window)
            if copy is not None:
                _write_all(copy.fileno(), window)
            start, first = start + length, last
    return as_it_is.hexdigest(), edited.hexdigest()


def _windows(offsets: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Start of each window that holds some of the offsets, and the slice of these."""
    numbers = offsets // _WINDOW_BYTES
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    for first, last in zip(firsts, [*firsts[1:], len(offsets)], strict=True):
        yield int(numbers[first]) * _WINDOW_BYTES, slice(int(first), int(last))


def _write_all(handle: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(handle, data) :]
