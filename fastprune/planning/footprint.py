"""What the parts of a model weigh, from its shapes alone.

In: a model, with or without its weights, or a config. Out: :class:`Footprint`, the bytes of each block and of the rest,
and the bytes that autograd keeps of a block. The latter are counted on a model of fake tensors, which have shapes and
no memory; if a model cannot run on these, a bound from the sizes of its matrices has to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from fastprune.calibration import MicroBatch
from fastprune.model.anatomy import Anatomy
from fastprune.model.block_view import BlockArguments, BlockView
from fastprune.model.frozen import frozen_eval
from fastprune.model.matrices import Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model.

    Attributes:
        parameters: Number of all parameters.
        block_bytes: Weights of each block, bytes.
        embedding_bytes: Of the input embedding.
        head_bytes: Of the head; the embedding itself if ``tied``.
        tied: Whether the two are one.
        rest_bytes: Everything else.
        eligible: Scored weights of each block, by matrix.
        widest: Largest output of a matrix, features.
        active: Scored weights that a token is multiplied by (of a mixture of experts, those of its experts).
        hidden: Width of the hidden states.
        element: Bytes of a weight.
        vocabulary: Rows of the head.
    """

    parameters: int
    block_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tied: bool
    rest_bytes: int
    eligible: tuple[tuple[int, ...], ...]
    widest: int
    active: float
    hidden: int
    element: int
    vocabulary: int

    @property
    def weight_bytes(self) -> int:
        """The whole model."""
        ends = self.embedding_bytes + (0 if self.tied else self.head_bytes)
        return sum(self.block_bytes) + ends + self.rest_bytes

    @property
    def n_eligible(self) -> int:
        """Scored weights of the model."""
        return sum(map(sum, self.eligible))


def footprint(anatomy: Anatomy) -> Footprint:
    """Weigh a model; its weights may be on the meta device."""
    model, matrices, blocks = anatomy.model, anatomy.matrices, anatomy.blocks
    eligible: list[list[int]] = [[] for _ in blocks]
    for matrix in matrices:
        eligible[matrix.block].append(matrix.weight.numel())
    embedding, head, table = model.get_input_embeddings(), model.get_output_embeddings(), _table(model)
    embedding_bytes = _bytes(embedding.parameters())
    head_bytes = _bytes(head.parameters()) if head is not None else 0
    tied = any(parameter is table for parameter in ([] if head is None else head.parameters()))
    block_bytes = tuple(_bytes(block.parameters()) for block in blocks)
    total = _bytes(model.parameters())
    return Footprint(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        block_bytes=block_bytes,
        embedding_bytes=embedding_bytes,
        head_bytes=head_bytes,
        tied=tied,
        rest_bytes=total - sum(block_bytes) - embedding_bytes - (0 if tied else head_bytes),
        eligible=tuple(map(tuple, eligible)),
        widest=max(max(matrix.weight.shape) for matrix in matrices),
        active=sum(matrix.weight.numel() * _share(model, matrix) for matrix in matrices),
        hidden=table.shape[1],
        element=matrices[0].weight.element_size(),
        vocabulary=table.shape[0],
    )


def _table(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding's weight ``(vocabulary, hidden)``."""
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def _share(model: PreTrainedModel, matrix: Matrix) -> float:
    """Which part of the tokens a matrix multiplies, on average; all of them where the config does not say."""
    if matrix.expert is None:
        return 1.0
    n_experts = len(matrix.parameter)
    return min(1.0, (getattr(model.config.get_text_config(), "num_experts_per_tok", None) or n_experts) / n_experts)


def activation_bound(anatomy: Anatomy) -> int:
    """Bytes a token that autograd and the capture can keep of the largest block: every input and output apart."""
    model, matrices = anatomy.model, anatomy.matrices
    widths = [0.0] * len(anatomy.blocks)
    for matrix in matrices:
        widths[matrix.block] += sum(matrix.weight.shape) * _share(model, matrix)
    hidden = _table(model).shape[1]
    # Norms keep fp32 copies of what they read, and an activation function written out in steps keeps each of them.
    return int(1.5 * max(widths) * matrices[0].weight.element_size() + 6 * 4 * hidden)


def activation_bytes(config: object, rows: int, tokens: int) -> tuple[int, int] | None:
    """Bytes of one micro-batch: what autograd and the capture keep of the largest block, and what blocks are given.

    Args:
        config: Of a causal LM.
        rows: Examples of the micro-batch.
        tokens: Of each.

    Returns:
        Bytes kept of a block while it is at work; bytes of masks and position tables, which every micro-batch keeps for
        the whole pass; or ``None`` if the model does not run on fake tensors (its code looks at values).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    # Whatever an architecture's code raises where it wants values: an estimate is not worth an error.
    with contextlib.suppress(Exception), FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        with frozen_eval(model):
            view = BlockView(Anatomy.of(model, allow_meta=True), torch.device("cpu"))
            positions = torch.arange(tokens).expand(rows, tokens)
            hidden, arguments = view.prologue(_unscored(positions))
            kept = max(_kept(view, index, hidden, arguments) for index in {0, view.n_blocks - 1})
            given = {
                tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
                for args, kwargs in arguments.calls
                for tensor in _tensors([*args, *kwargs.values()])
            }
            return kept, sum(given.values())
    return None


def _unscored(positions: torch.Tensor) -> MicroBatch:
    """A micro-batch for the blocks alone, of which nothing is scored."""
    rows, none = len(positions), torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros_like(positions),
        attention_mask=torch.ones_like(positions),
        position_ids=positions,
        scored=none,
        rows_of_scored=none,
        targets=none,
        token_weights=none.double(),
        ends_turn=torch.zeros(rows, dtype=torch.bool),
        lengths=torch.full((rows,), positions.shape[1]),
        example_indices=tuple(range(rows)),
        names=("",) * rows,
    )


def _tensors(values: Iterable[object]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _kept(view: BlockView, index: int, hidden: torch.Tensor, arguments: BlockArguments) -> int:
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    not_counted = {tensor.untyped_storage()._cdata for tensor in (*view.model.parameters(), *view.model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in not_counted:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor too, so that its number is not used again
        return tensor

    def keep_input(module: nn.Module, args: tuple, output: object) -> None:
        keep(args[0])

    watched = [matrix.module for matrix in view.matrices if matrix.block == index]
    hooks = [module.register_forward_hook(keep_input) for module in watched]
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            view.run(index, index + 1, hidden.detach().requires_grad_(True), arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(size for size, _ in kept.values())
