"""From rows to micro-batches: the room that reads and tokenises calibration data. It must not know models."""

from fastprune.calibration.encoding import Encoder
from fastprune.calibration.examples import Example, MicroBatch, micro_batches
from fastprune.calibration.from_loader import collect
from fastprune.calibration.rows import Row, read_rows, read_texts_or_rows
from fastprune.calibration.sets import CalibrationLoader, CalibrationSet, load_calibration

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
