"""The weights that are scored: the matrices of every Linear and every expert inside the decoder blocks.

In: a causal LM. Out: :class:`Matrix` records in model order. Embeddings, head, norms, biases, routers, the indexers of
sparse attention, which have no gradient, and empty matrices are left out. An eligible weight that hooks cannot reach is
an error; it is never skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fastprune.errors import ModelError
from fastprune.model.adapters import adapter_parts, is_compiled, plain_name
from fastprune.model.experts import follows_interface, fused_weights
from fastprune.model.quirks import ALWAYS_ROUTERS, CHOOSER_CLASSES, EXPERT_COUNTS, ROUTERS, SHARED_EXPERT_GATES
from fastprune.model.supported import check_causal, check_not_quantized, check_resident, check_stored
from fastprune.model.vocabulary import config_of
from fastprune.ops.validate import FLOAT_DTYPES


@dataclass(frozen=True, eq=False)
class Matrix:
    """One eligible weight.

    Attributes:
        name: Parameter name in the model without adapters and compilation, e.g.
            ``model.layers.0.mlp.up_proj.weight``; one expert of a fused parameter:
            ``model.layers.0.mlp.experts.down_proj[3]``.
        block: Index of its decoder block.
        module: The module whose forward multiplies by it.
        input_major: ``True`` if the weight is stored ``(in_features, out_features)`` (GPT-2's Conv1D).
        attribute: Name of the parameter in the module.
        expert: Index in a fused parameter ``(experts, …)``; ``None`` if the parameter is the matrix.
    """

    name: str
    block: int
    module: nn.Module
    input_major: bool
    attribute: str = "weight"
    expert: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds it, looked up each time: a streamed block's parameters are replaced."""
        return getattr(self.module, self.attribute)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its stored layout, detached; the same storage as the model's."""
        return self.part_of(self.parameter.detach())

    def part_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of this matrix in a tensor of its parameter's shape, such as a gradient; a view."""
        return tensor if self.expert is None else tensor[self.expert]


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks and its name.

    Raises:
        ModelError: No module list has as many entries as the config says there are layers.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ModelError(
            f"expected a Hugging Face causal language model with a config, got {type(model).__name__}", argument="model"
        )
    n_layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == n_layers]
    if not fitting:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists) or "none"
        raise ModelError(
            f"{type(model).__name__} says it has {n_layers} layers, but no module list has that many entries "
            f"(module lists found: {found})",
            argument="model",
        )
    # A vision tower of the same depth is a model of its own with another config, or else it is smaller.
    of_text = [item for item in fitting if _innermost_config(model, item[0]) is type(config.get_text_config())]
    name, blocks = max(of_text or fitting, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    parent = name.rpartition(".")[0]
    for other, module in fitting:
        if other != name and other.rpartition(".")[0] == parent and any(map(_is_linear, module.modules())):
            raise ModelError(
                f"{type(model).__name__} keeps the weights of its layers in several lists, {name} and {other} "
                "among them; expected one list of decoder blocks, so it cannot be scored",
                argument="model",
            )
    return name, blocks


def eligible_matrices(
    model: nn.Module, *, allow_meta: bool = False, blocks: tuple[str, nn.ModuleList] | None = None
) -> list[Matrix]:
    """All weights that are scored, in model order.

    Args:
        model: A causal LM.
        allow_meta: Accept weights without values, for planning.
        blocks: The result of :func:`decoder_blocks`, if it is known.

    Raises:
        ModelError: A block holds weights that cannot be scored (quantized or meta tensors, a matrix that belongs to no
            Linear and to no experts module, adapters other than unmerged LoRA), or one weight serves two modules.
    """
    prefix, block_list = blocks or decoder_blocks(model)
    check_causal(model)
    check_not_quantized(model, prefix, block_list)
    matrices = [
        matrix
        for index, block in enumerate(block_list)
        for matrix in _matrices_of_block(model, f"{prefix}.{index}", index, block, allow_meta)
    ]
    if not matrices:
        raise ModelError(
            f"the decoder blocks {prefix!r} of {type(model).__name__} hold no Linear layer", argument="model"
        )
    if not allow_meta:
        check_resident(model)
    _check_unshared(matrices)
    return matrices


def _matrices_of_block(model: nn.Module, prefix: str, index: int, block: nn.Module, allow_meta: bool) -> list[Matrix]:
    parts = adapter_parts(prefix, block)
    parts += [module for module in block.modules() if _is_chooser(module)]
    not_scored = {id(parameter) for part in parts for parameter in part.parameters()}
    matrices: list[Matrix] = []
    owned = set(not_scored)
    for path, module in block.named_modules():
        stem = plain_name(".".join(part for part in (prefix, path) if part))
        # The wrapper of a compiled module has all of its attributes, but is another module.
        if is_compiled(module) or id(module._parameters.get("weight")) in not_scored:
            continue
        if _is_linear(module):
            check_stored(module, "weight", f"{stem}.weight")
            weight = _checked_weight(f"{stem}.weight", module._parameters["weight"], 2, allow_meta)
            owned.add(id(weight))
            # An empty matrix has nothing to prune, and with empty rows tokens could not be counted.
            if weight.numel() and not _is_router(model, path, module):
                matrices.append(Matrix(f"{stem}.weight", index, module, isinstance(module, Conv1D)))
        elif _has_no_matrix(module):
            owned |= {id(parameter) for parameter in module.parameters(recurse=False)}
        elif follows_interface(module):
            for attribute in fused_weights(module):
                owned |= {id(getattr(module, name, None)) for name in (attribute, f"{attribute}_bias")}
                matrices += _experts(f"{stem}.{attribute}", index, module, attribute, allow_meta)
    _refuse_others(model, prefix, block, owned)
    return matrices


def _experts(name: str, index: int, module: nn.Module, attribute: str, allow_meta: bool) -> list[Matrix]:
    """The matrices of all experts in one fused weight of an experts module."""
    check_stored(module, attribute, name)
    weight = _checked_weight(name, getattr(module, attribute, None), 3, allow_meta)
    return [
        Matrix(f"{name}[{expert}]", index, module, bool(module.is_transposed), attribute, expert)
        for expert in range(len(weight) if weight.numel() else 0)
    ]


def _refuse_others(model: nn.Module, prefix: str, block: nn.Module, owned: set[int]) -> None:
    """Raise ModelError for a weight of a block that should be scored and belongs to none of its scored modules."""
    for path, parameter in block.named_parameters():
        if _is_matrix(path, parameter) and id(parameter) not in owned and not _is_router_weight(model, path, parameter):
            raise ModelError(
                f"{plain_name(f'{prefix}.{path}')} of shape {tuple(parameter.shape)} is a weight inside a decoder "
                "block that belongs to no Linear and to no module that follows transformers' experts interface "
                "(use_experts_implementation), so it cannot be scored",
                argument="model",
            )


def _innermost_config(model: nn.Module, path: str) -> type | None:
    """Type of the config of the module nearest above ``path`` that has one, as models inside models do."""
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1))
    return next((type(module.config) for module in above if isinstance(module, PreTrainedModel)), None)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _checked_weight(name: str, weight: torch.Tensor | None, dims: int, allow_meta: bool) -> torch.Tensor:
    if weight is None:
        raise ModelError(
            f"there is no {name}, although its module follows transformers' experts interface", argument="model"
        )
    if weight.device.type == "meta" and not allow_meta:
        raise ModelError(
            f"{name} is on the meta device or offloaded, so its gradients would be lost; load the whole model "
            "(no device_map that offloads to CPU or disk) or pass the path of the checkpoint folder",
            argument="model",
        )
    if weight.dtype not in FLOAT_DTYPES or weight.ndim != dims:
        raise ModelError(
            f"{name} is stored as {weight.dtype} of shape {tuple(weight.shape)}; quantized weights cannot be "
            "scored, load the model dequantized (dtype=torch.bfloat16, no quantization_config)",
            argument="model",
        )
    return weight


