"""How large the model of a config would be, found before any of it is allocated.

In: a config and, of a checkpoint, what is stored. Out: the model on the meta device, or an error. A config is foreign:
it may ask for a billion blocks, or for weights that no folder holds, and building would go on until memory ends.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fastprune.errors import ModelError
from fastprune.model.config_file import refused
from fastprune.model.shards import Stored

# Tensors of a model of which only the config is known: 1,100 in the largest dense ones published, and each takes about
# half a millisecond to make.
_MAX_TENSORS = 30_000
# No file holds a model's masks and position tables. Those of published models have up to some hundred megabytes.
_MAX_BUFFER_BYTES = 2 << 30


def build_on_meta(config: object, max_tensors: int = _MAX_TENSORS, max_weights: float = math.inf) -> nn.Module:
    """The causal LM of a config, parameters and buffers on the meta device.

    Args:
        config: Of transformers.
        max_tensors: Parameters after which building is given up.
        max_weights: Numbers in all of these together after which it is.

    Raises:
        ModelError: There are more, or transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    builder, tensors, weights = threading.get_ident(), 0, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors, weights
        if threading.get_ident() != builder or parameter is None:
            return
        tensors, weights = tensors + 1, weights + parameter.numel()
        if tensors > max_tensors or weights > max_weights:
            raise ModelError(
                f"model: the config asks for more weights than it can have here (stopped at {tensors:,} tensors with "
                f"{weights:,} numbers, the last is {name} of a {type(module).__name__}, "
                f"{tuple(parameter.shape)}); does config.json belong to the weights?"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with refused("model: the config cannot be built as a causal language model"), torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
    finally:
        hook.remove()


def check_size(config: object, stored: Mapping[str, Stored], folder: str | Path) -> None:
    """Raise ModelError if a config asks for far more than its folder stores.

    Whether names and shapes agree is found out weight by weight later. This bounds what is allocated until then: tied
    weights count twice here, and a stored tensor may be several in memory.
    """
    stored_weights = sum(tensor.numel for tensor in stored.values())
    model = build_on_meta(config, 4 * len(stored) + 1000, 2 * stored_weights + 2**20)
    tables = dict(model.named_buffers())
    if sum(table.nbytes for table in tables.values()) > max(_MAX_BUFFER_BYTES, 4 * stored_weights):
        name, largest = max(tables.items(), key=lambda entry: entry[1].nbytes)
        raise ModelError(
            f"model: the config of {folder} asks for tables that no file holds, the largest is {name} of the shape "
            f"{tuple(largest.shape)}; is its number of positions right?"
        )
