"""What has been put around a model: compilation and LoRA adapters (peft).

In: a module. Out: the model underneath, the names that its weights have without adapters, and which modules are an
adapter's own. A base weight is scored and pruned with the adapters in the forward pass, unmerged; a mask is the same
for the wrapped and the plain model. peft is never imported: where it is absent, no model can be wrapped by it.
"""

from __future__ import annotations

import sys
from typing import cast

from torch import nn

from fastprune.errors import ModelError

_WAY_OUT = "model.merge_and_unload() gives a plain model"


def unwrap(model: nn.Module) -> nn.Module:
    """The model whose modules have the plain names, out of ``torch.compile`` and ``PeftModel``; the rest as it came.

    Raises:
        ModelError: A ``PeftModel`` adds prompts instead of changing layers; they would be lost.
    """
    peft = sys.modules.get("peft")
    while True:
        if hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        elif peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel):
            for name, config in model.peft_config.items():
                if getattr(config, "is_prompt_learning", False):
                    raise ModelError(f"model: its adapter {name!r} is {config.peft_type.value}; expected LoRA or none")
            model = model.get_base_model()
        else:
            return model


def plain_name(name: str) -> str:
    """``….0._orig_mod.….q_proj.base_layer.weight`` as ``….0.….q_proj.weight``, its name in the plain model."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "_orig_mod"))


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what ``torch.compile`` puts around a module, the one below it."""
    return "_orig_mod" in module._modules


def adapter_parts(name: str, block: nn.Module) -> list[nn.Module]:
    """The modules inside a decoder block that belong to adapters, such as ``lora_A``; their weights are not scored.

    Args:
        name: Name of the block, for messages.
        block: The block.

    Raises:
        ModelError: The adapters change a layer in a way in which the base weight's gradient would not tell the effect
            of its removal: merged, a variant such as DoRA, no LoRA, or another module in the layer's place.
    """
    check_unmerged(block, name)
    parts = []
    for path, module in block.named_modules():
        where = f"model: {name}.{path}"
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            raise ModelError(f"{where} is replaced by a trained copy (modules_to_save); {_WAY_OUT}")
        if not _is_adapter(module):
            continue
        if not hasattr(module, "lora_A") or not hasattr(module.base_layer, "weight"):
            raise ModelError(f"{where} is wrapped by a {type(module).__module__} adapter, expected LoRA; {_WAY_OUT}")
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        variants = getattr(module, "lora_variant", {})
        for adapter in active:
            if adapter in variants or getattr(module, "use_dora", {}).get(adapter):
                kind = type(variants[adapter]).__name__ if adapter in variants else "DoRA"
                raise ModelError(
                    f"{where}: its adapter {adapter!r} is a {kind}, in which the base weight acts in more than one "
                    f"place; {_WAY_OUT}"
                )
        parts += [child for child_name, child in module.named_children() if child_name != "base_layer"]
    return parts


def check_unmerged(module: nn.Module, name: str = "") -> None:
    """Raise ModelError if an adapter is merged into its base weight: that is then neither model's weight."""
    for path, layer in module.named_modules():
        if _is_adapter(layer) and layer.merged:
            where = ".".join(part for part in (name, path) if part)
            raise ModelError(
                f"model: {where} has the adapter {', '.join(layer.merged_adapters)!r} merged into its weight; "
                f"model.unmerge_adapter() takes it out, {_WAY_OUT}"
            )


def _is_adapter(module: nn.Module) -> bool:
    return "base_layer" in module._modules and hasattr(module, "merged")


def adapter_settings(model: nn.Module) -> list[tuple]:
    """Which adapters of each layer act, and how strongly; their weights are parameters like others."""
    return [
        (plain_name(path), layer.disable_adapters, list(layer.active_adapters), sorted(layer.scaling.items()))
        for path, layer in model.named_modules()
        if _is_adapter(layer)
    ]
