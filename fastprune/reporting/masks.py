"""Role, label and meaning of each mask of a record.

If the record has a section ``masks``, that section gives the role and names are only names: a file called
``random.safetensors`` may hold anything. Names have a meaning if the section marks them as the demonstration's
(``standard``), and in a record without the section.

In: a record and the name of a mask. Out: words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.reporting.formatting import MASKS, clean, count, number

_CONTROLS = {
    "random": "weights drawn at random",
    "magnitude": "the weights of largest absolute value",
    "sign_flipped": "the other end of the harm score, weights that work against harmful answers",
    "unsigned": "the harm score without its sign",
    "no_set_difference": "the weights that benign skills need are not spared",
    "recognition": "the same method, aimed at recognising harm instead of producing it",
}
_MEANING = {
    "none": "the model as it is",
    "btap": "the method: the weights that promote harmful answers most, except those that benign skills need",
    **{name: f"control: {meaning}" for name, meaning in _CONTROLS.items()},
}
_KINDS = {
    "random (count)": "weights drawn at random",
    "random (magnitude)": "weights drawn at random among those of nearly the same absolute value",
    "largest magnitude": _CONTROLS["magnitude"],
    "algebra": "combined from other masks",
    "unknown": "of unknown origin",
}


def facts(record: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    """The record's row about a mask, ``None`` if there is none."""
    return next((row for row in record.get("masks") or () if row["mask"] == name), None)


def role(record: Mapping[str, Any], name: str) -> str:
    """``"none"`` (the unpruned model), ``"method"``, ``"control"`` or ``"other"``."""
    row = facts(record, name)
    if row is not None:
        return row["role"]
    if name in ("none", "btap"):
        return "none" if name == "none" else "method"
    return "control" if name in _CONTROLS else "other"


def patched(record: Mapping[str, Any]) -> int | None:
    """Number of weights that a patch had changed in the model before the evaluation; ``None`` without a patch."""
    return ((record.get("model") or {}).get("patched") or {}).get("weights")


def baseline(record: Mapping[str, Any]) -> str:
    """Name of the level that masks are compared with; a patched model is not without pruning."""
    return "without pruning" if patched(record) is None else "as stored"


def is_random(record: Mapping[str, Any], name: str) -> bool:
    """Whether the weights of a mask were drawn at random."""
    row = facts(record, name)
    return name == "random" if row is None else (row.get("kind") or "").startswith("random")


def _known(record: Mapping[str, Any], name: str) -> bool:
    """Whether a name has its meaning of the demonstration."""
    row = facts(record, name)
    return row is None or bool(row.get("standard"))


def mask_label(record: Mapping[str, Any], name: str) -> str:
    """Label of a choice of weights; a user's mask keeps its name."""
    if name == "none" and patched(record) is not None:
        return f"as stored (patched: {count(patched(record))} weights)"
    if _known(record, name) and name in MASKS:
        return MASKS[name]
    return clean(name.replace("_", " "))


def meaning(record: Mapping[str, Any], name: str) -> str:
    """Meaning of a choice of weights; empty if unknown."""
    if name == "none" and patched(record) is not None:
        return f"the model as its folder holds it, where a patch has changed {count(patched(record))} weights"
    row = facts(record, name)
    if row is None or _known(record, name):
        return _MEANING.get(name, "")
    what = {"method": "the method: ", "control": "control: "}.get(row["role"], "")
    kind = row.get("kind") or "unknown"
    return what + (_selection(row) if kind == "selection" else _KINDS.get(kind, clean(kind)))


def _selection(row: Mapping[str, Any]) -> str:
    """``selected by signed without abs, p = 0.05, q = 0.003``."""
    criteria = row.get("criteria")
    criteria = criteria if isinstance(criteria, Mapping) else {}
    by = f" by {clean(criteria['harm'])}" if criteria.get("harm") else ""
    without = f" without the best by {clean(criteria['benign'])}" if criteria.get("benign") else ""
    numbers = [(key, row.get(key)) for key in ("p", "q", "slice")]
    shown = [
        f"{key} = {number(value)}"
        for key, value in numbers
        if isinstance(value, (int, float)) and (key != "slice" or value)
    ]
    return ", ".join([f"selected{by}{without}", *shown])
