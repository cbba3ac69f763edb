"""A mask written into a checkpoint folder, or into a copy of one, without loading the model.

In: a Hugging Face folder of safetensors shards, and a mask. Out: the masked weights scaled in the shards, and next to
them an undo file with their original values; every other byte is unchanged. One shard is read at a time, window by
window.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastprune.checkpoint.byte_edits import hashes, scatter
from fastprune.checkpoint.changes import changes_of, edits_of
from fastprune.checkpoint.shards import INDEX, SINGLE, shard_names, stored_tensors
from fastprune.checkpoint.undo import alone, check_folder, check_own, take_out, undo_patch
from fastprune.checkpoint.undo_file import UNDO_NAME, Hashes, Undo, check_whole, write_undo
from fastprune.errors import ArgumentError, FastpruneWarning, NotFoundError
from fastprune.files import as_path, check_space, claimed, inside, replacing, sha256, sync
from fastprune.masking.mask import PruneMask
from fastprune.masking.storable import check_storable, checked_stored_scale

__all__ = ["patch_checkpoint", "patch_in_place", "undo_patch"]

# Endings of other copies of the weights, which would leave the unpruned model in the folder of the pruned one.
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pdparams"}
_BACKUP = ".bak"


def patch_checkpoint(
    in_dir: str | Path,
    mask: PruneMask,
    out_dir: str | Path,
    *,
    scale: float = 0.0,
    strict: bool = True,
    undo: bool = True,
) -> Path:
    """Copy a checkpoint folder with a mask applied.

    Configuration and tokenizer files are copied as they are; other copies of the weights (``.bin``, ``.gguf``, …) are
    left out. ``fastprune.undo`` in the copy holds the original values: :func:`undo_patch` gives the weights of
    ``in_dir`` again. That file restores what was removed, so pass ``undo=False`` for a folder that is shared. The
    folder appears under its name when it is complete.

    Masks that remove refusals stay in memory: those selected by ``signed_reverse``, those whose harm set is mostly
    refusals, and combinations of these by set algebra.

    Args:
        in_dir: Folder with ``model.safetensors`` or shards and ``model.safetensors.index.json``. It may have been
            patched before: the undo file of the copy then restores that state, not the first one.
        mask: The mask; its names must be those on disk, or differ by one common prefix.
        out_dir: Must not exist or be empty.
        scale: Factor for the masked weights, in [0, 1]; 0 writes +0.
        strict: Refuse a checkpoint with another fingerprint than the mask's.
        undo: Write ``fastprune.undo``.

    Returns:
        ``out_dir``.

    Raises:
        NotFoundError: ``in_dir``, its weights, or the folder to write into do not exist.
        ArgumentError: ``out_dir`` is not empty, a link, the current folder, in ``in_dir``, or being written by another
            process; ``mask`` is no mask (a path, for example); or ``scale`` is outside [0, 1].
        ArtifactError: A shard or the index is truncated or not what its name says, or an earlier patch of ``in_dir``
            in place was interrupted.
        MaskError: The mask does not fit (names, shapes, dtypes, or the fingerprint), or may not be written to disk.
        DiskError: There is no room for the copy.

    Warns:
        FastpruneWarning: Other copies of the weights were left out.
    """
    source, target = as_path(in_dir, "in_dir"), as_path(out_dir, "out_dir")
    _check_mask(mask)
    scale = checked_stored_scale(scale)
    check_folder("in_dir", source)
    if not target.absolute().parent.is_dir():
        raise NotFoundError(
            f"the folder {target.absolute().parent} does not exist; make it, or name another", argument="out_dir"
        )
    if target.is_symlink() or target.resolve() == Path.cwd():
        raise ArgumentError(
            f"expected the name of a new folder, got {target}, a link or the current folder", argument="out_dir"
        )
    _check_empty(target)
    if inside(target, source):
        raise ArgumentError(f"expected a folder outside of in_dir {source}, got {target}", argument="out_dir")
    shards = shard_names(source)
    changes = changes_of(mask, stored_tensors(source), source, strict)
    check_whole(source)
    files, left_out = _other_files(source, shards)
    if left_out:
        message = f"{source}: left out other copies of the weights, which are not pruned: {', '.join(left_out)}"
        warnings.warn(message, FastpruneWarning, stacklevel=2)

    edits = edits_of(changes, scale)
    found: dict[Path, Hashes] = {}
    with claimed(target, "out_dir"):
        _check_empty(target)  # another process may have finished it since
        needed = sum((source / file).stat().st_size for file in [*shards, *files])
        check_space(target.absolute().parent, needed, f"out_dir {target}")
        with _replacing_folder(target) as work:
            for file in [*shards, *files]:
                (work / file).parent.mkdir(parents=True, exist_ok=True)
                if (edit := edits.get(source / file)) is None:
                    shutil.copyfile(source / file, work / file)
                else:
                    found[source / file] = Hashes(*hashes(source / file, edit.offsets, edit.new, copy_to=work / file))
            if undo:
                write_undo(work, Undo(mask.digest, scale, changes, found))
    return target


def patch_in_place(
    folder: str | Path,
    mask: PruneMask,
    *,
    backup: bool = False,
    scale: float = 0.0,
    strict: bool = True,
    undo: bool = True,
) -> Path:
    """Apply a mask to the weights of a checkpoint folder in place; :func:`undo_patch` takes it out again.

    Safe against a crash at any moment: before the first weight is written, ``fastprune.undo`` is on the disk with every
    original value and with the hash of every shard before and after. A process that is killed on the way leaves some
    masked weights old and some new, and everything else unchanged. The undo then puts every old value back, once it has
    checked that each masked byte is the old or the new one, and that the shard with the old ones has the hash of the
    original. The same holds for an undo that is killed. An exception or Ctrl-C takes the patch out before it leaves
    this call.

    Args:
        folder: As ``in_dir`` of :func:`patch_checkpoint`. Its shards must be files of its own, no links.
        mask: As there.
        backup: First copy each shard that is changed to ``<shard>.bak``, which loaders ignore. fastprune never reads
            or removes these copies.
        scale: Factor for the masked weights, in [0, 1]; 0 writes +0.
        strict: Refuse a checkpoint with another fingerprint than the mask's.
        undo: Keep ``fastprune.undo``. Without it the file exists only while weights are written, so that a process that
            is killed on the way can be undone; once it is removed, nothing undoes the patch.

    Returns:
        ``folder``.

    Raises:
        NotFoundError: The folder or its weights do not exist.
        ArgumentError: The folder is patched already or being patched, a shard is a link or cannot be written, another
            backup exists, ``backup`` is requested without ``undo``, ``mask`` is no mask (a path, for example), or
            ``scale`` is outside [0, 1].
        ArtifactError: A shard or the index is truncated or not what its name says.
        MaskError: The mask does not fit (names, shapes, dtypes, or the fingerprint), or may not be written to disk, as
            in :func:`patch_checkpoint`.

    Warns:
        FastpruneWarning: The folder holds other copies of the weights, which are not pruned.
    """
    folder = as_path(folder, "folder")
    _check_mask(mask)
    scale = checked_stored_scale(scale)
    if backup and not undo:
        raise ArgumentError(
            "expected no backup with undo=False, which leaves nothing of the old weights", argument="backup"
        )
    check_folder("folder", folder)
    with alone(folder):
        if (folder / UNDO_NAME).exists():
            raise ArgumentError(
                f"folder {folder} holds {UNDO_NAME}: a mask was patched into it, wholly or in part; undo that first, "
                "or remove the file to keep that patch for good"
            )
        shards = shard_names(folder)
        changes = changes_of(mask, stored_tensors(folder), folder, strict)
        edits = edits_of(changes, scale)
        for path in edits:
            check_own(path)
        found = {path: Hashes(*hashes(path, edit.offsets, edit.new)) for path, edit in edits.items()}
        # Before the first byte is written: a warning that is turned into an error leaves the folder as it was.
        if other := [name for name in _other_files(folder, shards)[1] if not name.endswith(_BACKUP)]:
            message = f"{folder}: other copies of the weights in it are not pruned: {', '.join(other)}"
            warnings.warn(message, FastpruneWarning, stacklevel=2)
        if backup:
            for path, expected in found.items():
                _back_up(path, expected.original)
        try:
            write_undo(folder, Undo(mask.digest, scale, changes, found))
            for path, edit in edits.items():
                scatter(path, edit.offsets, edit.new)
        except BaseException:
            if (folder / UNDO_NAME).exists():
                take_out(folder)
            raise
        if not undo:
            (folder / UNDO_NAME).unlink()
            sync(folder)
    return folder


@contextlib.contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """As :func:`fastprune.files.replacing`; a folder that another process has filled meanwhile is kept."""
    try:
        with replacing(target, durable=True) as work:
            work.mkdir()
            yield work
    except OSError:
        _check_empty(target)  # the likely reason, and the better message
        raise


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError(f"expected a new or an empty folder, got {target}, which is neither", argument="out_dir")


def _check_mask(mask: PruneMask) -> None:
    if not isinstance(mask, PruneMask):
        is_path = isinstance(mask, str | os.PathLike)
        way_out = f"; fastprune.PruneMask.load({os.fspath(mask)!r}) reads one" if is_path else ""
        raise ArgumentError(f"expected a PruneMask, got {type(mask).__name__}{way_out}", argument="mask")
    check_storable(mask.metadata)


def _back_up(path: Path, original: str) -> None:
    target = path.with_name(path.name + _BACKUP)
    if target.exists():  # from an earlier run that was stopped or undone
        if not target.is_file() or sha256(target) != original:
            raise ArgumentError(f"{target} exists and is no copy of {path.name}; move it away", argument="backup")
        return
    with replacing(target, durable=True) as temporary:
        shutil.copyfile(path, temporary)


def _other_files(source: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Files to copy as they are, and files that may hold weights; hidden ones and an undo file are neither."""
    files: list[str] = []
    left_out: list[str] = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if str(name) in [*shards, UNDO_NAME] or not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        holds_weights = path.suffix in {*_WEIGHTS, _BACKUP} or (
            path.name.endswith(".index.json") and (str(name) != INDEX or SINGLE in shards)
        )
        (left_out if holds_weights else files).append(str(name))
    return files, left_out
