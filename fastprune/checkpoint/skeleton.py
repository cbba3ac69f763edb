"""A model without weights, and the place of each weight in a checkpoint.

In: a checkpoint folder. Out: the model with its parameters on the meta device and its buffers real, and one
:class:`Recipe` for each parameter. Names on disk that differ from those in memory, and weights that are stored in
pieces (one tensor for each expert), go through transformers' own conversion; a weight that it cannot name is refused.
"""

from __future__ import annotations

import contextlib
import copy
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastprune.checkpoint.built_size import check_size
from fastprune.checkpoint.config_file import refused
from fastprune.checkpoint.load import load_config
from fastprune.checkpoint.shards import DTYPES, Stored, read_elements, read_tensor, stored_tensors
from fastprune.errors import ModelError
from fastprune.model.fingerprint import sample_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_building = threading.Lock()
# Elements of two tensors that are compared at a time.
_COMPARED = 1 << 24


@dataclass
class Recipe:
    """How one parameter or buffer is made from stored tensors.

    Attributes:
        name: Name in the model.
        shape: Shape in memory.
        dtype: Dtype in memory.
        sources: Stored tensors by the pattern of their names, in the order in which they are joined.
        converter: transformers' conversion, or ``None`` where one stored tensor is the parameter.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: dict[str, list[Stored]] = field(default_factory=dict)
    converter: Any = None

    def read(self, model: nn.Module, *, pinned: bool = False) -> torch.Tensor:
        """The tensor, on the CPU.

        Args:
            model: The model, whose config a conversion needs.
            pinned: Read into page-locked memory if no conversion and no cast is needed.

        Raises:
            ArtifactError: A shard cannot be read.
            ModelError: The conversion does not give this parameter, or gives it in another shape.
        """
        stored = [part for parts in self.sources.values() for part in parts]
        pinned = pinned and self.converter is None and all(DTYPES.get(part.dtype) == self.dtype for part in stored)
        tensors = {
            pattern: [read_tensor(part, pinned=pinned) for part in parts] for pattern, parts in self.sources.items()
        }
        if self.converter is None:
            ((tensor,),) = tensors.values()
            return tensor.to(self.dtype)
        converter = copy.deepcopy(self.converter)
        for pattern, pieces in tensors.items():
            for piece in pieces:
                converter.add_tensor(self.name, self.name, pattern, piece.to(self.dtype))
        tensors.clear()
        made = converter.convert(self.name, model=model, config=model.config)
        if self.name not in made:
            raise ModelError(
                f"transformers' conversion makes {', '.join(made)} where {self.name} is needed", argument="model"
            )
        tensor = made[self.name]
        tensor = (tensor[0] if isinstance(tensor, list) else tensor).to(self.dtype).contiguous()
        if tuple(tensor.shape) != self.shape:
            raise ModelError(
                f"{self.name} should have the shape {self.shape}; the {len(stored)} "
                f"pieces stored of it make {tuple(tensor.shape)}, so some are missing",
                argument="model",
            )
        return tensor


def skeleton(
    folder: str | Path, dtype: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, Recipe], dict[str, Stored]]:
    """Build the model of a checkpoint folder without its weights.

    Args:
        folder: Folder with ``config.json`` and safetensors weights.
        dtype: Dtype of the weights; ``None`` takes the one that ``config.json`` names or, if it names none, that of the
            first tensor on disk, as loading with ``dtype="auto"`` does.

    Returns:
        The model in evaluation mode, every parameter on the meta device; a recipe for each parameter and persistent
        buffer by its name (tied ones once, under their first name); and the stored tensors by their names on disk.

    Raises:
        NotFoundError: The folder, its config or a shard does not exist.
        ArtifactError: A shard or the index is truncated.
        ModelError: transformers cannot build the model, or the checkpoint lacks a weight.
    """
    config = load_config(folder)
    stored = stored_tensors(Path(folder))
    wanted = dtype or getattr(config, "dtype", None)
    if wanted is None:
        wanted = next((DTYPES[tensor.dtype] for tensor in stored.values() if tensor.dtype in DTYPES), torch.float32)
    from transformers import AutoModelForCausalLM

    check_size(config, stored, folder)
    with refused("model", f"{folder} cannot be built as a causal language model"), _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=False).eval()
    return model, _recipes(model, stored, wanted, folder), stored


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters move to the meta device as they are registered. Buffers keep their values: no file holds most of them.

    Building under ``torch.device("meta")`` would lose the buffers too, and not every architecture can make them again.
    ``init_empty_weights`` of accelerate, an optional package, patches the same method, but unties tied parameters and
    affects models that other threads build; so does torch's registration hook, whose table is not safe to change while
    they do. One model is built like this at a time.
    """
    builder = threading.get_ident()

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        # A parameter on meta keeps its identity, by which tied weights are recognized.
        if threading.get_ident() == builder and parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _building:
        register = nn.Module.register_parameter
        try:
            nn.Module.register_parameter = register_on_meta  # type: ignore[assignment, method-assign]  # see above
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _recipes(
    model: nn.Module, stored: Mapping[str, Stored], dtype: torch.dtype, folder: str | Path
) -> dict[str, Recipe]:
    in_memory = model.state_dict(keep_vars=True)
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    recipes: dict[str, Recipe] = {}
    for source, name, pattern, converter in _names(model, stored, in_memory):
        kept = next((wanted for part, wanted in plan.items() if re.search(rf"\b{re.escape(part)}\b", name)), None)
        recipe = recipes.setdefault(
            name, Recipe(name, tuple(in_memory[name].shape), kept or in_memory[name].dtype, converter=converter)
        )
        recipe.sources.setdefault(pattern, []).append(stored[source])
    for recipe in recipes.values():
        if recipe.converter is None and len(recipe.sources) > 1:
            first, second = list(recipe.sources)[:2]
            raise ModelError(
                f"{folder} holds both {first} and {second}, each of which is {recipe.name} of the model; remove "
                "one of them",
                argument="model",
            )
        if recipe.converter is None and [part.shape for part in next(iter(recipe.sources.values()))] != [
            tuple(in_memory[recipe.name].shape)
        ]:
            raise ModelError(
                f"{recipe.name} should have the shape {tuple(in_memory[recipe.name].shape)}; {folder} holds "
                f"{[part.shape for part in next(iter(recipe.sources.values()))]}",
                argument="model",
            )
    _part_unequal(model, recipes)
    in_memory = model.state_dict(keep_vars=True)
    named = {id(in_memory[name]) for name in recipes}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in named]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the weights of {type(model).__name__}, the first is "
            f"{missing[0]}; names on disk that transformers does not convert cannot be streamed",
            argument="model",
        )
    return recipes


