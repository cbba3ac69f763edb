"""What a command reads, and that it is there.

Declared in the annotations of parameters, see :mod:`fastprune.cli.frame`, and checked before the work, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastprune.errors import ArgumentError, NotFoundError, setting
from fastprune.files import inside


@dataclass(frozen=True)
class InputPath:
    """A parameter that names what a command reads.

    Attributes:
        what: What is expected there, as messages call it.
        folders: The folders in it that are read; the path itself by default.
        holds: A file that each of them has to hold, if it is a folder.
    """

    what: str
    folders: Sequence[str] = ("",)
    holds: str | None = None

    def lacking(self, given: Path) -> str | None:
        """What is missing, as a message; ``None`` if everything is there."""
        for path in (given / folder for folder in self.folders):
            if not path.exists():
                return f"expected a {self.what} at {path}, found none"
            if self.holds is not None and path.is_dir() and not (path / self.holds).is_file():
                return f"{path} holds no {self.holds}, so it is not a {self.what}"
        return None


@dataclass(frozen=True)
class Journal:
    """A parameter that names the folder of a journal. While one is there, the output is continued, not overwritten."""


def check_inputs(inputs: Sequence[tuple[str, InputPath, Path]]) -> None:
    """Refuse to begin without the inputs.

    Args:
        inputs: Parameter, declaration and path of each.

    Raises:
        NotFoundError: Names everything that is missing.
    """
    lacking = [(name, reason) for name, marker, path in inputs if (reason := marker.lacking(path)) is not None]
    if lacking:
        (name, reason), *others = lacking
        raise NotFoundError("; ".join([reason, *(f"{setting(other)}: {why}" for other, why in others)]), argument=name)


def check_journal(folder: Path, inputs: Sequence[tuple[str, InputPath, Path]]) -> None:
    """Refuse to keep a journal, which holds safetensors files, in a folder that is read.

    Raises:
        ArgumentError: It is the model's folder, or in it.
    """
    for name, _, path in inputs:
        if path.is_dir() and inside(folder, path):
            raise ArgumentError(f"expected a folder of its own, got the {name}'s, {folder}", argument="resume")
