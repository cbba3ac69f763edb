"""Comparison of a model that is run in parts with the untouched whole.

In: a view and two short rows. Out: logits and some gradients of the untouched model, and the first difference between
these and what the parts compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet, Sequence

import torch
from torch import nn

from fastprune.calibration import MicroBatch
from fastprune.errors import ModelError
from fastprune.model.block_view import BlockArguments, BlockView
from fastprune.model.causality import NotScorableError, leaves_behind_embedding, refuse_later_tokens
from fastprune.model.experts import ExpertTokens
from fastprune.model.hooks import Capture
from fastprune.model.matrices import Matrix
from fastprune.model.module_check import TOLERANCE, relative_error
from fastprune.model.probe import EARLY, LENGTHS, LOUD, other_padding, padded_otherwise

ANY_ERROR = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, AssertionError)
"""Errors that an architecture's code raises on input that it does not expect."""


class _Gradients(dict[str, torch.Tensor]):
    """A sink that keeps ``dy^T x`` of each captured matrix, by its name."""

    wants_inputs, wants_gradients, per_example = False, True, True

    def inputs(self, matrix: Matrix, x: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """Not wanted."""

    def gradients(self, matrix: Matrix, x: torch.Tensor, dy: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """Form the gradient of one matrix, in fp32."""
        left, right = (x, dy) if matrix.input_major else (dy, x)
        self[matrix.name] = left.float().T @ right.float()


def reference(view: BlockView, batch: MicroBatch, depth: int) -> tuple[torch.Tensor, dict[Matrix, torch.Tensor]]:
    """Run the untouched model: its logits, and its gradients of the first matrix and of one expert if there are any.

    Args:
        view: The view to be checked.
        batch: The rows; the loss is of the first tokens of one of them.
        depth: Blocks that are in memory.

    Raises:
        NotScorableError: The model itself fails, or the loss of a row's first tokens depends on later ones.
        ModelError: No gradient reaches one of the matrices.
    """
    # The first experts module: its input is bit-identical both ways, so the same tokens reach each expert. Further up,
    # rounding may send a token elsewhere.
    fused = next((matrix for matrix in view.matrices if matrix.expert is not None and matrix.block < depth), None)
    firsts = [view.matrices[0], *([fused] if fused is not None else [])]
    parameters = [matrix.parameter for matrix in firsts]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with leaves_behind_embedding(view.model) as leaves:
            logits = _untouched(view, batch, depth)
        if not leaves:
            raise NotScorableError(
                f"{type(view.model).__name__} does not call its input embedding, so it cannot be known what a "
                "token's logits depend on",
                argument="model",
            )
        loss = view.weighted_losses(logits.flatten(0, 1)[batch.scored], batch.targets, batch.token_weights).sum()
        gradients = torch.autograd.grad(loss, [*parameters, *leaves], allow_unused=True)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    for matrix, gradient in zip(firsts, gradients, strict=False):
        if gradient is None:
            raise ModelError(f"no gradient reaches {matrix.name} in the untouched model")
    refuse_later_tokens(view.model, gradients[len(parameters) :], batch.input_ids.shape, LOUD, EARLY)
    chosen = {view.matrices[0]: view.matrices[0].part_of(gradients[0])}
    if fused is not None:
        experts = [matrix for matrix in view.matrices if matrix.parameter is fused.parameter]
        norms = gradients[1].flatten(1).norm(dim=1)  # so few tokens do not reach every expert
        busiest = experts[int(norms.argmax())]
        chosen[busiest] = busiest.part_of(gradients[1])
    return logits, chosen


def _untouched(view: BlockView, batch: MicroBatch, depth: int) -> torch.Tensor:
    """Logits of the model as any user runs it, or of its first blocks."""
    try:
        return view.learn_return_type(dataclasses.replace(batch, position_ids=None))
    except ANY_ERROR as error:
        if depth < view.n_blocks or isinstance(error, torch.OutOfMemoryError):
            raise  # not the model itself, but the missing blocks or the memory
        raise itself_fails(view.model, error) from error


def itself_fails(model: nn.Module, error: Exception) -> NotScorableError:
    """The error for a model that fails untouched on the rows of the check."""
    return NotScorableError(
        f"{type(model).__name__} itself fails on rows of {' and '.join(map(str, LENGTHS))} tokens "
        f"({type(error).__name__}: {error}), so it cannot be scored",
        argument="model",
    )


def disagreement(
    view: BlockView,
    batch: MicroBatch,
    logits: torch.Tensor,
    gradients: dict[Matrix, torch.Tensor],
    parts: Sequence[range],
) -> str | None:
    """Compare the model run in parts with the whole.

    Args:
        view: The view to be checked.
        batch: The rows.
        logits: Of the untouched model.
        gradients: Of the untouched model.
        parts: Runs of blocks, as the pass will go through them.

    Returns:
        The first difference, in words; ``None`` if there is none.
    """
    tolerance = TOLERANCE[view.matrices[0].weight.dtype]
    attended = batch.attention_mask.bool()

    # As the engine does: forward from boundary to boundary, then each segment again from the boundary below it. State
    # that a block keeps, or passes on other than by the hidden states, shows in the gradient. The second time the
    # padding has other tokens, which shows whether the text sees them.
    with torch.no_grad():
        other, other_arguments = view.prologue(padded_otherwise(batch))
        hidden, arguments = view.prologue(batch)
        if parts[-1].stop < view.n_blocks and (shared := _shared_container(arguments)):
            return f"all blocks are given one {shared}, in which a later one may find what an earlier one left"
        boundaries = [hidden]
        for part in parts:
            boundaries.append(view.run(part.start, part.stop, boundaries[-1], arguments))
        left = boundaries[-1][attended.to(boundaries[-1].device)]
    sink, downstream = _Gradients(), None
    for part in reversed(parts):
        expected = boundaries.pop()
        entering = other if part.start == 0 else other_padding(boundaries[-1], attended)
        entering = entering.detach().requires_grad_(True)
        captured = [matrix for matrix in gradients if matrix.block in part]
        with Capture(captured, sink) as capture, capture.micro_batch(batch.input_ids.shape):
            leaving = view.run(part.start, part.stop, entering, other_arguments)
            if downstream is None:
                _, downstream = view.losses_and_gradient(leaving, batch, 1.0)
            torch.autograd.backward(leaving, downstream)
        downstream = entering.grad
        # Outputs are compared too: errors of two segments may cancel below them, and a norm may hide a factor.
        text = attended.to(leaving.device)
        if (error := relative_error(leaving[text], expected[text])) > tolerance:
            with torch.no_grad():
                again = view.run(part.start, part.stop, boundaries[-1], arguments)
            if (repeated := relative_error(again[text], expected[text])) > tolerance:
                return (
                    f"what leaves block {part.stop - 1} differs by {repeated:.1e} (relative) when it is computed "
                    "again from the same input"
                )
            return f"other tokens in the place of the padding change the text by {error:.1e} (relative): it sees them"
    with torch.no_grad():
        divided = view.epilogue(left)
    if (error := relative_error(divided, logits[attended])) > tolerance:
        return f"its logits differ by {error:.1e} (relative) from the untouched model's"
    for matrix, gradient in gradients.items():
        found = sink.get(matrix.name)
        if found is None:
            return f"no token reached {matrix.name}, although its gradient in the untouched model is not zero"
        if (error := relative_error(found, gradient)) > tolerance:
            return f"the gradient of {matrix.name} differs by {error:.1e} (relative) from the untouched model's"
    return None


def _shared_container(arguments: BlockArguments) -> str | None:
    """Type of a mutable argument that several blocks are given, in which one may leave something for another."""
    seen: set[int] = set()
    for args, kwargs in arguments.calls:
        for value in _containers((*args, *kwargs.values())):
            if id(value) in seen:
                return type(value).__name__
            seen.add(id(value))
    return None


def _containers(values: tuple) -> Iterator[object]:
    for value in values:
        if isinstance(value, tuple):
            yield from _containers(value)
        elif isinstance(value, MutableMapping | MutableSequence | MutableSet):
            yield value
