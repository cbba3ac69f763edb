"""Where the matrices of a mask lie in a checkpoint folder, and whether it is the mask's model.

In: a mask and the records of the stored tensors. Out: the name on disk of each matrix, and what to change in each
stored tensor. Only headers, samples and the masked numbers are read. It must not know transformers or model classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastprune import ops
from fastprune.errors import MaskError
from fastprune.masking.apply import split_name
from fastprune.masking.edits import Edits, gather
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint_of_samples, sample_positions
from fastprune.model.shards import DTYPES, Stored


@dataclass(frozen=True, eq=False)
class Change:
    """What a mask changes in one stored tensor.

    Attributes:
        stored: The tensor and its shard.
        indices: ``(n,)`` int64, flat in the stored tensor, ascending.
        old: ``(n,)`` in the tensor's dtype, what stands there without the mask.
    """

    stored: Stored
    indices: torch.Tensor
    old: torch.Tensor


def changes_of(mask: PruneMask, on_disk: Mapping[str, Stored], source: Path, strict: bool) -> dict[str, Change]:
    """What a mask changes, by the names of the tensors on disk; those of which it changes nothing are left out.

    Args:
        mask: Its names must be those on disk, or differ by one common prefix.
        on_disk: Every stored tensor.
        source: The folder, for messages.
        strict: Refuse a checkpoint with another fingerprint than the mask's.

    Raises:
        MaskError: The mask does not fit: names, shapes, dtypes, or the fingerprint.
    """
    names = _locate(mask, on_disk)
    matrices = {name: _matrix(on_disk[there], name) for name, there in names.items()}
    _check_fit(mask, matrices, source, strict)
    parts: dict[str, list[torch.Tensor]] = {}
    for name, there in names.items():
        if len(mask[name]):
            first = (matrices[name].start - on_disk[there].start) // _width(on_disk[there])
            parts.setdefault(there, []).append(mask[name] + first)
    changes = {}
    for there, indices in parts.items():
        merged = torch.cat(indices).sort().values
        changes[there] = Change(on_disk[there], merged, _read(on_disk[there], merged))
    return changes


def edits_of(changes: Mapping[str, Change], scale: float) -> dict[Path, Edits]:
    """The same as bytes, shard by shard."""
    by_shard: dict[Path, list[Change]] = {}
    for change in changes.values():
        by_shard.setdefault(change.stored.path, []).append(change)
    return {path: _edits(sorted(group, key=lambda c: c.stored.start), scale) for path, group in by_shard.items()}


def _edits(changes: list[Change], scale: float) -> Edits:
    new = [change.old.clone() for change in changes]
    for values in new:  # through the same op as a resident model, so that both get the same bits
        ops.apply_sparse_(values, torch.arange(len(values)), scale)
    return Edits(
        np.concatenate([_offsets(change.stored, change.indices) for change in changes]),
        np.concatenate([change.old.view(torch.uint8).numpy() for change in changes]),
        np.concatenate([values.view(torch.uint8).numpy() for values in new]),
    )


def _locate(mask: PruneMask, on_disk: Mapping[str, Stored]) -> dict[str, str]:
    """Mask name to name on disk; the names of the two may differ by one prefix, the same for all."""
    names = {name: split_name(name)[0] for name in mask}
    if not names:
        raise MaskError("the mask is over no matrices")
    fits = []
    for removed, added in _prefixes(next(iter(names.values())), on_disk):
        found = {name: added + base.removeprefix(removed) for name, base in names.items() if base.startswith(removed)}
        if len(found) == len(names) and all(there in on_disk for there in found.values()):
            fits.append(found)
    if not fits:
        raise MaskError(_why_missing(names, on_disk))
    if len(fits) > 1:
        raise MaskError(
            f"the names of the mask fit {len(fits)} sets of tensors in the checkpoint, under different prefixes"
        )
    return fits[0]


def _prefixes(name: str, on_disk: Mapping[str, Stored]) -> list[tuple[str, str]]:
    """(prefix of the mask's names, prefix on disk that stands for it); names that are equal leave no question."""
    if name in on_disk:
        return [("", "")]
    added = [("", other.removesuffix(name)) for other in on_disk if other.endswith(f".{name}")]
    heads = [name[: dot.end()] for dot in re.finditer(r"\.", name)]
    return added + [(head, "") for head in heads if name.removeprefix(head) in on_disk]


def _why_missing(names: Mapping[str, str], on_disk: Mapping[str, Stored]) -> str:
    missing = {name: base for name, base in names.items() if base not in on_disk}
    message = (
        f"the checkpoint lacks {len(missing)} of the {len(names)} matrices of the mask, the first is "
        f"{next(iter(missing.values()))}"
    )
    fused = next((base for name, base in missing.items() if split_name(name)[1] is not None), None)
    apart = next((name for name in on_disk if re.search(r"\.experts\.\d+\.", name)), None)
    if fused is None or apart is None:
        return message
    return (
        f"{message}; the reason: the checkpoint stores each expert on its own ({apart}), transformers fuses them into "
        f"{fused} when it loads them, so the mask's indices are no places on disk. Load the model, mask.apply_(model), "
        "model.save_pretrained(out_dir)"
    )


def _matrix(stored: Stored, name: str) -> Stored:
    """The tensor, or the one expert of it that the mask's name means."""
    expert = split_name(name)[1]
    if expert is None:
        return stored
    if len(stored.shape) < 2 or expert >= stored.shape[0]:
        raise MaskError(
            f"{name}: the tensor has the shape {stored.shape} in the checkpoint, so there is no such expert"
        )
    shape = stored.shape[1:]
    return replace(stored, shape=shape, start=stored.start + expert * math.prod(shape) * _width(stored))


def _check_fit(mask: PruneMask, matrices: Mapping[str, Stored], source: Path, strict: bool) -> None:
    for name, matrix in matrices.items():
        if matrix.shape != mask.shapes[name]:
            raise MaskError(
                f"{name} has the shape {matrix.shape} in the checkpoint and {mask.shapes[name]} in the mask"
            )
        _width(matrix)
    expected = mask.metadata.get("fingerprint")
    if not strict or expected is None:
        return
    samples = {name: (matrix.shape, _read(matrix, sample_positions(matrix.numel))) for name, matrix in matrices.items()}
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


def _offsets(stored: Stored, indices: torch.Tensor) -> np.ndarray:
    """Offsets in the shard of every byte of some elements, int64 ``(n * width,)``."""
    width = _width(stored)
    return (stored.start + indices.numpy()[:, None] * width + np.arange(width)).reshape(-1)


def _read(stored: Stored, indices: torch.Tensor) -> torch.Tensor:
    """Some elements of a stored tensor, ``(n,)`` in its dtype; the rest of it is not loaded."""
    return torch.from_numpy(gather(stored.path, _offsets(stored, indices))).view(DTYPES[stored.dtype])
