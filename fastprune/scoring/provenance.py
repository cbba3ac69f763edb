"""The facts that a result depends on: the key of a journal, and the provenance of scores.

In: the sets, the settings and the model's config. Out: JSON-able mappings without times, so that equal runs give equal
files.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import torch

import fastprune
from fastprune.calibration import CalibrationLoader, CalibrationSet
from fastprune.model.anatomy import Anatomy
from fastprune.scoring.request import Request


def inputs_of(
    request: Request, anatomy: Anatomy, loaders: Mapping[str, CalibrationLoader], device: torch.device
) -> dict[str, Any]:
    """Everything that the result depends on to the bit, apart from the weights and the number of segments."""
    model: Any = anatomy.model
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "architecture": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": device.type,
        "backend": request.backend,
        "dtype": str(anatomy.matrices[0].weight.dtype).removeprefix("torch."),
        "calibration": {role: loader.calibration.hash for role, loader in loaders.items()},
        "batch_tokens": {role: loader.batch_tokens for role, loader in loaders.items()},
        "criteria": {role: list(names) for role, names in request.criteria.items()},
        "fractions": dict(request.fractions),
        "statistics_dtype": request.statistics_dtype,
        "versions": _versions(),
    }


def provenance_of(
    request: Request,
    anatomy: Anatomy,
    loaders: Mapping[str, CalibrationLoader],
    fingerprint: str,
    shares: Mapping[str, float],
) -> dict[str, Any]:
    """The facts that a reader of the scores needs to form them again.

    ``shares`` has, by role, the share of the loss that lies on end-of-turn tokens.
    """
    model: Any = anatomy.model
    config = model.config
    return {
        "model": {
            "id": getattr(config, "_name_or_path", "") or type(model).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "architecture": type(model).__name__,
            "fingerprint": fingerprint,
            "dtype": str(anatomy.matrices[0].weight.dtype).removeprefix("torch."),
        },
        "criteria": {role: list(names) for role, names in request.criteria.items()},
        "calibration": {role: _facts_of(loader.calibration, shares.get(role)) for role, loader in loaders.items()},
        "block_of": {matrix.name: matrix.block for matrix in anatomy.matrices},
        "statistics_dtype": request.statistics_dtype,
        "versions": _versions(),
    }


def _facts_of(calibration: CalibrationSet, end_of_turn_share: float | None) -> dict[str, Any]:
    return {
        "hash": calibration.hash,
        **(calibration.encoding or {"format": None, "bos": None, "template": None}),
        "finishes": calibration.finishes,
        "end_of_turn_share": end_of_turn_share,
        "n_examples": len(calibration),
        "n_tokens": sum(map(len, calibration)),
        "n_scored_tokens": sum(example.scored for example in calibration),
        "refusals": calibration.refusals,
        # by which rows to be reported are found among those behind the scores
        "prompts": None if calibration.prompts is None else calibration.prompts.facts(),
    }


def _versions() -> dict[str, str]:
    return {
        "fastprune": fastprune.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
