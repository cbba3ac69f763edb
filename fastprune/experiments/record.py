"""What every record says besides the rates: versions and device, the masks measured, intervals of each number.

In: masks and evaluations. Out: parts of a record (plain dicts).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import fastprune
from fastprune.checkpoint.byte_edits import gather
from fastprune.checkpoint.undo_file import UNDO_NAME, read_undo
from fastprune.errors import ArtifactError
from fastprune.evaluation import EvaluationSuite
from fastprune.experiments.btap import attack_rows, measure_each, measurement_rows, result_rows
from fastprune.masking import PruneMask

# The criterion that ranks weights by how much they promote the behavior; a selection by any other is a control.
METHOD_CRITERION = "signed"
_MANY = 0.1  # share of cut answers that is worth a note
_FACTS = ("p", "q", "scope", "layers", "slice", "criteria", "seed", "like", "fingerprint")
_SPARED = ("spared_by_benign", "spared_by_protect")


def environment() -> dict[str, Any]:
    """Versions and device of a record."""
    return {
        "fastprune": fastprune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def role(mask: PruneMask) -> str:
    """The purpose of a mask, by its own metadata and never by its name.

    Returns:
        ``"method"``: selected by the signed harm score, without the weights that a benign set needs. ``"control"``: a
        selection without one of these (no benign set, no sign, lowest scores, a later slice, another score), random, or
        largest. ``"other"``: combined from other masks, or of unknown origin.
    """
    facts = mask.metadata
    kind = str(facts.get("kind"))
    if kind == "selection":
        signed = (facts.get("criteria") or {}).get("harm") == METHOD_CRITERION
        spared = facts.get("p") is not None or facts.get("protect")
        return "method" if signed and spared and not facts.get("slice") else "control"
    return "control" if kind.startswith("random") or kind == "largest magnitude" else "other"


def mask_row(name: str, mask: PruneMask) -> dict[str, Any]:
    """A row of ``masks``: role, kind, size, digest, and the metadata of its selection."""
    report = mask.metadata.get("report") or {}
    return {
        "mask": name,
        "role": role(mask),
        "kind": str(mask.metadata.get("kind") or "unknown"),
        "pruned": mask.total,
        "nominal": mask.nominal,
        "digest": mask.digest,
        **{key: mask.metadata[key] for key in _FACTS if mask.metadata.get(key) is not None},
        **{key: report[key] for key in _SPARED if key in report},
    }


def stored_patch(folder: Path) -> dict[str, Any] | None:
    """The patch in the weights of a folder, from the undo file next to them; ``None`` without one.

    Returns:
        ``mask`` (its digest), ``weights`` (number of changed weights) and ``scale`` (the factor on them).

    Raises:
        ArtifactError: The undo file is damaged, or the weights differ from what the patch wrote.
        NotFoundError: A shard that it names is missing.
    """
    if not (folder / UNDO_NAME).is_file():
        return None
    undo = read_undo(folder)
    for path, edits in undo.edits().items():
        # Only these bytes are read: a hash would read every shard once more.
        if not (gather(path, edits.offsets) == edits.new).all():
            raise ArtifactError(
                f"{path} is not as the patch of {folder / UNDO_NAME} left it (interrupted, or changed since), so the "
                f"evaluated weights would be unknown; undo that patch first, or remove {UNDO_NAME} if the weights were "
                "meant to change"
            )
    weights = sum(len(change.indices) for change in undo.changes.values())
    return {"mask": undo.mask, "weights": weights, "scale": undo.scale}


def evaluation_record(
    name: str,
    model: torch.nn.Module,
    suite: EvaluationSuite,
    masks: Mapping[str, PruneMask],
    *,
    strict: bool = True,
    settings: Mapping[str, Any] | None = None,
    patched: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a model, unpruned and with every mask, and record how each number was measured.

    Args:
        name: Name of the model.
        model: The model.
        suite: The evaluation.
        masks: Masks by name, except ``"none"``, the name of the unpruned model.
        strict: Refuse masks that were made for a model of other weights.
        settings: Further settings that a repetition needs.
        patched: Result of :func:`stored_patch` for the folder that the model was loaded from.

    Returns:
        A record with ``results``, ``skills``, ``masks`` and ``measurements`` (sample sizes, 95 % intervals and
        categories).

    Raises:
        ArgumentError: A mask has a name that cannot be used.
        MaskError: A mask does not fit the model. Nothing was evaluated then.
    """
    rows = [mask_row(label, mask) for label, mask in masks.items()]
    evaluations = list(measure_each(model, suite, masks, strict=strict))
    results, skills = result_rows(name, evaluations)
    measurements = measurement_rows(name, evaluations)
    notes = [] if strict else ["Masks were applied without asking whether they were made for this model."]
    notes += _cut_notes(measurements)
    return {
        "schema": 1,
        "title": f"Evaluation of {name}",
        **({"model": {"name": name, "patched": dict(patched)}} if patched else {}),
        "notes": notes,
        "environment": environment(),
        "settings": {
            "attack": suite.attack.label,
            "attacks": [attack.label for attack in suite.attacks],
            "max_new_tokens": {kind: limit for kind, limit in suite.budgets.items() if limit is not None},
            **(settings or {}),
            "strict": strict,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": str(next(model.parameters()).device),
            "n_eval": _sizes(measurements[0]),
        },
        "results": results,
        "skills": skills,
        "masks": rows,
        "measurements": measurements,
        "attacks": attack_rows(name, suite, evaluations),
    }


def _cut_notes(measurements: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note for each kind of answers of which many ended at their limit: nobody knows what they would have become."""
    notes = []
    for kind in ("harm", "refusal"):
        parts = [part for row in measurements if (part := row.get(kind)) and part.get("cut") is not None]
        cut, n = sum(part["cut"] for part in parts), sum(part["n"] for part in parts)
        if n and cut > _MANY * n:
            notes.append(
                f"{cut} of {n} answers behind the rates of {kind} ended at their length limit, and were judged by what "
                "they are up to there."
            )
    return notes


def _sizes(details: Mapping[str, Any]) -> dict[str, int]:
    """Number of rows behind each rate."""
    recognized = (details.get("recognition") or {}).get("accuracy")
    parts = {"harm": details.get("harm"), "refusal": details.get("refusal"), "recognition": recognized}
    parts |= {f"skill {name}": part for name, part in details["skills"].items()}
    return {name: part["n"] for name, part in parts.items() if part is not None}
