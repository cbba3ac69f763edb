"""The identity of a model in memory, by which the processes of a run know that they hold the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.architectures import build
from torch import nn

from fastprune.model.identity import identity_of

CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "one weight": lambda m: m.model.layers[2].mlp.up_proj.weight.view(-1)[1001].zero_(),
    "another order": lambda m: m.model.layers[2].mlp.up_proj.weight.copy_(m.model.layers[2].mlp.up_proj.weight.flip(0)),
    "two words": lambda m: m.model.norm.weight[:2].copy_(torch.tensor([2.0, 0.5])),
    "a buffer": lambda m: m.model.layers[1].scale.mul_(2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_another_one(change: str, dtype: torch.dtype) -> None:
    """Guards identities that look at samples: a mask hardly ever meets one."""
    models = []
    for _ in range(2):
        model = build("Llama", dtype=dtype)
        model.model.layers[1].register_buffer("scale", torch.ones((), dtype=dtype))
        with torch.no_grad():
            model.model.norm.weight[:2] = torch.tensor([0.5, 2.0])
        models.append(model)
    assert identity_of(models[0]) == identity_of(models[1])
    with torch.no_grad():
        CHANGES[change](models[1])
    assert identity_of(models[0]) != identity_of(models[1])
