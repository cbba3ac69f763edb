"""A mask written into a copy of a checkpoint folder, without ever loading the model.

In: a Hugging Face folder of safetensors shards, and a mask. Out: the same folder with the masked weights scaled; every
other byte of every tensor is as it was. Each shard is copied as a file, and then the few masked numbers are changed
where they stand. It must not know transformers or model classes.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastprune import ops
from fastprune.errors import ArgumentError, ArtifactError, FastpruneWarning, MaskError, NotFoundError
from fastprune.masking.apply import split_name
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint_of_samples, sample_positions

# safetensors name -> (dtype of the values, integers of that width: numpy has no bfloat16)
_DTYPES = {
    "F64": (torch.float64, "<i8"),
    "F32": (torch.float32, "<i4"),
    "F16": (torch.float16, "<i2"),
    "BF16": (torch.bfloat16, "<i2"),
}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Other copies of the weights: they would be the unpruned model inside the pruned one's folder.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pdparams"}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a shard: where its bytes are."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int


def patch_checkpoint(
    in_dir: str | Path, mask: PruneMask, out_dir: str | Path, *, scale: float = 0.0, strict: bool = True
) -> Path:
    """Copy a checkpoint folder with a mask applied.

    Configuration and tokenizer files are copied as they are; other copies of the weights (``.bin``, ``.gguf``, …) are
    left out. The folder appears under its name when it is complete.

    Args:
        in_dir: Folder with ``model.safetensors`` or shards and ``model.safetensors.index.json``.
        mask: The mask; its names must be those on disk, or differ by one common prefix.
        out_dir: Must not exist or be empty.
        scale: Factor for the masked weights; 0 writes +0.
        strict: Refuse a checkpoint with another fingerprint than the mask's.

    Returns:
        ``out_dir``.

    Raises:
        NotFoundError: ``in_dir``, its weights, or the folder to write into do not exist.
        ArgumentError: ``out_dir`` is not empty, or ``scale`` is not finite.
        ArtifactError: A shard or the index is truncated or not what its name says.
        MaskError: The mask does not fit: names, shapes, dtypes, or the fingerprint.

    Warns:
        FastpruneWarning: Other copies of the weights were left out.
    """
    source, target = Path(in_dir), Path(out_dir)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ArgumentError(f"scale must be a finite number, got {scale!r}")
    if not source.is_dir():
        raise NotFoundError(f"in_dir {source} does not exist or is not a folder")
    if not target.absolute().parent.is_dir():
        raise NotFoundError(f"out_dir {target}: the folder {target.absolute().parent} does not exist")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError(f"out_dir {target} must not exist or be an empty folder")
    shards = _shards(source)
    stored = _locate(mask, {name: tensor for shard in shards for name, tensor in _read_header(source, shard).items()})
    _check_fit(mask, stored, source, strict)
    files, left_out = _other_files(source, shards)

    work = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for file in [*shards, *files]:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, work / file)
        for name, tensor in stored.items():
            if len(mask[name]):
                _scale_in_file(work, tensor, mask[name], scale)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if left_out:
        message = f"{source}: left out other copies of the weights, which are not pruned: {', '.join(left_out)}"
        warnings.warn(message, FastpruneWarning, stacklevel=2)
    return target


def _shards(source: Path) -> list[str]:
    if (source / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((source / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{source / _INDEX} is not an index of safetensors shards ({error})") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ArtifactError(f"{source / _INDEX} names a shard outside the folder: {name!r}")
            if not (source / name).is_file():
                raise NotFoundError(f"{source / _INDEX} names the shard {name}, which does not exist")
        return names
    if (source / _SINGLE).is_file():
        return [_SINGLE]
    raise NotFoundError(f"in_dir {source} holds neither {_SINGLE} nor {_INDEX}; other formats are not patched")


def _read_header(source: Path, shard: str) -> dict[str, _Stored]:
    path = source / shard
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
            found[name] = _Stored(shard, entry["dtype"], tuple(entry["shape"]), 8 + length + first)
            if entry["dtype"] in _DTYPES and last - first != _width(entry["dtype"]) * math.prod(entry["shape"]):
                raise ValueError(f"{name} has {last - first} bytes, too few or too many for its shape")
            end = max(end, last)
        if size != 8 + length + end:
            raise ValueError(f"it should have {8 + length + end} bytes and has {size}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from error
    return found


def _locate(mask: PruneMask, on_disk: Mapping[str, _Stored]) -> dict[str, _Stored]:
    """Mask name to what is stored of it; the names of the two may differ by one prefix, the same for all."""
    names = {name: split_name(name)[0] for name in mask}
    if not names:
        raise MaskError("the mask is over no matrices")
    fits = []
    for removed, added in _prefixes(next(iter(names.values())), on_disk):
        found = {
            name: on_disk.get(added + base.removeprefix(removed)) if base.startswith(removed) else None
            for name, base in names.items()
        }
        if None not in found.values():
            fits.append(found)
    if not fits:
        missing = [base for base in names.values() if base not in on_disk]
        raise MaskError(
            f"the checkpoint lacks {len(missing)} of the {len(names)} matrices of the mask, the first is {missing[0]}"
        )
    if len(fits) > 1:
        raise MaskError(
            f"the names of the mask fit {len(fits)} sets of tensors in the checkpoint, under different prefixes"
        )
    return {name: _expert_of(stored, name) for name, stored in fits[0].items()}


def _prefixes(name: str, on_disk: Mapping[str, _Stored]) -> list[tuple[str, str]]:
    """(prefix of the mask's names, prefix on disk that stands for it); names that are equal leave no question."""
    if name in on_disk:
        return [("", "")]
    added = [("", other.removesuffix(name)) for other in on_disk if other.endswith(f".{name}")]
    heads = [name[: dot.end()] for dot in re.finditer(r"\.", name)]
    return added + [(head, "") for head in heads if name.removeprefix(head) in on_disk]


def _expert_of(stored: _Stored, name: str) -> _Stored:
    expert = split_name(name)[1]
    if expert is None:
        return stored
    if len(stored.shape) < 2 or expert >= stored.shape[0]:
        raise MaskError(
            f"{name}: the tensor has the shape {stored.shape} in the checkpoint, so there is no such expert"
        )
    shape = stored.shape[1:]
    return replace(stored, shape=shape, start=stored.start + expert * math.prod(shape) * _width(stored.dtype))


def _check_fit(mask: PruneMask, stored: Mapping[str, _Stored], source: Path, strict: bool) -> None:
    for name, tensor in stored.items():
        if tensor.shape != mask.shapes[name]:
            raise MaskError(
                f"{name} has the shape {tensor.shape} in the checkpoint and {mask.shapes[name]} in the mask"
            )
    expected = mask.metadata.get("fingerprint")
    if not strict or expected is None:
        return
    samples = {name: (tensor.shape, _sample(source, tensor)) for name, tensor in stored.items()}
    found = fingerprint_of_samples(samples)
    if found != expected:
        raise MaskError(
            f"the mask was made for a model with the fingerprint {expected[:12]}…, {source} has {found[:12]}…; "
            "strict=False applies it all the same"
        )


def _width(dtype: str) -> int:
    if dtype not in _DTYPES:
        raise MaskError(f"weights of the type {dtype} cannot be patched, expected one of {sorted(_DTYPES)}")
    return np.dtype(_DTYPES[dtype][1]).itemsize


def _bits(folder: Path, tensor: _Stored, mode: str) -> np.memmap:
    """The tensor in its file as integers of its width, ``(numel,)``; what was touched leaves memory with the object."""
    _width(tensor.dtype)
    bits = _DTYPES[tensor.dtype][1]
    return np.memmap(
        folder / tensor.shard, dtype=bits, mode=mode, offset=tensor.start, shape=(math.prod(tensor.shape),)
    )


def _sample(source: Path, tensor: _Stored) -> torch.Tensor:
    positions = sample_positions(math.prod(tensor.shape)).numpy()
    return torch.from_numpy(np.array(_bits(source, tensor, "r")[positions])).view(_DTYPES[tensor.dtype][0])


def _scale_in_file(folder: Path, tensor: _Stored, indices: torch.Tensor, scale: float) -> None:
    bits = _bits(folder, tensor, "r+")
    chosen = torch.from_numpy(np.array(bits[indices.numpy()]))
    # through the same op as a resident model, so that both get the same bits
    ops.apply_sparse_(chosen.view(_DTYPES[tensor.dtype][0]), torch.arange(len(chosen)), scale)
    bits[indices.numpy()] = chosen.numpy()
    bits.flush()


def _other_files(source: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Files to copy as they are, and files that may hold weights; hidden ones are neither."""
    files, left_out = [], []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or str(name) in shards or any(part.startswith(".") for part in name.parts):
            continue
        holds_weights = path.suffix in _WEIGHTS or (path.name.endswith(".index.json") and str(name) != _INDEX)
        (left_out if holds_weights else files).append(str(name))
    return files, left_out