def _is_chooser(module: nn.Module) -> bool:
    """Whether a module of transformers, or a checkpoint's own code, routes tokens to experts or to one another."""
    kind = type(module)
    return kind.__module__.startswith("transformers") and kind.__name__.endswith(CHOOSER_CLASSES)


def _has_no_matrix(module: nn.Module) -> bool:
    """Whether a module's parameters act on each feature by itself: norms, and the convolutions of hybrid models."""
    depthwise = isinstance(module, nn.Conv1d) and module.groups == module.in_channels
    return depthwise or "Norm" in type(module).__name__


def _is_matrix(path: str, parameter: torch.Tensor) -> bool:
    """Not a bias, nor a vector of whatever shape."""
    return parameter.numel() > max(parameter.shape, default=0) and not path.endswith("bias")


def _n_experts(model: nn.Module) -> set[int]:
    config = config_of(model).get_text_config()
    found = [getattr(config, name, None) for name in EXPERT_COUNTS]
    return {count for value in found for count in (value if isinstance(value, list) else [value]) if count}


def _is_router(model: nn.Module, path: str, module: nn.Module) -> bool:
    (*above, last), width = plain_name(path).split("."), getattr(module, "out_features", None)
    if last in SHARED_EXPERT_GATES and width == 1:
        return True
    # A router may be a module with Linears of its own; a gate may also gate features.
    if not ALWAYS_ROUTERS.isdisjoint(above):
        return True
    return not ROUTERS.isdisjoint((*above, last)) and width in _n_experts(model)


def _is_router_weight(model: nn.Module, path: str, parameter: torch.Tensor) -> bool:
    owners = plain_name(path).split(".")[:-1]
    return not ROUTERS.isdisjoint(owners) and parameter.shape[0] in _n_experts(model)


def _check_unshared(matrices: list[Matrix]) -> None:
    seen: dict[tuple[int, int, int | None], str] = {}
    for matrix in matrices:
        # By storage, which two parameters may share; a weight without values, on meta or fake, has no address.
        place = matrix.parameter.untyped_storage()._cdata, int(matrix.parameter.storage_offset())
        first = seen.setdefault((*place, matrix.expert), matrix.name)
        if first != matrix.name:
            raise ModelError(
                f"{first} and {matrix.name} are one shared weight; its per-example gradient cannot be split",
                argument="model",
            )
