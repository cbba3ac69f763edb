"""From rows to micro-batches: calibration data is read, checked and tokenized here.

The names below are imported when they are first used: reading rows loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastprune.calibration.encoding import Encoder
    from fastprune.calibration.examples import Example, MicroBatch, micro_batches
    from fastprune.calibration.from_loader import collect
    from fastprune.calibration.rows import Row, read_rows, read_texts_or_rows
    from fastprune.calibration.sets import CalibrationLoader, CalibrationSet, load_calibration

_HOME = {
    "Encoder": "encoding",
    "Example": "examples",
    "MicroBatch": "examples",
    "micro_batches": "examples",
    "collect": "from_loader",
    "Row": "rows",
    "read_rows": "rows",
    "read_texts_or_rows": "rows",
    "CalibrationLoader": "sets",
    "CalibrationSet": "sets",
    "load_calibration": "sets",
}

__all__ = [
    "CalibrationLoader",
    "CalibrationSet",
    "Encoder",
    "Example",
    "MicroBatch",
    "Row",
    "collect",
    "load_calibration",
    "micro_batches",
    "read_rows",
    "read_texts_or_rows",
]


def __getattr__(name: str) -> object:
    """Import an exported name from the file it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
