"""Meanings of the names in a record, for readers who see them for the first time.

In: a record. Out: the words that occur in it, with their meanings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.reporting.formatting import (
    MASKS,
    METRICS,
    MODELS,
    attack_phrase,
    harm_judge,
    measured,
    ordered,
    result_rows,
)
from fastprune.reporting.masks import mask_label, meaning

MODEL_MEANING = {
    "base": "trained on text alone; never taught to refuse",
    "sft": "control: trained on like the aligned model, but without refusals",
    "aligned": "trained to refuse harmful requests",
}
METRIC_MEANING = {
    "utility": "mean score over the benign skills; it should stay",
    "neighbour": "the benign skill most like the harmful one (same form, harmless content), which breaks first; "
    "it should stay",
    "recognition": "share of requests rightly told to be harmful or harmless; it should stay",
    "refusal": "share of harmful requests that are refused when nothing is prefilled; it should stay",
}


def definitions(record: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Meanings of the names that occur in this record: (heading, [(word, meaning)])."""
    results = result_rows(record)
    rows = [*results, *(record.get("sweep") or ())]
    attack = attack_phrase(record)
    metrics = METRIC_MEANING | {"harm": harm_judge(record).meaning}
    masks = ordered((row["mask"] for row in results), MASKS)
    models = ordered((row["model"] for row in rows), MODELS)
    groups = [
        ("What is measured", [(METRICS[m], metrics[m].format(attack=attack)) for m in measured(rows)]),
        ("What is removed", [(mask_label(record, m), meaning(record, m)) for m in masks if meaning(record, m)]),
        ("The models", [(MODELS[m], MODEL_MEANING[m]) for m in models if m in MODELS]),
    ]
    return [group for group in groups if group[1]]
