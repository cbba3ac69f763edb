"""A causal LM taken apart once: its decoder blocks and the matrices that are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import nn

from fastprune.model.adapters import unwrap
from fastprune.model.matrices import Matrix, decoder_blocks, eligible_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model, formed once a run and handed on.

    Attributes:
        model: The plain model, without compilation and adapters around it.
        block_list: The list itself, in which a view replaces blocks by stubs.
        blocks: The decoder blocks, also while stubs are in the list.
        matrices: All matrices that are scored, in model order.
    """

    model: PreTrainedModel
    block_list: nn.ModuleList
    blocks: tuple[nn.Module, ...]
    matrices: tuple[Matrix, ...]

    @classmethod
    def of(cls, model: nn.Module, *, allow_meta: bool = False) -> Anatomy:
        """Take a model apart.

        Args:
            model: A causal LM; it may be compiled or have adapters.
            allow_meta: Accept weights without values, for planning and for weights that are streamed.

        Raises:
            ModelError: As :func:`fastprune.model.matrices.eligible_matrices`.
        """
        plain = unwrap(model)
        found = decoder_blocks(plain)
        block_list = found[1]
        matrices = eligible_matrices(plain, allow_meta=allow_meta, blocks=found)
        return cls(cast("PreTrainedModel", plain), block_list, tuple(block_list), tuple(matrices))
