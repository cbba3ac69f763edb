"""A mask written into a copy of a checkpoint folder, without ever loading the model.

In: a Hugging Face folder of safetensors shards, and a mask. Out: the same folder with the masked weights scaled; every
other byte of every tensor is as it was. Each shard is copied as a file, and then the few masked numbers are changed
where they stand. It must not know transformers or model classes.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastprune import ops
from fastprune.errors import ArgumentError, FastpruneWarning, MaskError, NotFoundError
from fastprune.masking.apply import split_name
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint_of_samples, sample_positions
from fastprune.model.shards import DTYPES, INDEX, Stored, shard_names, stored_tensors

# safetensors name -> integers of that width, as which values are moved: numpy has no bfloat16
_INTEGERS = {"F64": "<i8", "F32": "<i4", "F16": "<i2", "BF16": "<i2"}

# Other copies of the weights: they would be the unpruned model inside the pruned one's folder.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pdparams"}


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
    shards = shard_names(source)
    stored = _locate(mask, stored_tensors(source))
    _check_fit(mask, stored, source, strict)
    files, left_out = _other_files(source, shards)

    work = target.absolute().with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for file in [*shards, *files]:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, work / file)
        for name, tensor in stored.items():
            if len(mask[name]):
                _scale_in_file(work / tensor.path.name, tensor, mask[name], scale)
        work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if left_out:
        message = f"{source}: left out other copies of the weights, which are not pruned: {', '.join(left_out)}"
        warnings.warn(message, FastpruneWarning, stacklevel=2)
    return target


def _locate(mask: PruneMask, on_disk: Mapping[str, Stored]) -> dict[str, Stored]:
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


def _prefixes(name: str, on_disk: Mapping[str, Stored]) -> list[tuple[str, str]]:
    """(prefix of the mask's names, prefix on disk that stands for it); names that are equal leave no question."""
    if name in on_disk:
        return [("", "")]
    added = [("", other.removesuffix(name)) for other in on_disk if other.endswith(f".{name}")]
    heads = [name[: dot.end()] for dot in re.finditer(r"\.", name)]
    return added + [(head, "") for head in heads if name.removeprefix(head) in on_disk]


def _expert_of(stored: Stored, name: str) -> Stored:
    expert = split_name(name)[1]
    if expert is None:
        return stored
    if len(stored.shape) < 2 or expert >= stored.shape[0]:
        raise MaskError(
            f"{name}: the tensor has the shape {stored.shape} in the checkpoint, so there is no such expert"
        )
    shape = stored.shape[1:]
    return replace(stored, shape=shape, start=stored.start + expert * math.prod(shape) * _width(stored))


def _check_fit(mask: PruneMask, stored: Mapping[str, Stored], source: Path, strict: bool) -> None:
    for name, tensor in stored.items():
        if tensor.shape != mask.shapes[name]:
            raise MaskError(
                f"{name} has the shape {tensor.shape} in the checkpoint and {mask.shapes[name]} in the mask"
            )
    expected = mask.metadata.get("fingerprint")
    if not strict or expected is None:
        return
    samples = {name: (tensor.shape, _sample(tensor)) for name, tensor in stored.items()}
    found = fingerprint_of_samples(samples)
    if found != expected:
        raise MaskError(
            f"the mask was made for a model with the fingerprint {expected[:12]}…, {source} has {found[:12]}…; "
            "strict=False applies it all the same"
        )


def _width(stored: Stored) -> int:
    if stored.dtype not in DTYPES:
        raise MaskError(f"weights of the type {stored.dtype} cannot be patched, expected one of {sorted(DTYPES)}")
    return DTYPES[stored.dtype].itemsize


def _bits(path: Path, tensor: Stored, mode: str) -> np.memmap:
    """The tensor in its file as integers of its width, ``(numel,)``; what was touched leaves memory with the object."""
    _width(tensor)
    return np.memmap(path, dtype=_INTEGERS[tensor.dtype], mode=mode, offset=tensor.start, shape=(tensor.numel,))


def _sample(tensor: Stored) -> torch.Tensor:
    positions = sample_positions(tensor.numel).numpy()
    return torch.from_numpy(np.array(_bits(tensor.path, tensor, "r")[positions])).view(DTYPES[tensor.dtype])


def _scale_in_file(path: Path, tensor: Stored, indices: torch.Tensor, scale: float) -> None:
    bits = _bits(path, tensor, "r+")
    chosen = torch.from_numpy(np.array(bits[indices.numpy()]))
    # through the same op as a resident model, so that both get the same bits
    ops.apply_sparse_(chosen.view(DTYPES[tensor.dtype]), torch.arange(len(chosen)), scale)
    bits[indices.numpy()] = chosen.numpy()
    bits.flush()


def _other_files(source: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Files to copy as they are, and files that may hold weights; hidden ones are neither."""
    files, left_out = [], []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or str(name) in shards or any(part.startswith(".") for part in name.parts):
            continue
        holds_weights = path.suffix in _WEIGHTS or (path.name.endswith(".index.json") and str(name) != INDEX)
        (left_out if holds_weights else files).append(str(name))
    return files, left_out
