"""A model on two devices, and the masks by which its pass is compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from support.architectures import BENIGN, HARM


def masks(model: nn.Module, **settings: Any) -> list[fastprune.PruneMask]:
    """Selections under criteria that between them need every statistic, of more segments than one."""
    sets = (CalibrationSet(rows).loader(24) for rows in (HARM, BENIGN))
    criteria = {"harm": ("signed", "wanda"), "benign": ("abs", "fisher")}
    scores = fastprune.score(model, *sets, **criteria, **{"segments": 3, "progress": False, **settings})
    return [
        scores.select(0.05, 0.01),
        scores.select(0.05, 0.01, harm="wanda", benign="fisher", scope="global"),
    ]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(item, device) for item in value)
    return {key: _moved(item, device) for key, item in value.items()} if isinstance(value, dict) else value


def spread(model: nn.Module, first: str, second: str) -> nn.Module:
    """A Llama with the upper half of its blocks and its head on ``second``, as ``device_map`` spreads one.

    By hand: accelerate takes a device map of GPU and CPU for offloading.
    """
    model.to(first)
    upper = [*model.model.layers[2:], model.model.norm, model.lm_head]
    for module in upper:
        module.to(second)
    for module, device in [(block, first) for block in model.model.layers[:2]] + [(module, second) for module in upper]:

        def move(module: nn.Module, args: tuple, kwargs: dict, device: str = device) -> tuple[tuple, dict]:
            return _moved(args, torch.device(device)), _moved(kwargs, torch.device(device))

        module.register_forward_pre_hook(move, with_kwargs=True)
    return model
