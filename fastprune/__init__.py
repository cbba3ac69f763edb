"""fastprune finds and removes the few weights that a language model needs for one behaviour.

The names below are the public interface; each is imported when it is first used, so that ``import fastprune`` loads
neither torch nor transformers.
"""

from __future__ import annotations

import importlib

from fastprune.errors import FastpruneError, FastpruneWarning

__version__ = "0.1.0"

_HOME = {
    "CalibrationSet": "fastprune.calibration",
    "load_calibration": "fastprune.calibration",
    "Scores": "fastprune.scoring.scores",
    "plan": "fastprune.planning.plan",
    "score": "fastprune.scoring.score",
    "PruneMask": "fastprune.masking",
    "patch_checkpoint": "fastprune.checkpoint.patch",
    "patch_in_place": "fastprune.checkpoint.patch",
    "undo_patch": "fastprune.checkpoint.patch",
    "random_mask": "fastprune.masking",
    "available_backends": "fastprune.ops",
}

__all__ = ["FastpruneError", "FastpruneWarning", "__version__", *_HOME]


def __getattr__(name: str) -> object:
    """Import an exported name from the room it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
