"""The safetensors files of a checkpoint folder: which tensor lies where, and reading or writing it in place.

In: a folder with ``model.safetensors`` or an index and its shards. Out: :class:`Stored` records by name, and the bytes
behind them. Tensors are read with ``pread`` into memory of their own: a mapped file would stay in the process's
resident memory, page by page, until the kernel thinks otherwise. It must not know transformers or model classes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from fastprune.errors import ArtifactError, NotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors name -> dtype, of the types that a weight can have here."""

# One read call moves at most this much: a signal or Ctrl-C is then served within some milliseconds.
_READ_BYTES = 1 << 26


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard: where its bytes are.

    Attributes:
        path: The shard.
        dtype: safetensors' name of the type, e.g. ``"BF16"``.
        shape: As stored.
        start: Offset of the first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def shard_names(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the checkpoint, sorted.

    Of a single file and an index, the single file counts, as in transformers: the other is left from an earlier save.

    Raises:
        NotFoundError: There are none, or the index names one that does not exist.
        ArtifactError: The index is not one.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE]
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{index} is not an index of safetensors shards ({error})") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ArtifactError(f"{index} names a shard outside the folder: {name!r}")
            if not (folder / name).is_file():
                raise NotFoundError(f"{index} names the shard {name}, which does not exist")
        return names
    raise NotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name on disk; only headers are read.

    Raises:
        NotFoundError: As :func:`shard_names`.
        ArtifactError: A shard or the index is truncated or not what its name says.
    """
    found: dict[str, Stored] = {}
    for name in shard_names(folder):
        found.update(read_header(folder / name))
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one shard.

    Raises:
        ArtifactError: It is truncated or no safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        found, end = {}, 0
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if entry["dtype"] in DTYPES and last - first != DTYPES[entry["dtype"]].itemsize * found[name].numel:
                raise ValueError(f"{name} has {last - first} bytes, too few or too many for its shape")
            end = max(end, last)
        if size != 8 + length + end:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    return found


def read_tensor(stored: Stored, *, pinned: bool = False) -> torch.Tensor:
    """A tensor's values, in memory of its own, on the CPU, in the dtype on disk.

    Args:
        stored: Where they are.
        pinned: Read into page-locked memory, from which a GPU fetches them without another copy; it needs one.

    Raises:
        ArtifactError: Its dtype is none of ``DTYPES``, or the file ends before its bytes do.
    """
    if stored.dtype not in DTYPES:
        raise ArtifactError(f"{stored.path}: weights of the type {stored.dtype} cannot be read here")
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype], pin_memory=pinned)
    view = memoryview(tensor.view(-1).view(torch.uint8).numpy()) if stored.numel else memoryview(b"")
    with stored.path.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            read = os.preadv(file.fileno(), [view[done : done + _READ_BYTES]], stored.start + done)
            if read == 0:
                raise ArtifactError(f"{stored.path} ended while it was read; was it changed?")
            done += read
    return tensor


def read_elements(stored: Stored, positions: torch.Tensor) -> torch.Tensor:
    """Single elements of a tensor by their flat positions, in the dtype on disk; little else is read."""
    dtype = DTYPES[stored.dtype]
    with stored.path.open("rb", buffering=0) as file:
        found = [
            os.pread(file.fileno(), dtype.itemsize, stored.start + dtype.itemsize * at) for at in positions.tolist()
        ]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=dtype) if found else torch.empty(0, dtype=dtype)
