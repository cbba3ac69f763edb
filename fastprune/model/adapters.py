"""Wrappers around a model: compilation and LoRA adapters (peft).

In: a module. Out: the plain model, the names of its weights without adapters, and the modules that belong to adapters.
A base weight is scored and pruned with the adapters in the forward pass, unmerged; a mask fits the wrapped and the
plain model alike. peft is never imported: a model cannot be wrapped by a package that is not loaded.
"""

from __future__ import annotations

import sys

from torch import nn

from fastprune.errors import ModelError

_WAY_OUT = "model.merge_and_unload() gives a plain model"


def unwrap(model: nn.Module) -> nn.Module:
    """The plain model inside ``torch.compile`` and ``PeftModel``; any other model is returned as it is.

    Raises:
        ModelError: A ``PeftModel`` adds prompts instead of changing layers; they would be lost.
    """
    peft = sys.modules.get("peft")
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
            for name, config in model.peft_config.items():
                if getattr(config, "is_prompt_learning", False):
                    raise ModelError(
                        f"its adapter {name!r} is {config.peft_type.value}; expected LoRA or none", argument="model"
                    )
            model = model.get_base_model()
        else:
            return model


def plain_name(name: str) -> str:
    """``….0._orig_mod.….q_proj.base_layer.weight`` as ``….0.….q_proj.weight``, its name in the plain model."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is the wrapper of ``torch.compile`` around another one."""
    return "_orig_mod" in module._modules


def adapter_parts(name: str, block: nn.Module) -> list[nn.Module]:
    """The modules inside a decoder block that belong to adapters, such as ``lora_A``; their weights are not scored.

    Args:
        name: Name of the block, for messages.
        block: The block.

    Raises:
        ModelError: The gradient of a base weight would not give the effect of its removal: the adapter is merged, a
            variant such as DoRA, not LoRA, or another module in the layer's place.
    """
    check_unmerged(block, name)
    parts = []
    for path, module in block.named_modules():
        where = f"{name}.{path}"
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            raise ModelError(f"{where} is replaced by a trained copy (modules_to_save); {_WAY_OUT}", argument="model")
        if not _is_adapter(module):
            continue
        if not hasattr(module, "lora_A") or not hasattr(module.base_layer, "weight"):
            raise ModelError(
                f"{where} is wrapped by a {type(module).__module__} adapter, expected LoRA; {_WAY_OUT}",
                argument="model",
            )
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        variants = getattr(module, "lora_variant", {})
        for adapter in active:
            if adapter in variants or getattr(module, "use_dora", {}).get(adapter):
                kind = type(variants[adapter]).__name__ if adapter in variants else "DoRA"
                raise ModelError(
                    f"{where}: its adapter {adapter!r} is a {kind}, in which the base weight acts in more than one "
                    f"place; {_WAY_OUT}",
                    argument="model",
                )
        parts += [child for child_name, child in module.named_children() if child_name != "base_layer"]
    return parts


def check_unmerged(module: nn.Module, name: str = "") -> None:
    """Raise ModelError if an adapter is merged into its base weight, which then belongs to neither model."""
    for path, layer in module.named_modules():
        if _is_adapter(layer) and layer.merged:
            where = ".".join(part for part in (name, path) if part)
            raise ModelError(
                f"{where} has the adapter {', '.join(layer.merged_adapters)!r} merged into its weight; "
                f"model.unmerge_adapter() takes it out, {_WAY_OUT}",
                argument="model",
            )


def _is_adapter(module: nn.Module) -> bool:
    return "base_layer" in module._modules and hasattr(module, "merged")


def adapter_settings(model: nn.Module) -> list[tuple]:
    """The active adapters of each layer and their scaling; the weights of adapters are parameters like others."""
    return [
        (plain_name(path), layer.disable_adapters, list(layer.active_adapters), sorted(layer.scaling.items()))
        for path, layer in model.named_modules()
        if _is_adapter(layer)
    ]
