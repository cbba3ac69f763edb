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
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fastprune.errors import ArtifactError, NotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors name -> dtype, of the types that a weight can have here."""

# Those of the largest published checkpoints have some ten megabytes.
_INDEX_BYTES = 100 * 10**6
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
    if _is_file(folder / SINGLE):
        return [SINGLE]
    if _is_file(folder / INDEX):
        return sorted(set(_weight_map(folder / INDEX).values()))
    raise NotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}; other formats are not read")


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by its name on disk; only headers are read.

    Each name must be in one shard, the one that the index names for it. Of several copies, loaders take different ones
    (transformers that of the last shard, others what the index says): scores would be of one copy, and a patch of one
    would leave the other to be loaded. Tensors that the index leaves out count, as in transformers.

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

    The format's own reader checks the header first: types, shapes, and that the tensors fill the file without a gap or
    an overlap. Every offset that is later written to comes from here.

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
    """An object of JSON in which no key comes twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice} comes twice")
    return found


def _is_file(path: Path) -> bool:
    """As ``Path.is_file``, and ``False`` too for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_tensor(stored: Stored, *, pinned: bool = False) -> torch.Tensor:
    """A tensor's values, in memory of its own, on the CPU, in the dtype on disk.

    Args:
        stored: Where they are.
        pinned: Read into page-locked memory, from which a GPU fetches them without another copy; it needs one.

    Raises:
        ArtifactError: Its dtype is none of ``DTYPES``, or the file ends before its bytes do.
    """
    tensor = torch.empty(stored.shape, dtype=_dtype_of(stored), pin_memory=pinned)
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
    """Single elements of a tensor by their flat positions, in the dtype on disk; little else is read.

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
        raise ArtifactError(f"{stored.path}: weights of the type {stored.dtype} cannot be read here")
    return DTYPES[stored.dtype]
