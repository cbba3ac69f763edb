"""Shared by the benchmarks: time, peak memory, available backends, and the JSON lines that they write."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch

from fastprune import ops


def backends() -> list[str]:
    """What can serve fastprune's operations here: without its extensions and kernels a line is of plain torch."""
    return [name for name, status in ops.available_backends().items() if status == "available"]


class Peak:
    """Bytes at the peak of a ``with`` block beyond what was there before, in ``bytes``; 0 where it cannot be measured.

    On the CPU it is the process's resident memory (Linux): what the allocator keeps from before does not count.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.known = self.on_gpu or sys.platform.startswith("linux")
        self.bytes = 0

    def __enter__(self) -> Peak:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        elif self.known:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            self.before = status_bytes("VmRSS")
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.known:
            self.bytes = (torch.cuda.max_memory_allocated() if self.on_gpu else status_bytes("VmHWM")) - self.before

    @property
    def mib(self) -> float:
        """The same in MiB."""
        return round(self.bytes / 2**20, 1)


def status_bytes(key: str) -> int:
    """A memory figure of this process (Linux), such as ``"VmRSS"``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


class Stopwatch:
    """Seconds of its ``with`` blocks together, the device's work included, in ``seconds``."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self.start = self._now()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds += self._now() - self.start

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()


class Instant:
    """A moment in a GPU's work, as a timer for pytest-benchmark: that of everything queued before.

    The difference of two is in seconds of the device's own clock. What the host does between them counts only where
    the device has nothing left to do: behind :func:`flush_cache` it has.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def flush_cache() -> None:
    """Queue writes to 2 GiB: nothing else is left in a GPU's cache, and it is busy for most of a millisecond."""
    _flushing().zero_()


@functools.cache
def _flushing() -> torch.Tensor:
    return torch.empty(1 << 31, dtype=torch.uint8, device="cuda")


class Report:
    """The lines of one benchmark at the end of a file, rewritten as more is known: a run cut off leaves what it had.

    A context manager; at its end the lines go to standard output too.
    """

    def __init__(self, out: Path | None) -> None:
        self.out, self.text = out, ""
        self.start = out.stat().st_size if out is not None and out.exists() else 0

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        sys.stdout.write(self.text)

    def write(self, lines: Iterable[Mapping[str, object]]) -> None:
        """Put these lines, one JSON object each, in the place of those of the last call."""
        self.text = as_text(lines)
        if self.out is not None:
            with self.out.open("a", encoding="utf-8") as file:
                file.truncate(self.start)
                file.write(self.text)


def as_text(lines: Iterable[Mapping[str, object]]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_lines(lines: Iterable[Mapping[str, object]], out: Path | None) -> None:
    """One JSON object a line, to standard output and, appended, to a file."""
    text = as_text(lines)
    sys.stdout.write(text)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text)
