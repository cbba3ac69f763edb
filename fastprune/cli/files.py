"""Where a command writes: refused before any work if it cannot be written, or if something would be lost.

In: the path of an output and those of the inputs. Out: the name, kept for this process as long as the command runs, or
an error. A place is tried, not judged by its permissions, which say little on read-only and virtual file systems; what
was made for the trial is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from fastprune.artifact import kind_of
from fastprune.errors import ArgumentError, DiskError, FastpruneError
from fastprune.files import check_space, claimed, inside, try_lock

_Written = TypeVar("_Written")


@contextlib.contextmanager
def output_file(
    out: Path, kind: str, inputs: Iterable[Path | None] = (), journal: Path | None = None
) -> Iterator[None]:
    """Keep the name of an artifact from before the work until it is written.

    Args:
        out: The file; one of the same kind that is there will be replaced.
        kind: What it will be, as in :mod:`fastprune.artifact`.
        inputs: Files that the command reads, and folders of which it reads files; ``None`` is passed over.
        journal: Folder that is removed when the output is written.

    Raises:
        ArgumentError: It cannot be written, writing it would destroy something or add to a checkpoint (some loaders
            take every safetensors file there for weights), or another process is about to write it.
    """
    try:
        if out.is_dir():
            raise ArgumentError(f"out: expected a file, got the folder {out}")
        _try_writing_in(Path(os.path.realpath(out)).parent)
    except OSError as error:
        raise ArgumentError(f"out: expected a file in a folder that can be written to, got {out} ({error})") from error
    for path in inputs:
        if path is not None and path.exists():
            _check_apart(out, path)
    if journal is not None and inside(out, journal):
        raise ArgumentError(
            f"out: expected a file outside of the journal {journal}, which is removed when the scores are written, "
            f"got {out}"
        )
    if out.suffix == ".safetensors" and _is_checkpoint(folder := Path(os.path.realpath(out)).parent):
        raise _among_weights(out, folder)
    _check_replaceable(out, kind)
    with claimed(out, "out"):
        yield


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Keep a folder for this process, from before the work until everything is written; gone again if it is empty then.

    Raises:
        ArgumentError: It is a file or a checkpoint, nothing can be written there, or another process is writing to it.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    handle = None
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            _try_writing_in(out)
            handle = os.open(out, os.O_RDONLY)
        except OSError as error:
            raise ArgumentError(f"out: expected a folder that can be written to, got {out} ({error})") from error
        if _is_checkpoint(out):
            raise ArgumentError(f"out: expected a folder of its own, got the checkpoint {out}")
        if not try_lock(handle):
            raise ArgumentError(
                f"out: expected a folder that nobody else is writing to, got {out}, which another process is writing "
                "to now; wait for its end, or name another"
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # of a folder that holds something
                folder.rmdir()


def check_report(out: Path, artifacts: Iterable[tuple[str, str]] = ()) -> None:
    """Refuse a folder where a report would replace what is none of fastprune's.

    Args:
        out: The folder of the report.
        artifacts: Name and kind of files beside the report.

    Raises:
        ArgumentError: Names the file.
    """
    from fastprune.reporting.report import check_replaceable

    check_replaceable(out)
    for name, kind in artifacts:
        _check_replaceable(out / name, kind)


def check_room(out: Path, model: Path, fractions: list[float]) -> None:
    """Refuse a pass whose scores have no room on the disk.

    Args:
        out: Where the scores go.
        model: The checkpoint.
        fractions: What is kept of every matrix, for each criterion of each set.

    Raises:
        DiskError: Says what is needed and what there is.
    """
    from fastprune.checkpoint.shards import stored_tensors
    from fastprune.planning.list_lengths import stored_bytes

    if all(0 < fraction <= 1 for fraction in fractions):  # others are refused by the pass
        # Of all matrices, embeddings too: a little too much, and no model has to be built to know it.
        sizes = [stored.numel for stored in stored_tensors(model).values() if len(stored.shape) > 1]
        needed = stored_bytes(sizes, fractions)
        check_space(Path(os.path.realpath(out)).parent, needed, f"out {out}")


def check_journal(folder: Path, model: Path) -> None:
    """Refuse to keep a journal, which holds safetensors files, among a checkpoint's.

    Raises:
        ArgumentError: It is the model's folder, or in it.
    """
    if inside(folder, model):
        raise ArgumentError(f"resume: expected a folder of its own, got the model's, {folder}")


def written(out: Path, write: Callable[[Path], _Written]) -> _Written:
    """Write a result that took long, and if that fails, write it to the folder for temporary files instead.

    Args:
        out: The file or folder.
        write: Writes to the path that it is given.

    Returns:
        What ``write`` returns.

    Raises:
        DiskError: ``out`` could not be written; says where the result is.
        FastpruneError, OSError: It could not be written there either.
    """
    try:
        return write(out)
    except (FastpruneError, OSError) as error:
        folder = None
        try:
            folder = Path(tempfile.mkdtemp(prefix="fastprune-result-"))
            write(folder / out.name)
        except (FastpruneError, OSError):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            raise error from None
        raise DiskError(f"{error}; the result is not lost: it is in {folder / out.name}") from error


def _check_apart(out: Path, path: Path) -> None:
    """Refuse an output that is an input, or a file of one."""
    if out.exists() and out.samefile(path):
        raise ArgumentError(f"out: expected another file than the inputs, got {out}, which would be overwritten")
    if path.is_dir() and inside(out, path):
        if out.exists():
            raise ArgumentError(f"out: expected no file of the input {path}, got {out}, which would be overwritten")
        if out.suffix == ".safetensors":
            raise _among_weights(out, path)


def _check_replaceable(out: Path, kind: str) -> None:
    """An empty file and one of the same kind may be replaced; anything else is somebody's work."""
    if not out.exists() or (out.is_file() and out.stat().st_size == 0):
        return
    found = kind_of(out) if out.is_file() else None
    if found != kind:
        came = f"{out}, a {found} file" if found else f"{out}, which fastprune did not write"
        raise ArgumentError(
            f"out: expected a new name, or a {kind} file to replace, got {came}; move it away, or name another file"
        )


def _among_weights(out: Path, folder: Path) -> ArgumentError:
    return ArgumentError(
        f"out: expected a file outside of {folder}, where some loaders would take it for weights, got {out}"
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _try_writing_in(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass
