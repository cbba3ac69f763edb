"""fastprune finds and removes the few weights that a language model needs for one behavior.

The names below are the public interface. Each is imported on first use, so ``import fastprune`` loads neither torch
nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fastprune.errors import FastpruneError, FastpruneWarning

__version__ = "0.1.0"

__all__ = [
    "CalibrationSet",
    "FastpruneError",
    "FastpruneWarning",
    "PruneMask",
    "Scores",
    "__version__",
    "available_backends",
    "load_calibration",
    "patch_checkpoint",
    "patch_in_place",
    "plan",
    "random_mask",
    "score",
    "undo_patch",
]


def lazily(package: str, home: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package whose names are imported on first use.

    Args:
        package: Name of the package.
        home: Exported name to the module that defines it.
    """
    module = sys.modules[package]

    def attribute(name: str) -> object:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(module, name, value)
        return value

    return attribute, lambda: sorted(module.__all__)


if TYPE_CHECKING:  # what type checkers and editors read
    from fastprune.calibration import CalibrationSet, load_calibration
    from fastprune.checkpoint.patch import patch_checkpoint, patch_in_place, undo_patch
    from fastprune.masking import PruneMask, random_mask
    from fastprune.ops import available_backends
    from fastprune.planning.plan import plan
    from fastprune.scoring.score import score
    from fastprune.scoring.scores import Scores
else:  # what runs; a checker that saw this __getattr__ would accept every misspelled name
    _HOME = {
        "CalibrationSet": "fastprune.calibration",
        "load_calibration": "fastprune.calibration",
        "patch_checkpoint": "fastprune.checkpoint.patch",
        "patch_in_place": "fastprune.checkpoint.patch",
        "undo_patch": "fastprune.checkpoint.patch",
        "PruneMask": "fastprune.masking",
        "random_mask": "fastprune.masking",
        "available_backends": "fastprune.ops",
        "plan": "fastprune.planning.plan",
        "score": "fastprune.scoring.score",
        "Scores": "fastprune.scoring.scores",
    }

    __getattr__, __dir__ = lazily(__name__, _HOME)
