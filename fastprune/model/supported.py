"""Refusal of models that cannot be scored as they are, with the way out.

These are quantized and offloaded models, and weights that are formed in each forward. In: a config, or a model in
memory. Out: nothing, or an error. No quantization package is imported: traces in the config, in names and in dtypes
show them. A quantized weight has no gradient, and zeroing it means something else in each format.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from fastprune.errors import ModelError
from fastprune.model.quirks import DEQUANTIZING_CONFIGS, NORM_REMOVERS, PACKED_WEIGHTS
from fastprune.ops.validate import FLOAT_DTYPES


def check_config(config: Any, what: str) -> None:
    """Raise ModelError if a config says that the weights are quantized.

    Args:
        config: A Hugging Face config, or the dict of a ``config.json``.
        what: Owner of the config, for the message.
    """
    quantization = _value(config, "quantization_config")
    quantization = quantization or _value(_value(config, "text_config"), "quantization_config")
    if not quantization:
        return
    method = _value(quantization, "quant_method")
    method = str(getattr(method, "value", method) or "unknown")
    raise ModelError(
        f"{what}: its config has a quantization_config (method {method}); quantized weights cannot be scored. "
        + _way_out(method)
    )


def check_not_quantized(model: nn.Module, block_names: str, blocks: nn.ModuleList) -> None:
    """Raise ModelError if a model's config, or a weight in its decoder blocks, is quantized.

    Args:
        model: A causal LM with a config.
        block_names: Name of the list of its decoder blocks.
        blocks: That list.
    """
    check_config(model.config, "model")
    for path, module in blocks.named_modules():
        for name, tensor in _own_tensors(module):
            if _is_quantized(name, tensor):
                raise ModelError(
                    f"{block_names}.{path}.{name} of a {type(module).__name__} is stored as {tensor.dtype} of "
                    f"shape {tuple(tensor.shape)}; quantized weights cannot be scored. "
                    + _way_out("mxfp4" if name.endswith("_blocks") else "fp8" if tensor.is_floating_point() else ""),
                    argument="model",
                )


def check_causal(model: Any) -> None:
    """Raise ModelError unless a model is a causal language model with its head, by its class and config."""
    head = getattr(model, "get_output_embeddings", lambda: None)
    generates = getattr(model, "can_generate", lambda: head() is not None)  # true of causal models with a head
    if (
        not isinstance(model, nn.Module)
        or not generates()
        or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    ):
        raise ModelError(
            "expected a causal language model with its head, as AutoModelForCausalLM loads it, got "
            f"{type(model).__name__}",
            argument="model",
        )


def check_resident(model: nn.Module) -> None:
    """Raise ModelError if a weight is on the meta device (accelerate offloads to it) or closed to autograd."""
    made = [name for name, parameter in model.named_parameters() if parameter.is_inference()]
    if made:
        raise ModelError(
            f"{made[0]} was made under torch.inference_mode, so no gradient can go through it; load the model "
            "outside of that mode",
            argument="model",
        )
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ModelError(
            f"{len(away)} of its weights are on the meta device or offloaded, the first is {away[0]}; gradients "
            "through them would be lost. Load the whole model (no device_map that offloads to CPU or disk) or pass the "
            "path of the checkpoint folder",
            argument="model",
        )


def check_stored(module: nn.Module, attribute: str, name: str) -> None:
    """Raise ModelError if a module forms a weight anew in each forward: writes to it would be lost.

    Args:
        module: The module that multiplies by the weight.
        attribute: Its name for the weight.
        name: Name of the weight in the model, for the message.
    """
    if attribute in module._parameters:
        return
    what, way_out = "no parameter of its module, but formed by its code", "make it an nn.Parameter"
    if parametrize.is_parametrized(module, attribute):
        applied = cast("nn.ModuleDict", module.parametrizations)[attribute]
        what = f"parametrized ({', '.join(type(each).__name__ for each in applied.children())})"
        way_out = f"torch.nn.utils.parametrize.remove_parametrizations(module, {attribute!r})"
    for hook in module._forward_pre_hooks.values():
        if getattr(hook, "_tensor_name", getattr(hook, "name", None)) != attribute:
            continue
        kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            what = f"pruned by torch.nn.utils.prune ({kind}), which keeps {attribute}_orig and {attribute}_mask"
            way_out = f"torch.nn.utils.prune.remove(module, {attribute!r})"
        elif kind in NORM_REMOVERS:
            what, way_out = f"normalized ({kind})", f"torch.nn.utils.{NORM_REMOVERS[kind]}(module, {attribute!r})"
    raise ModelError(
        f"{name} is {what}; it is formed anew in each forward, so it can be neither scored nor written. "
        f"{way_out} gives a plain weight",
        argument="model",
    )


def _way_out(method: str) -> str:
    text = "Load the model dequantized: an unquantized checkpoint with dtype=torch.bfloat16 and no quantization_config"
    if method in DEQUANTIZING_CONFIGS:
        return f"{text}, or this one with quantization_config={DEQUANTIZING_CONFIGS[method]}(dequantize=True)"
    return text


def _value(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))


def _is_quantized(name: str, tensor: torch.Tensor) -> bool:
    if name in PACKED_WEIGHTS:
        return True
    # A buffer of integers may be a table of positions or a mask; a parameter of them is a weight.
    narrow = tensor.is_floating_point() or isinstance(tensor, nn.Parameter)
    return narrow and tensor.ndim >= 2 and tensor.dtype not in FLOAT_DTYPES
