"""Where a float16 model left the range of its dtype, for the error message.

In: a micro-batch with a loss, gradient or activation that is not finite. Out: the first block with finite input and
weights whose output is not finite. The blocks run once more, one by one, after the error only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from fastprune.calibration import MicroBatch
from fastprune.errors import ScoringError
from fastprune.model.anatomy import Anatomy
from fastprune.model.block_view import BlockArguments, BlockView
from fastprune.model.weights import Weights
from fastprune.model.whole_view import WholeView

WAY_OUT = 'run the model in bfloat16 or float32 (of a checkpoint folder: dtype="bfloat16")'


class NotFiniteError(ScoringError):
    """A loss, a gradient or an activation of one example is not finite.

    Attributes:
        name: Name of the example.
        row: Row of the example in its micro-batch.
        gradient_at: Where the backward pass first met a gradient that is not finite; ``None``: the forward pass did.
    """

    def __init__(self, message: str, name: str, row: int, gradient_at: str | None = None) -> None:
        super().__init__(message)
        self.name, self.row, self.gradient_at = name, row, gradient_at


def overflow(
    error: NotFiniteError,
    view: BlockView | WholeView,
    weights: Weights,
    parts: Sequence[range],
    entering: torch.Tensor,
    arguments: BlockArguments,
    batch: MicroBatch,
) -> ScoringError:
    """The error of a float16 model: an overflow, unless a weight itself is not finite.

    Args:
        error: The error as it was found.
        view: The model.
        weights: Where its weights come from.
        parts: Runs of blocks.
        entering: ``(rows, tokens, hidden)`` states that enter block 0.
        arguments: The blocks' other arguments.
        batch: The micro-batch.
    """
    if error.gradient_at is not None:
        return ScoringError(
            f"{error.name}: the gradient that reached {error.gradient_at} overflowed float16; {WAY_OUT}"
        )
    states = (
        _of_whole(view, batch) if isinstance(view, WholeView) else _of_blocks(view, weights, parts, entering, arguments)
    )
    place, finite_weights = "the final norm or the head", _all_finite(_outside_blocks(view.anatomy))
    for index, block, hidden in states:
        if not bool(hidden[error.row, : int(batch.lengths[error.row])].isfinite().all()):
            place, finite_weights = f"block {index}", block is not None and _all_finite(block.parameters())
            break
    if not finite_weights:
        return ScoringError(str(error))
    return ScoringError(f"{error.name}: its activations overflowed float16 in {place}, first of all; {WAY_OUT}")


_State = tuple[int, nn.Module | None, torch.Tensor]


@torch.no_grad()
def _of_blocks(
    view: BlockView, weights: Weights, parts: Sequence[range], entering: torch.Tensor, arguments: BlockArguments
) -> Iterator[_State]:
    """What enters the first block (with the index -1), and what leaves each block."""
    hidden = entering.detach()
    yield -1, None, hidden
    for part in parts:
        with weights.held(tuple(part)):
            for index in part:
                hidden = view.run(index, index + 1, hidden, arguments)
                yield index, view.blocks[index], hidden


@torch.no_grad()
def _of_whole(view: WholeView, batch: MicroBatch) -> list[_State]:
    states: list[_State] = []

    def note(index: int, block: nn.Module, output: torch.Tensor | tuple) -> None:
        states.append((index, block, output if isinstance(output, torch.Tensor) else output[0]))

    with contextlib.ExitStack() as hooks:
        for index, block in enumerate(view.anatomy.blocks):
            handle = block.register_forward_hook(lambda block, args, output, index=index: note(index, block, output))
            hooks.callback(handle.remove)
        view.causal_forward(batch)
    return states


def _outside_blocks(anatomy: Anatomy) -> list[nn.Parameter]:
    """Weights outside the blocks, but for the embedding: the row of a token that no example has may hold anything."""
    model, inside = anatomy.model, {id(each) for block in anatomy.blocks for each in block.parameters()}
    head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = model.get_input_embeddings().weight
    others = [each for each in model.parameters() if id(each) not in inside]
    return [each for each in others if each is not embedding or each is head]


def _all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    return all(bool(each.isfinite().all()) for each in parameters if not each.is_meta)
