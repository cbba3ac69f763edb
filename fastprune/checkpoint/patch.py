"""A mask written into a checkpoint folder, or into a copy of one, without ever loading the model; and taken out again.

In: a Hugging Face folder of safetensors shards, and a mask. Out: the masked weights scaled where they stand, and beside
them a file with what they were; every other byte of every tensor is as it was. One shard at a time is read, window by
window. It must not know transformers or model classes.
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
from fastprune.checkpoint.undo_file import UNDO_NAME, Hashes, Undo, check_undoable, check_whole, read_undo, write_undo
from fastprune.errors import ArgumentError, ArtifactError, FastpruneWarning, NotFoundError
from fastprune.files import as_path, check_space, claimed, inside, replacing, sha256, sync, try_lock
from fastprune.masking.mask import PruneMask
from fastprune.masking.storable import check_storable, checked_stored_scale

# Other copies of the weights: they would be the unpruned model inside the pruned one's folder.
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
    left out. Beside the weights lies ``fastprune.undo`` with the original values: :func:`undo_patch` on the copy gives
    the weights of ``in_dir`` again. So whoever has that file has what was removed: write no undo file into a folder
    that is passed on. The folder appears under its name when it is complete.

    Masks that remove refusals stay in memory: those selected by ``signed_reverse``, those whose harm set is mostly
    refusals, and what set algebra makes of these.

    Args:
        in_dir: Folder with ``model.safetensors`` or shards and ``model.safetensors.index.json``. It may have been
            patched itself: the undo file of the copy then leads back to that state and no further.
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
            process; ``mask`` is no mask (but its file, say); or ``scale`` is outside [0, 1].
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
    _check_folder("in_dir", source)
    if not target.absolute().parent.is_dir():
        raise NotFoundError(f"out_dir {target}: the folder {target.absolute().parent} does not exist")
    if target.is_symlink() or target.resolve() == Path.cwd():
        raise ArgumentError(f"out_dir {target}: expected the name of a new folder, got a link or the current folder")
    _check_empty(target)
    if inside(target, source):
        raise ArgumentError(f"out_dir: expected a folder outside of in_dir {source}, got {target}")
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
    """Apply a mask to the weights of a checkpoint folder where they lie; :func:`undo_patch` takes it out again.

    Safe against a crash at any moment: before the first weight is written, ``fastprune.undo`` is on the disk with every
    original value and with the hash of every shard before and after. A process that is killed half way leaves some
    masked weights old and some new, and everything else as it was. Which is which need not be known: the undo puts
    every old value back, after it has seen that each masked byte is the old or the new one and that the shard with the
    old ones has the hash of the original. The same holds for an undo that is killed. An exception or Ctrl-C takes the
    patch out before it leaves this call.

    Args:
        folder: As ``in_dir`` of :func:`patch_checkpoint`. Its shards must be files of its own, no links.
        mask: As there.
        backup: First copy each shard that is changed to ``<shard>.bak``, which loaders ignore. Nothing here reads or
            removes these copies.
        scale: Factor for the masked weights, in [0, 1]; 0 writes +0.
        strict: Refuse a checkpoint with another fingerprint than the mask's.
        undo: Keep ``fastprune.undo``. Without it the file is there while weights are written, so that a process that is
            killed half way can be undone, and is removed when all are: from then on nothing undoes the patch.

    Returns:
        ``folder``.

    Raises:
        NotFoundError: The folder or its weights do not exist.
        ArgumentError: The folder is patched already or being patched, a shard is a link or cannot be written, another
            backup is there, ``backup`` is asked for without ``undo``, ``mask`` is no mask (but its file, say), or
            ``scale`` is outside [0, 1].
        ArtifactError: A shard or the index is truncated or not what its name says.
        MaskError: The mask does not fit (names, shapes, dtypes, or the fingerprint), or may not be written to disk, as
            in :func:`patch_checkpoint`.

    Warns:
        FastpruneWarning: There are other copies of the weights in the folder; they are not pruned.
    """
    folder = as_path(folder, "folder")
    _check_mask(mask)
    scale = checked_stored_scale(scale)
    if backup and not undo:
        raise ArgumentError("backup: expected no backup with undo=False, which is to leave nothing of the old weights")
    _check_folder("folder", folder)
    with _alone(folder):
        if (folder / UNDO_NAME).exists():
            raise ArgumentError(
                f"folder {folder} holds {UNDO_NAME}: a mask was patched into it, wholly or in part; undo that first, "
                "or remove the file to keep that patch for good"
            )
        shards = shard_names(folder)
        changes = changes_of(mask, stored_tensors(folder), folder, strict)
        edits = edits_of(changes, scale)
        for path in edits:
            _check_own(path)
        found = {path: Hashes(*hashes(path, edit.offsets, edit.new)) for path, edit in edits.items()}
        # Before the first byte: who turns warnings into errors has the folder as it was.
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
                _undo(folder)
            raise
        if not undo:
            (folder / UNDO_NAME).unlink()
            sync(folder)
    return folder


def undo_patch(folder: str | Path) -> Path:
    """Put the original bytes back into a patched folder and remove its undo file.

    It works on what :func:`patch_checkpoint` and :func:`patch_in_place` made, and on what either a patch in place or an
    undo left behind when it was killed. All shards are checked before any is written.

    Args:
        folder: The patched folder.

    Returns:
        ``folder``.

    Raises:
        NotFoundError: The folder, its undo file, or a shard that this names does not exist.
        ArgumentError: A shard is a link or cannot be written, or another process is at work in the folder.
        ArtifactError: A shard was changed or replaced since it was patched, or the undo file is damaged; the message
            names it, and nothing is written.
    """
    folder = as_path(folder, "folder")
    _check_folder("folder", folder)
    with _alone(folder):
        _undo(folder)
    return folder


def _undo(folder: Path) -> None:
    undo = read_undo(folder)
    edits = undo.edits()
    for path, edit in edits.items():
        _check_own(path)
        check_undoable(path, edit, undo.hashes[path])
    for path, edit in edits.items():
        scatter(path, edit.offsets, edit.old)
        if sha256(path) != undo.hashes[path].original:
            raise ArtifactError(f"{path} does not read as it was written, its disk may fail; {UNDO_NAME} is kept")
    (folder / UNDO_NAME).unlink()
    sync(folder)


@contextlib.contextmanager
def _replacing_folder(target: Path) -> Iterator[Path]:
    """As :func:`fastprune.files.replacing`; a folder that somebody else has filled meanwhile stays as it is."""
    try:
        with replacing(target, durable=True) as work:
            work.mkdir()
            yield work
    except OSError:
        _check_empty(target)  # says so if that is why it could not be moved there
        raise


def _check_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArgumentError(f"out_dir {target} must not exist or be an empty folder")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two at once would each take the other's weights for the original ones."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise ArgumentError(f"folder {folder}: another process is patching it or undoing a patch; wait for its end")
        yield
    finally:
        os.close(handle)


def _check_mask(mask: PruneMask) -> None:
    if not isinstance(mask, PruneMask):
        way = (
            f"; fastprune.PruneMask.load({os.fspath(mask)!r}) reads one" if isinstance(mask, str | os.PathLike) else ""
        )
        raise ArgumentError(f"mask must be a PruneMask, got {type(mask).__name__}{way}")
    check_storable(mask.metadata)


def _check_folder(argument: str, folder: Path) -> None:
    if not folder.is_dir():
        raise NotFoundError(f"{argument} {folder} does not exist or is not a folder")


def _check_own(path: Path) -> None:
    """Other names of the same bytes (the hub's cache is made of links) would be changed unseen."""
    if path.is_symlink() or path.stat().st_nlink > 1:
        raise ArgumentError(f"{path} shares its bytes with another name (a link); patch a copy instead")
    if not os.access(path, os.W_OK):
        raise ArgumentError(f"{path} cannot be written to")


def _back_up(path: Path, original: str) -> None:
    target = path.with_name(path.name + _BACKUP)
    if target.exists():  # of an earlier run, stopped or undone
        if not target.is_file() or sha256(target) != original:
            raise ArgumentError(f"backup: {target} exists and is no copy of {path.name}; move it away")
        return
    with replacing(target, durable=True) as temporary:
        shutil.copyfile(path, temporary)


def _other_files(source: Path, shards: list[str]) -> tuple[list[str], list[str]]:
    """Files to copy as they are, and files that may hold weights; hidden ones and an undo file are neither."""
    files, left_out = [], []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if str(name) in [*shards, UNDO_NAME] or not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        holds_weights = path.suffix in {*_WEIGHTS, _BACKUP} or (
            path.name.endswith(".index.json") and (str(name) != INDEX or SINGLE in shards)
        )
        (left_out if holds_weights else files).append(str(name))
    return files, left_out
