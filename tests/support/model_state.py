"""The parts of a model that a pass could leave changed, and their comparison."""

from __future__ import annotations

import torch
from torch import nn


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything of a model that a pass could leave changed."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for name, module in model.named_modules()
        },
        "config": model.config.to_dict(),
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    after = state_of(model)
    for name, tensor in before.pop("weights").items():
        assert torch.equal(tensor, after["weights"][name]), name
    after.pop("weights")
    assert after == before
