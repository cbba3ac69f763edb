"""Hidden states and their gradients between segments, on the device, in host memory or on disk.

In: one tensor for each micro-batch under a name such as ``boundary-3``. Out: the tensor, bit-identical, on the model's
device. On disk each name is one file: micro-batches one after the other, written and read with plain system calls,
because mapped pages would count as memory of the process.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastprune.errors import DiskError, ScoringError, setting
from fastprune.files import is_full, scratch, sha256, sync


@contextlib.contextmanager
def disk_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn the error of a full disk into one that names the way out.

    Raises:
        ScoringError: The disk is full; names the folder and what did not fit.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(error, DiskError) and not is_full(error):
            raise
        raise ScoringError(
            f"the disk of {folder} is full: {what} did not fit ({error}); free some space, name another folder "
            f"({setting('resume')}, TMPDIR), or keep hidden states in memory ({setting('offload', 'host')})"
        ) from error


@dataclass(frozen=True)
class _Slot:
    """Where one micro-batch's tensor lies in a file."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class ActivationStore:
    """Tensors by name and micro-batch; :meth:`drop` frees the memory or the file of a name.

    Args:
        tier: ``"device"``, ``"host"`` (pinned, if the device is a GPU) or ``"disk"``.
        device: Where tensors come from and go back to.
        folder: For ``"disk"``: where the files lie; ``None`` takes a temporary folder that :meth:`close` removes.

    Raises:
        ScoringError: No temporary folder can be made.
    """

    def __init__(self, tier: str, device: torch.device, folder: Path | None = None) -> None:
        self.tier, self.device = tier, device
        self._tensors: dict[str, dict[int, torch.Tensor]] = {}
        self._slots: dict[str, dict[int, _Slot]] = {}
        self._temporary = contextlib.ExitStack()
        self._folder = _temporary_folder(self._temporary) if folder is None and tier == "disk" else folder

    def put(self, name: str, item: int, tensor: torch.Tensor) -> None:
        """Keep one tensor; it may be on any device that the model uses.

        Raises:
            ScoringError: The disk is full.
        """
        tensor = tensor.detach()
        if self.tier == "disk":
            self._write(name, item, tensor)
        elif self.tier == "host" and tensor.device.type != "cpu":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            # Reads follow on the stream of the store's device; a copy on any other stream has to be waited for.
            host.copy_(tensor, non_blocking=tensor.device == self.device)
            self._tensors.setdefault(name, {})[item] = host
        else:
            self._tensors.setdefault(name, {})[item] = tensor

    def get(self, name: str, item: int) -> torch.Tensor:
        """The tensor that was kept, on the device (with the tier ``"device"``: where it was)."""
        if self.tier != "disk":
            return self._on_device(self._tensors[name][item])
        slot = self._slots[name][item]
        tensor = torch.empty(slot.shape, dtype=slot.dtype)
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with self._path(name).open("rb", buffering=0) as file:
            file.seek(slot.start)
            if file.readinto(view) != len(view):
                raise ScoringError(f"{self._path(name)} is shorter than what was written to it")
        return tensor.to(self.device)

    def take(self, name: str, item: int) -> torch.Tensor:
        """As :meth:`get`, for the last time: its memory is freed (a file is freed by :meth:`drop` only)."""
        return self.get(name, item) if self.tier == "disk" else self._on_device(self._tensors[name].pop(item))

    def holds(self, name: str) -> bool:
        """Whether anything is kept under a name."""
        return bool(self._tensors.get(name) or self._slots.get(name))

    def drop(self, name: str) -> None:
        """Free everything under a name, if there is anything."""
        self._tensors.pop(name, None)
        if self._slots.pop(name, None) is not None:
            self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Forget everything; remove files that were temporary."""
        self._tensors.clear()
        self._slots.clear()
        self._temporary.close()

    def sealed(self, name: str) -> dict[str, Any]:
        """Make a name's file survive a power cut.

        Returns:
            What :meth:`reopen` needs, JSON-able: the layout and a hash of the content.
        """
        path = self._path(name)
        path.touch()  # a process that was given no micro-batch has put nothing
        with disk_errors(path.parent, name):
            sync(path)
            digest = sha256(path)
        slots = {
            str(item): [slot.start, list(slot.shape), str(slot.dtype).removeprefix("torch.")]
            for item, slot in self._slots.setdefault(name, {}).items()
        }
        return {"name": name, "sha256": digest, "slots": slots}

    def reopen(self, record: dict[str, Any]) -> bool:
        """Take over a file of an earlier run; ``False`` if it is missing or has changed since it was sealed."""
        path = self._path(record["name"])
        if not path.is_file() or sha256(path) != record["sha256"]:
            return False
        self._slots[record["name"]] = {
            int(item): _Slot(start, tuple(shape), getattr(torch, dtype))
            for item, (start, shape, dtype) in record["slots"].items()
        }
        return True

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True) if self.tier == "host" else tensor

    def _path(self, name: str) -> Path:
        assert self._folder is not None  # every store on disk has one
        return self._folder / f"{name}.bin"

    def _write(self, name: str, item: int, tensor: torch.Tensor) -> None:
        slots = self._slots.setdefault(name, {})
        start = sum(slot.dtype.itemsize * torch.Size(slot.shape).numel() for slot in slots.values())
        host = tensor.cpu().contiguous()
        view = host.view(-1).view(torch.uint8).numpy().data
        mode = "r+b" if slots else "wb"  # the first of a name empties what a killed run may have left
        path = self._path(name)
        with disk_errors(path.parent, f"{name} of the hidden states"), path.open(mode, buffering=0) as file:
            file.seek(start)
            while view:
                view = view[file.write(view) :]
        slots[item] = _Slot(start, tuple(tensor.shape), tensor.dtype)


def _temporary_folder(stack: contextlib.ExitStack) -> Path:
    """A folder until the stack is closed; folders that killed runs have left are removed."""
    try:
        return stack.enter_context(scratch(Path(tempfile.gettempdir()), "fastprune-hidden-"))
    except OSError as error:
        raise ScoringError(
            f"'disk' needs a folder for temporary files, and none can be made ({error}); name one that "
            f"exists and can be written (TMPDIR, {setting('resume')}), or keep hidden states in memory "
            f"({setting('offload', 'host')})",
            argument="offload",
        ) from error
