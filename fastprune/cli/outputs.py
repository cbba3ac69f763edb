"""What a command writes, and that it costs nothing that was there.

Declared in the annotations of parameters, see :mod:`fastprune.cli.frame`, and checked before the work, without torch. A
place to write to is tried, not judged by its permissions, which say little on read-only and virtual file systems; what
was made for the trial is gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fastprune.artifact import kind_of
from fastprune.calibration.generated_files import is_generated, partial_path
from fastprune.errors import ArgumentError, DiskError, FastpruneError
from fastprune.files import check_space, claimed, inside, try_lock

_Written = TypeVar("_Written")


@dataclass(frozen=True)
class OutputFile:
    """A parameter that names the file that a command writes.

    Attributes:
        kind: As in :mod:`fastprune.artifact`, or ``"rows"``.
    """

    kind: str


@dataclass(frozen=True)
class OutputFolder:
    """A parameter that names the folder that a command writes.

    Attributes:
        check: Takes the folder and whether ``--force`` was given; refuses what may not be replaced.
    """

    check: Callable[[Path, bool], None]


@contextlib.contextmanager
def output_file(
    out: Path, kind: str, inputs: Iterable[Path] = (), journal: Path | None = None, *, force: bool = False
) -> Iterator[None]:
    """Keep the name of an artifact from before the work until it is written.

    Args:
        out: The file.
        kind: What it will be, as for :class:`OutputFile`.
        inputs: Files that the command reads, and folders of which it reads files.
        journal: Folder that is removed when the output is written.
        force: Replace a file of the same kind.

    Raises:
        ArgumentError: It cannot be written, writing it would destroy something or add to a checkpoint (some loaders
            take every safetensors file there for weights), or another process is about to write it.
    """
    try:
        if out.is_dir():
            raise ArgumentError(f"expected a file, got the folder {out}", argument="out")
        _try_writing_in(Path(os.path.realpath(out)).parent)
    except OSError as error:
        raise ArgumentError(
            f"expected a file in a folder that can be written to, got {out} ({error})", argument="out"
        ) from error
    for path in inputs:
        if path.exists():
            _check_apart(out, path)
    if journal is not None and inside(out, journal):
        raise ArgumentError(
            f"expected a file outside of the journal {journal}, which is removed when the scores are written, "
            f"got {out}",
            argument="out",
        )
    if out.suffix == ".safetensors" and _is_checkpoint(folder := Path(os.path.realpath(out)).parent):
        raise _among_weights(out, folder)
    continued = partial_path(out).exists() or (journal is not None and (journal / "journal.jsonl").is_file())
    _check_replaceable(out, kind, force or continued)
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
            raise ArgumentError(
                f"expected a folder that can be written to, got {out} ({error})", argument="out"
            ) from error
        if _is_checkpoint(out):
            raise ArgumentError(f"expected a folder of its own, got the checkpoint {out}", argument="out")
        if not try_lock(handle):
            raise ArgumentError(
                f"expected a folder that nobody else is writing to, got {out}, which another process is writing to "
                "now; wait for its end, or name another",
                argument="out",
            )
        yield
    finally:
        if handle is not None:
            os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # of a folder that holds something
                folder.rmdir()


def check_report(out: Path, force: bool, artifacts: Iterable[tuple[str, str]] = ()) -> None:
    """Refuse a folder where a report would replace something.

    Args:
        out: The folder of the report.
        force: Replace an earlier report.
        artifacts: Name and kind of files that are written with the report.

    Raises:
        ArgumentError: Names the file, or the folder of the earlier report.
    """
    from fastprune.reporting.report import check_replaceable

    check_replaceable(out)
    for name, kind in artifacts:
        _check_replaceable(out / name, kind, force)
    if not force and (out / "record.json").exists():
        raise ArgumentError(
            f"expected a new folder, got {out}, which holds an earlier report; give --force to replace it, or name "
            "another folder",
            argument="out",
        )


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
        raise ArgumentError(
            f"expected another file than the inputs, got {out}, which would be overwritten", argument="out"
        )
    if path.is_dir() and inside(out, path):
        if out.exists():
            raise ArgumentError(
                f"expected no file of the input {path}, got {out}, which would be overwritten", argument="out"
            )
        if out.suffix == ".safetensors":
            raise _among_weights(out, path)


def _check_replaceable(out: Path, kind: str, force: bool) -> None:
    """An empty file may be replaced, and with ``force`` one of the same kind; anything else is never replaced."""
    if not out.exists() or (out.is_file() and out.stat().st_size == 0):
        return
    found = None
    if out.is_file():
        found = "rows" if is_generated(out) else kind_of(out)
    if found != kind:
        what = f"{out}, a {found} file" if found else f"{out}, which fastprune did not write"
        raise ArgumentError(
            f"expected a new name, or a {kind} file to replace, got {what}; --force replaces {kind} files only, so "
            "move it away, or name another file",
            argument="out",
        )
    if not force:
        raise ArgumentError(
            f"expected a new name, got {out}, a {kind} file; give --force to replace it, or name another file",
            argument="out",
        )


def _among_weights(out: Path, folder: Path) -> ArgumentError:
    return ArgumentError(
        f"expected a file outside of {folder}, where some loaders would take it for weights, got {out}", argument="out"
    )


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _try_writing_in(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass
