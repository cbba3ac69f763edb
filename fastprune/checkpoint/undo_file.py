"""The undo file of a patch, which holds the original weights: read, written, and compared with the shards.

In: changes by tensor and the hashes of the shards before and after. Out: one artifact in the folder, or the changes
again. It is a safetensors file without that ending, as some loaders take every such file in a folder for weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastprune.artifact import read_artifact, write_artifact
from fastprune.checkpoint.byte_edits import Edits, gather, hashes
from fastprune.checkpoint.changes import Change, edits_of
from fastprune.checkpoint.shards import DTYPES, Stored, read_header
from fastprune.errors import ArtifactError, NotFoundError
from fastprune.files import sha256

UNDO_NAME = "fastprune.undo"


@dataclass(frozen=True)
class Hashes:
    """SHA-256 of one shard, of the whole file.

    Attributes:
        original: Before the patch.
        patched: After it; ``sha256sum`` shows the same.
    """

    original: str
    patched: str


@dataclass(frozen=True)
class Undo:
    """Content of an undo file.

    Attributes:
        mask: Digest of the mask.
        scale: Factor on the masked weights.
        changes: Stored tensor to its change.
        hashes: Path of each changed shard to its hashes.
    """

    mask: str
    scale: float
    changes: Mapping[str, Change]
    hashes: Mapping[Path, Hashes]

    def edits(self) -> dict[Path, Edits]:
        """The changes as bytes, shard by shard."""
        return edits_of(self.changes, self.scale)


def write_undo(folder: Path, undo: Undo) -> Path:
    """Write the undo file of a folder; it is on the disk when this returns."""
    tensors: dict[str, torch.Tensor] = {}
    for name, change in undo.changes.items():
        tensors |= {f"indices:{name}": change.indices, f"old:{name}": change.old}
    content = {
        "mask": undo.mask,
        "scale": undo.scale,
        "shards": {path.name: {"original": h.original, "patched": h.patched} for path, h in undo.hashes.items()},
        "tensors": {
            name: {"shard": c.stored.path.name, "dtype": c.stored.dtype, "shape": c.stored.shape}
            for name, c in undo.changes.items()
        },
    }
    return write_artifact(folder / UNDO_NAME, "undo", tensors, content, durable=True)


def read_undo(folder: Path) -> Undo:
    """Read the undo file of a folder, and find the tensors that it names.

    Raises:
        NotFoundError: The folder holds none, or a shard that it names is missing.
        ArtifactError: It is damaged, or a shard does not hold the tensors any more.
    """
    path = folder / UNDO_NAME
    if not path.is_file():
        raise NotFoundError(f"{folder} holds no {UNDO_NAME}, so there is no patch to undo")
    tensors, content = read_artifact(path, "undo")
    try:
        shards = {_shard(folder, name): Hashes(**entry) for name, entry in content["shards"].items()}
        stored = {shard: read_header(shard) for shard in shards}
        changes = {}
        for name, entry in content["tensors"].items():
            shard = _shard(folder, entry["shard"])
            found = stored[shard].get(name)
            if found is None or (found.dtype, list(found.shape)) != (entry["dtype"], entry["shape"]):
                raise ArtifactError(
                    f"{shard} is not as the patch left it: {name} should be {entry['dtype']} {entry['shape']}"
                )
            changes[name] = Change(found, *_checked(tensors[f"indices:{name}"], tensors[f"old:{name}"], found))
        return Undo(content["mask"], float(content["scale"]), changes, shards)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path}: this undo file is damaged ({error})") from error


def check_whole(folder: Path) -> None:
    """Raise ArtifactError if a patch of this folder was interrupted, or its shards were changed since."""
    if (folder / UNDO_NAME).is_file():
        for path, expected in read_undo(folder).hashes.items():
            if sha256(path) != expected.patched:
                raise ArtifactError(
                    f"{path} is not as {folder / UNDO_NAME} says that a patch left it (interrupted, or changed since); "
                    "undo that patch first"
                )


def check_undoable(path: Path, edits: Edits, expected: Hashes) -> None:
    """Raise ArtifactError unless putting the old bytes back into a shard gives the original.

    Each masked byte must be the old or the new one: an interrupted patch, or an interrupted undo, leaves a mixture.
    """
    found = gather(path, edits.offsets) if path.stat().st_size > edits.offsets[-1] else None
    known = found is not None and bool(((found == edits.old) | (found == edits.new)).all())
    if not known or hashes(path, edits.offsets, edits.old)[1] != expected.original:
        raise ArtifactError(
            f"{path} is not as the patch left it: it was changed or replaced since, so the old weights do not belong "
            "to it; nothing was written"
        )


def _shard(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"it names a shard outside the folder: {name!r}")
    if not (folder / name).is_file():
        raise NotFoundError(f"{folder / UNDO_NAME} names the shard {name}, which does not exist")
    return folder / name


def _checked(indices: torch.Tensor, old: torch.Tensor, found: Stored) -> tuple[torch.Tensor, torch.Tensor]:
    ascending = np.diff(indices.numpy(), prepend=-1) if indices.dtype == torch.int64 and indices.ndim == 1 else [0]
    if min(ascending, default=0) < 1 or indices[-1] >= found.numel:
        raise ValueError("indices are not ascending places of their tensor")
    if old.dtype != DTYPES[found.dtype] or old.shape != indices.shape:
        raise ValueError("old values do not fit their tensor")
    return indices, old
