"""The safetensors files of a checkpoint folder: where each tensor lies, and reading it.

In: a folder with ``model.safetensors`` or an index and its shards. Out: :class:`Stored` records by name, and their
values. Tensors are read with ``pread`` into memory of their own: pages of a mapped file would count as resident memory
of the process until the kernel drops them.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastprune.errors import ArtifactError, NotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors name -> dtype, of the types that are supported for weights."""

# Indices of the largest published checkpoints take some ten megabytes.
_INDEX_BYTES = 100 * 10**6
# One read call moves at most this much: a signal or Ctrl-C is then served within some milliseconds.
_READ_BYTES = 1 << 26


@dataclass(frozen=True)
class Stored:
    """The place of a tensor in a shard.

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

    If a folder has a single file and an index, the single file counts, as in transformers.

    Raises:
        NotFoundError: There are none, or the index names one that does not exist.
        ArtifactError: The index is not one.
    """
    if _is_file(folder / SINGLE):
        return [SINGLE]
    if _is_file(folder / INDEX):
        return sorted(set(_weight_map(folder / INDEX).values()))
    raise NotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name on disk; only headers are read.

    Each name must be in one shard, the one that the index names for it. Among several copies, loaders differ
    (transformers takes that of the last shard, others follow the index): one copy would be scored or patched, and
    another one loaded. Tensors that the index omits count, as in transformers.

    Raises:
        NotFoundError: As :func:`shard_names`.
        ArtifactError: A shard or the index is truncated or not what its name says, or the two do not agree.
    """
    found: dict[str, Stored] = {}
    names = shard_names(folder)
    for shard in names:
        for name, stored in read_header(folder / shard).items():
            if name in found:
                raise ArtifactError(
                    f"{folder} holds {name} in two shards, {found[name].path.name} and {shard}, and which one counts "
                    "depends on the loader; load the model as you mean it and write it again with save_pretrained"
                )
            found[name] = stored
    if names != [SINGLE]:
        for name, shard in _weight_map(folder / INDEX).items():
            if name not in found or found[name].path.name != shard:
                place = f"is in {found[name].path.name}" if name in found else "is in no shard"
                raise ArtifactError(f"{folder / INDEX}: {name} should be in {shard} and {place}; are the files whole?")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one shard.

    The reader of safetensors checks the header first: types, shapes, and that the tensors fill the file without a gap
    or an overlap. All offsets that a patch writes to come from this header.

    Raises:
        ArtifactError: It is truncated or no safetensors file, or it names a tensor twice.
    """
    try:
        with safe_open(path, framework="np"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_each_key_once)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard of an index; the shards are files of its folder."""
    try:
        if index.stat().st_size > _INDEX_BYTES:
            raise ValueError(f"expected at most {_INDEX_BYTES} bytes, got {index.stat().st_size}")
        found = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_each_key_once)["weight_map"]
        shards = set(found.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ArtifactError(f"{index} is not an index of safetensors shards ({error})") from error
    if not shards:
        raise ArtifactError(f"{index} names no shard")
    for name in shards:
        if not isinstance(name, str) or Path(name).name != name or not name.isprintable():
            raise ArtifactError(f"{index} names a shard outside the folder: {name!r}")
        if not _is_file(index.parent / name):
            raise NotFoundError(f"{index} names the shard {name}, which does not exist")
    return found


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without duplicate keys: readers differ in which of the two they take."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key} comes twice")
        found[key] = value
    return found


def _is_file(path: Path) -> bool:
    """``Path.is_file``, and ``False`` for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_tensor(stored: Stored, *, pinned: bool = False) -> torch.Tensor:
    """The values of a tensor, in memory of their own, on the CPU, in the dtype on disk.

    Args:
        stored: The place of the tensor.
        pinned: Read into page-locked memory, from which a GPU fetches them without another copy; it needs one.

    Raises:
        ArtifactError: Its dtype is none of ``DTYPES``, or the file ends before its bytes do.
    """
    tensor = torch.empty(stored.shape, dtype=_dtype_of(stored), pin_memory=pinned)
    view = tensor.view(-1).view(torch.uint8).numpy().data if stored.numel else memoryview(b"")
    with stored.path.open("rb", buffering=0) as file:
        done = 0
        while done < len(view):
            read = os.preadv(file.fileno(), [view[done : done + _READ_BYTES]], stored.start + done)
            if read == 0:
                raise ArtifactError(f"{stored.path} ended while it was read; was it changed?")
            done += read
    return tensor


def read_elements(stored: Stored, positions: torch.Tensor) -> torch.Tensor:
    """Single elements of a tensor by their flat positions, in the dtype on disk; nothing else is read.

    Raises:
        ArtifactError: Its dtype is none of ``DTYPES``.
    """
    dtype = _dtype_of(stored)
    with stored.path.open("rb", buffering=0) as file:
        found = [
            os.pread(file.fileno(), dtype.itemsize, stored.start + dtype.itemsize * at) for at in positions.tolist()
        ]
    return torch.frombuffer(bytearray(b"".join(found)), dtype=dtype) if found else torch.empty(0, dtype=dtype)


def _dtype_of(stored: Stored) -> torch.dtype:
    if stored.dtype not in DTYPES:
        raise ArtifactError(f"{stored.path}: expected weights of a type in {sorted(DTYPES)}, got {stored.dtype}")
    return DTYPES[stored.dtype]