def _part_unequal(model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
    """Untie parameters whose values on disk differ, as transformers does: the folder decides, not the config."""
    in_memory = model.state_dict(keep_vars=True)
    first: dict[int, Recipe] = {}
    for recipe in recipes.values():
        parameter = in_memory[recipe.name]
        other = first.setdefault(id(parameter), recipe)
        if other is recipe or recipe.converter is not None or other.converter is not None:
            continue
        ((one,),), ((two,),) = recipe.sources.values(), other.sources.values()
        if not _equal(one, two, recipe.dtype):
            parent, _, name = recipe.name.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Parameter(torch.empty_like(parameter), requires_grad=False))


def _equal(one: Stored, two: Stored, dtype: torch.dtype) -> bool:
    """Whether two stored tensors of one shape are equal in memory; compared in pieces, as they may be large."""
    positions = sample_positions(one.numel)
    samples = (read_elements(stored, positions).to(dtype) for stored in (one, two))
    if not torch.equal(*samples):
        return False
    for first in range(0, one.numel, _COMPARED):
        pieces = (_piece(stored, first, min(_COMPARED, one.numel - first)) for stored in (one, two))
        if not torch.equal(*(read_tensor(piece).to(dtype) for piece in pieces)):
            return False
    return True


def _piece(stored: Stored, first: int, count: int) -> Stored:
    return replace(stored, shape=(count,), start=stored.start + first * DTYPES[stored.dtype].itemsize)


def _names(
    model: nn.Module, stored: Mapping[str, Stored], in_memory: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, str, str, Any]]:
    """``(name on disk, name in memory, pattern, converter)`` of every stored tensor that the model has."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:  # versions of transformers without them use equal names on disk and in memory
        yield from ((name, name, name, None) for name in stored if name in in_memory)
        return
    mapping = get_model_conversion_mapping(cast("PreTrainedModel", model))
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, known = cast("PreTrainedModel", model).base_model_prefix, dict(in_memory)
    # In natural order: experts are joined in this order, and expert 10 comes after expert 9.
    for source in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(source, renamings, converters, prefix, known)
        if name not in in_memory and source in in_memory:
            name, pattern = source, None
        if name in in_memory:
            yield source, name, pattern or source, of_pattern[pattern] if pattern is not None else None
