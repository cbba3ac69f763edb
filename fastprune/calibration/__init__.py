"""From rows to micro-batches: calibration data is read, checked and tokenized here.

The names below are imported when they are first used: reading rows loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastprune import lazily

__all__ = [
    "CalibrationLoader",
    "CalibrationSet",
    "Encoder",
    "Example",
    "MicroBatch",
    "Overlap",
    "Row",
    "Table",
    "check_overlap",
    "collect",
    "load_calibration",
    "micro_batches",
    "overlap",
    "read_rows",
    "read_table",
    "read_texts_or_rows",
]

if TYPE_CHECKING:
    from fastprune.calibration.encoding import Encoder
    from fastprune.calibration.examples import Example, MicroBatch, micro_batches
    from fastprune.calibration.from_loader import collect
    from fastprune.calibration.leakage import Overlap, check_overlap, overlap
    from fastprune.calibration.rows import Row, Table, read_rows, read_table, read_texts_or_rows
    from fastprune.calibration.sets import CalibrationLoader, CalibrationSet, load_calibration
else:
    _HOME = {
        "Encoder": "fastprune.calibration.encoding",
        "Example": "fastprune.calibration.examples",
        "MicroBatch": "fastprune.calibration.examples",
        "micro_batches": "fastprune.calibration.examples",
        "collect": "fastprune.calibration.from_loader",
        "Overlap": "fastprune.calibration.leakage",
        "check_overlap": "fastprune.calibration.leakage",
        "overlap": "fastprune.calibration.leakage",
        "Row": "fastprune.calibration.rows",
        "Table": "fastprune.calibration.rows",
        "read_rows": "fastprune.calibration.rows",
        "read_table": "fastprune.calibration.rows",
        "read_texts_or_rows": "fastprune.calibration.rows",
        "CalibrationLoader": "fastprune.calibration.sets",
        "CalibrationSet": "fastprune.calibration.sets",
        "load_calibration": "fastprune.calibration.sets",
    }
    __getattr__, __dir__ = lazily(__name__, _HOME)
