"""The size of the model that a config describes, found before memory is allocated.

In: a config and, for a checkpoint, its stored tensors. Out: the model on the meta device, or an error. A config is
foreign: it may ask for a billion blocks, or for weights that no folder holds, and building would exhaust memory.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastprune.checkpoint.config_file import refused
from fastprune.checkpoint.shards import Stored
from fastprune.errors import ModelError

# Tensors of a model that is known by its config only. The largest published dense ones have 1,100, and each takes about
# half a millisecond to make.
_MAX_TENSORS = 30_000
# Masks and position tables, which no file holds. Those of published models take up to some hundred megabytes.
_MAX_BUFFER_BYTES = 2 << 30


def build_on_meta(config: object, max_tensors: int = _MAX_TENSORS, max_weights: float = math.inf) -> nn.Module:
    """The causal LM of a config, parameters and buffers on the meta device.

    Args:
        config: Of transformers.
        max_tensors: Largest number of parameters.
        max_weights: Largest number of elements in all of them.

    Raises:
        ModelError: A limit is exceeded, or transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    with refused("model", "the config cannot be built as a causal language model"):
        with torch.device("meta"), _Counted(max_tensors, max_weights) as counted:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        counted.tensors, counted.weights = 0, 0
        for parameter in model.parameters():  # also those that torch.empty did not make
            counted.add(parameter)
    return model


class _Counted(TorchFunctionMode):
    """Stops building at too many parameters. It acts on this thread only, unlike a hook of torch's modules."""

    def __init__(self, max_tensors: int, max_weights: float) -> None:
        super().__init__()
        self.max_tensors, self.max_weights = max_tensors, max_weights
        self.tensors = self.weights = 0

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        made = func(*args, **(kwargs or {}))
        if func is torch.empty:  # which makes parameters, but no masks or tables
            self.add(made)
        return made

    def add(self, parameter: torch.Tensor) -> None:
        self.tensors, self.weights = self.tensors + 1, self.weights + parameter.numel()
        if self.tensors > self.max_tensors or self.weights > self.max_weights:
            raise ModelError(
                f"the config asks for more weights than it can have here (stopped at {self.tensors:,} tensors "
                f"with {self.weights:,} numbers, the last of the shape {tuple(parameter.shape)}); does config.json "
                "belong to the weights?",
                argument="model",
            )


def check_size(config: object, stored: Mapping[str, Stored], folder: str | Path) -> None:
    """Raise ModelError if a config asks for far more than its folder stores.

    Names and shapes are compared later, weight by weight. This bounds memory until then; the bounds are loose, as tied
    weights count twice and a stored tensor may be several in memory.
    """
    stored_weights = sum(tensor.numel for tensor in stored.values())
    model = build_on_meta(config, 4 * len(stored) + 1000, 2 * stored_weights + 2**20)
    tables = dict(model.named_buffers())
    if sum(table.nbytes for table in tables.values()) > max(_MAX_BUFFER_BYTES, 4 * stored_weights):
        name, largest = max(tables.items(), key=lambda entry: entry[1].nbytes)
        raise ModelError(
            f"the config of {folder} asks for tables that no file holds, the largest is {name} of the shape "
            f"{tuple(largest.shape)}; is its number of positions right?",
            argument="model",
        )
