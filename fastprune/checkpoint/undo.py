"""A patch taken out of a checkpoint folder again, by its undo file.

In: a folder that was patched, wholly or in part. Out: the same folder with its original bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fastprune.checkpoint.byte_edits import scatter
from fastprune.checkpoint.undo_file import UNDO_NAME, check_undoable, read_undo
from fastprune.errors import ArgumentError, ArtifactError, NotFoundError
from fastprune.files import as_path, sha256, sync, try_lock


def undo_patch(folder: str | Path) -> Path:
    """Put the original bytes back into a patched folder and remove its undo file.

    It works on folders of :func:`patch_checkpoint` and :func:`patch_in_place`, also where a patch in place or an undo
    was killed on the way. All shards are checked before any is written.

    Args:
        folder: The patched folder.

    Returns:
        ``folder``.

    Raises:
        NotFoundError: The folder, its undo file, or a shard that this names does not exist.
        ArgumentError: A shard is a link or cannot be written, or another process is at work in the folder.
        ArtifactError: A shard was changed or replaced since it was patched, or the undo file is damaged; nothing is
            written.
    """
    folder = as_path(folder, "folder")
    check_folder("folder", folder)
    with alone(folder):
        take_out(folder)
    return folder


def take_out(folder: Path) -> None:
    """Put the original bytes back; the caller has locked the folder. Errors are those of :func:`undo_patch`."""
    undo = read_undo(folder)
    edits = undo.edits()
    for path, edit in edits.items():
        check_own(path)
        check_undoable(path, edit, undo.hashes[path])
    for path, edit in edits.items():
        scatter(path, edit.offsets, edit.old)
        if sha256(path) != undo.hashes[path].original:
            raise ArtifactError(f"{path} does not read back as written, the disk may fail; {UNDO_NAME} is kept")
    (folder / UNDO_NAME).unlink()
    sync(folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder: of two processes at once, each would take the other's weights for the original ones."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise ArgumentError(f"folder {folder}: another process is patching it or undoing a patch; wait for its end")
        yield
    finally:
        os.close(handle)


def check_folder(argument: str, folder: Path) -> None:
    """Raise NotFoundError unless a folder exists."""
    if not folder.is_dir():
        raise NotFoundError(f"{argument} {folder} does not exist or is not a folder")


def check_own(path: Path) -> None:
    """Raise ArgumentError for a shard with other names (caches are made of links), which a patch would change too."""
    if path.is_symlink() or path.stat().st_nlink > 1:
        raise ArgumentError(f"{path} shares its bytes with another name (a link); patch a copy instead")
    if not os.access(path, os.W_OK):
        raise ArgumentError(f"{path} cannot be written to")
