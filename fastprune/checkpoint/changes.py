"""Changes that a mask makes in a checkpoint folder, and whether the folder holds the mask's model.

In: a mask and the records of the stored tensors. Out: the changes to each stored tensor. Only headers, samples and the
masked numbers are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastprune import ops
from fastprune.checkpoint.byte_edits import Edits, gather
from fastprune.checkpoint.shards import DTYPES, Stored
from fastprune.checkpoint.stored_names import Piece, places_of, width_of
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint_of_samples, other_fingerprint, sample_positions


@dataclass(frozen=True, eq=False)
class Change:
    """Change to one stored tensor.

    Attributes:
        stored: The tensor and its shard.
        indices: ``(n,)`` int64, flat in the stored tensor, ascending.
        old: ``(n,)`` in the tensor's dtype, the values without the mask.
    """

    stored: Stored
    indices: torch.Tensor
    old: torch.Tensor


def changes_of(mask: PruneMask, on_disk: Mapping[str, Stored], source: Path, strict: bool) -> dict[str, Change]:
    """The changes that a mask makes, by the names of the tensors on disk; unchanged tensors are left out.

    Args:
        mask: Its names must be those on disk, or differ by one common prefix.
        on_disk: Every stored tensor.
        source: The folder, for messages.
        strict: Refuse a checkpoint with another fingerprint than the mask's.

    Raises:
        MaskError: The mask does not fit: names, shapes, dtypes, or the fingerprint.
    """
    places = places_of(mask, on_disk)
    _check_model(mask, places, source, strict)
    parts: dict[str, list[torch.Tensor]] = {}
    for name, pieces in places.items():
        for piece, indices in _split(mask[name], pieces):
            if len(indices):
                parts.setdefault(piece.name, []).append(indices + piece.skipped)
    changes = {}
    for name, found in parts.items():
        merged = torch.cat(found).sort().values
        changes[name] = Change(on_disk[name], merged, _read(on_disk[name], merged))
    return changes


def edits_of(changes: Mapping[str, Change], scale: float) -> dict[Path, Edits]:
    """The changes as bytes, shard by shard."""
    by_shard: dict[Path, list[Change]] = {}
    for change in changes.values():
        by_shard.setdefault(change.stored.path, []).append(change)
    return {path: _edits(sorted(group, key=lambda c: c.stored.start), scale) for path, group in by_shard.items()}


def _edits(changes: list[Change], scale: float) -> Edits:
    new = [change.old.clone() for change in changes]
    for values in new:  # by the same op as a model in memory, so that both are bit-identical
        ops.apply_sparse_(values, torch.arange(len(values)), scale)
    return Edits(
        np.concatenate([_offsets(change.stored, change.indices) for change in changes]),
        np.concatenate([change.old.view(torch.uint8).numpy() for change in changes]),
        np.concatenate([values.view(torch.uint8).numpy() for values in new]),
    )


def _split(indices: torch.Tensor, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Ascending indices of a matrix, as those of each of its pieces."""
    bounds = torch.tensor([piece.first for piece in pieces[1:]], dtype=torch.int64)
    for piece, inside in zip(pieces, indices.tensor_split(torch.searchsorted(indices, bounds)), strict=True):
        yield piece, inside - piece.first


def _check_model(mask: PruneMask, places: Mapping[str, Sequence[Piece]], source: Path, strict: bool) -> None:
    expected = mask.metadata.get("fingerprint")
    if not strict or expected is None:
        return
    samples = {}
    for name, pieces in places.items():
        shape = mask.shapes[name]
        positions = sample_positions(math.prod(shape))
        samples[name] = shape, torch.cat([_read(piece.stored, inside) for piece, inside in _split(positions, pieces)])
    found = fingerprint_of_samples(samples)
    if found != expected:
        raise other_fingerprint(expected, found, str(source))


def _offsets(stored: Stored, indices: torch.Tensor) -> np.ndarray:
    """Offsets in the shard of every byte of some elements, int64 ``(n * width,)``."""
    width = width_of(stored)
    return (stored.start + indices.numpy()[:, None] * width + np.arange(width)).reshape(-1)


def _read(stored: Stored, indices: torch.Tensor) -> torch.Tensor:
    """Some elements of a stored tensor, ``(n,)`` in its dtype; the rest of it is not loaded."""
    return torch.from_numpy(gather(stored.path, _offsets(stored, indices))).view(DTYPES[stored.dtype])
