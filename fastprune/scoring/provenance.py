"""What a result depends on, in words and hashes: the key of a journal, and the provenance of scores.

In: the sets, the settings and the model's config. Out: JSON-able mappings without times, so that equal runs give equal
files. It must not know how scores are formed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

import fastprune
from fastprune.model.matrices import Matrix
from fastprune.scoring.engine import ScoringSet


def inputs_of(
    model: nn.Module,
    matrices: Sequence[Matrix],
    sets: Sequence[ScoringSet],
    criteria: Mapping[str, tuple[str, ...]],
    fractions: Mapping[str, float],
    statistics_dtype: str,
    device: torch.device,
    backend: str | None,
) -> dict[str, Any]:
    """Everything that the bits of the result depend on, besides the weights and the number of segments."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    return {
        "architecture": type(model).__name__,
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": device.type,
        "backend": backend,
        "dtype": str(matrices[0].weight.dtype).removeprefix("torch."),
        "calibration": {group.role: group.examples.hash for group in sets},
        "batch_tokens": {group.role: group.batch_tokens for group in sets},
        "criteria": {role: list(names) for role, names in criteria.items()},
        "fractions": dict(fractions),
        "statistics_dtype": statistics_dtype,
        "versions": _versions(),
    }


def provenance_of(
    model: nn.Module,
    matrices: Sequence[Matrix],
    sets: Sequence[ScoringSet],
    criteria: Mapping[str, tuple[str, ...]],
    statistics_dtype: str,
    fingerprint: str,
    shares: Mapping[str, float],
) -> dict[str, Any]:
    """What a reader of the scores needs to know to form them again.

    ``shares`` has, by role, the share of the loss that lies on end-of-turn tokens.
    """
    config = model.config
    return {
        "model": {
            "id": getattr(config, "_name_or_path", "") or type(model).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "architecture": type(model).__name__,
            "fingerprint": fingerprint,
            "dtype": str(matrices[0].weight.dtype).removeprefix("torch."),
        },
        "criteria": {role: list(names) for role, names in criteria.items()},
        "calibration": {
            group.role: {
                "hash": group.examples.hash,
                **(group.examples.encoding or {"format": None, "bos": None, "template": None}),
                "finishes": group.examples.finishes,
                "end_of_turn_share": shares.get(group.role),
                "n_examples": len(group.examples),
                "n_tokens": sum(len(example) for example in group.examples),
                "n_scored_tokens": sum(example.scored for example in group.examples),
                "refusals": group.examples.refusals,
            }
            for group in sets
        },
        "block_of": {matrix.name: matrix.block for matrix in matrices},
        "statistics_dtype": statistics_dtype,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {
        "fastprune": fastprune.__version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
