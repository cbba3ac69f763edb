"""Where a command writes: refused before any work if it cannot be written, or is one of the inputs.

In: the path of an output and those of the inputs. Out: nothing, or an error. A place is tried, not judged by its
permissions, which say little on read-only and virtual file systems; what was made for the trial is gone afterwards.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastprune.errors import ArgumentError


def check_output_file(out: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Refuse a file that cannot be written, or whose writing would destroy an input or add to a checkpoint.

    Args:
        out: The file; if it exists, it will be replaced.
        inputs: Files that the command reads, and folders of which it reads files; ``None`` is passed over.

    Raises:
        ArgumentError: It is a folder, in none that can be written to, one of the inputs, or a safetensors file in a
            folder that is one: some loaders take each of those for weights.
    """
    try:
        if out.is_dir():
            raise ArgumentError(f"out: expected a file, got the folder {out}")
        _try_writing_in(out.resolve().parent)
    except OSError as error:
        raise ArgumentError(f"out: expected a file in a folder that can be written to, got {out} ({error})") from error
    for path in inputs:
        if path is None or not path.exists():
            continue
        if out.exists() and out.samefile(path):
            raise ArgumentError(f"out: expected another file than the inputs, got {out}, which would be overwritten")
        inside = path.is_dir() and path.samefile(out.resolve().parent)
        if inside and out.exists():
            raise ArgumentError(f"out: expected no file of the input {path}, got {out}, which would be overwritten")
        if inside and out.suffix == ".safetensors":
            raise ArgumentError(
                f"out: expected a file outside of {path}, where some loaders would take it for weights, got {out}"
            )


def check_journal(folder: Path, model: Path) -> None:
    """Refuse to keep a journal, which holds safetensors files, among a checkpoint's.

    Raises:
        ArgumentError: The two folders are one.
    """
    if folder.exists() and model.exists() and folder.samefile(model):
        raise ArgumentError(f"resume: expected a folder of its own, got the model's, {folder}")


def check_output_folder(out: Path) -> None:
    """Refuse a folder that cannot be made or written to; it need not be there yet, and is not made.

    Raises:
        ArgumentError: It is a file, or nothing can be written there.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        _try_writing_in(out)
    except OSError as error:
        raise ArgumentError(f"out: expected a folder that can be written to, got {out} ({error})") from error
    finally:
        for folder in made:
            if folder.is_dir():
                folder.rmdir()


def _try_writing_in(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass
