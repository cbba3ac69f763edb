"""The paper's experiments as functions of (model, scores, suite, settings) that return parts of a record.

They write no report; :mod:`fastprune.reporting` shows a record.
"""

from fastprune.experiments.btap import heat_map, measure, measure_each, standard_masks, sweep, transfer
from fastprune.experiments.demo import DemoSettings, run_demo
from fastprune.experiments.record import evaluation_record, stored_patch

__all__ = [
    "DemoSettings",
    "evaluation_record",
    "heat_map",
    "measure",
    "measure_each",
    "run_demo",
    "standard_masks",
    "stored_patch",
    "sweep",
    "transfer",
]
