"""Before a long pass: does this model, taken apart, compute what it computes as a whole?

In: a model's weights, and the examples of the pass. Out: its view, or the whole-model view with a warning, or an error.
Two short rows are driven both ways, through the blocks and through the untouched model; logits and the gradients of one
weight, and of one expert where there are any, are compared, and each segment's output when it runs for the second time,
with other tokens in the place of the padding. Catches what reading code cannot: blocks that share state, padding that
leaks, tokens that see later ones (:mod:`fastprune.model.causality`), experts that are run another way, rows that see
each other and Linears that do more than multiply (:mod:`fastprune.model.module_check`). The model itself is used, which
costs a few passes over about ten tokens; of a streamed model the blocks of the first segment alone, as they are in
memory then.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, MutableMapping, MutableSequence, MutableSet, Sequence

import torch
from torch import nn

from fastprune.calibration import Example, MicroBatch
from fastprune.errors import FastpruneError, ModelError, warn
from fastprune.model.block_view import BlockArguments, BlockView, View
from fastprune.model.causality import (
    NotScorableError,
    exceeded_window,
    long_row,
    refuse_later_tokens,
    refuse_later_tokens_of_long_rows,
    refuse_without_mask,
)
from fastprune.model.experts import ExpertTokens
from fastprune.model.frozen import uninterrupted
from fastprune.model.hooks import Capture
from fastprune.model.matrices import Matrix
from fastprune.model.module_check import TOLERANCE, ModuleCheck, relative_error
from fastprune.model.probe import (
    EARLY,
    LENGTHS,
    LOUD,
    batch_of,
    draw,
    other_padding,
    padded_otherwise,
    probe,
    tokens_of,
)
from fastprune.model.weights import Weights
from fastprune.model.whole_view import WholeView

# Whatever an architecture's code raises when it is given what it does not expect.
_ERRORS = (RuntimeError, TypeError, AttributeError, KeyError, IndexError, ValueError, AssertionError)


class _Gradients(dict[str, torch.Tensor]):
    """A sink that keeps ``dy^T x`` of each watched matrix, by its name."""

    wants_inputs, wants_gradients, per_example = False, True, True

    def inputs(self, matrix: Matrix, x: torch.Tensor, tokens: ExpertTokens | None) -> None:
        """Not asked for."""

    def gradients(self, matrix: Matrix, x: torch.Tensor, dy: torch.Tensor, tokens: ExpertTokens | None) -> None:
        """Form the gradient of one matrix, in fp32."""
        left, right = (x, dy) if matrix.input_major else (dy, x)
        self[matrix.name] = left.float().T @ right.float()


def checked_view(
    weights: Weights, parts: Sequence[range], segments: int | None, examples: Sequence[Example] = ()
) -> BlockView | WholeView:
    """Build the view of a model and check it.

    Args:
        weights: Of a causal LM inside :func:`fastprune.model.frozen.frozen_eval`. Of a streamed one, embedding,
            head and the blocks of ``parts`` have to be held.
        parts: Runs of blocks, from the first one on, as the pass will go through them; the check covers these.
        segments: What the caller asked for; more than one rules the whole-model view out.
        examples: All that the pass will see. The check's tokens are theirs, for what the embedding holds of others does
            not matter; the longest of them says which windows of attention are exceeded.

    Returns:
        The block view if it agrees with the untouched model, otherwise the whole-model view (with a FastpruneWarning).

    Raises:
        ModelError: The view disagrees with the model and more than one segment was asked for, or the model's weights
            cannot be scored at all.
    """
    view = BlockView(weights.anatomy, weights.device)
    tokens = tokens_of(view, examples)
    batch, alone = probe(view, tokens)
    window = exceeded_window(view.model.config, longest := max(map(len, examples), default=0))
    covered = [matrix for matrix in view.matrices if matrix.block < parts[-1].stop]
    modules = ModuleCheck(covered, batch.input_ids.shape, LOUD)
    counted_otherwise = False
    try:
        with view.truncated(parts[-1].stop), modules:
            reference = _reference(view, batch, parts[-1].stop)
            _refuse_later_tokens_without_mask(view, alone)
            counted_otherwise = _counts_otherwise(view, batch)
            reason = _disagreement(view, batch, *reference, parts)
        if window is not None and reason is None:
            row = batch_of(view, [draw(tokens, long_row(window, longest))])
            refuse_later_tokens_of_long_rows(view, row, window, parts[-1].stop)
    except NotScorableError:
        raise
    except FastpruneError as error:
        reason = str(error)
    except _ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
    modules.refuse()
    if counted_otherwise:
        raise ModelError(
            f"model: {type(view.model).__name__} does not count positions from 0: it embeds tokens in another way when "
            "position_ids are 0, 1, 2, … than when there are none; expected the same both ways (RoBERTa and its kin "
            "begin after their padding token's id), so it cannot be scored"
        )
    if reason is None:
        return view
    if weights.streamed:
        raise ModelError(
            f"model: {type(view.model).__name__} cannot be run block by block ({reason}), so it cannot be streamed; "
            "load it and pass the model"
        )
    if segments is not None and segments > 1:
        raise ModelError(
            f"model: {type(view.model).__name__} cannot be run block by block ({reason}); use segments=1, "
            "which runs it whole"
        )
    whole = WholeView(weights.anatomy, weights.device)
    _refuse_use_of_padding(whole, batch)
    _refuse_later_tokens_without_mask(whole, alone)
    if window is not None:
        row = batch_of(view, [draw(tokens, long_row(window, longest))])
        _refuse_later_tokens_without_mask(whole, row, window + 1)
    warn(f"{type(view.model).__name__} cannot be run block by block ({reason}); it is scored whole, with segments=1")
    return whole


def _counts_otherwise(view: BlockView, batch: MicroBatch) -> bool:
    """Whether the model's own positions are others than those that are given to it, as its embeddings show.

    Where positions act inside the blocks, as rotary ones do, only their differences matter.
    """
    if "position_ids" not in view.accepted:
        return False
    with torch.no_grad():
        given = view.entering(batch)
        own = view.entering(dataclasses.replace(batch, position_ids=None))
    attended = batch.attention_mask.bool().to(own.device)
    # The same sums of the same rows of tables: equal to the bit, if positions are.
    return relative_error(given[attended], own[attended]) > 1e-6


@contextlib.contextmanager
def _leaves_behind_embedding(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Every output of the input embedding becomes a leaf, so that gradients go through every module of the blocks."""
    leaves: list[torch.Tensor] = []

    def start_here(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1].clone()  # some models scale embeddings in place

    handle = model.get_input_embeddings().register_forward_hook(start_here)
    try:
        yield leaves
    finally:
        with uninterrupted():
            handle.remove()


def _reference(view: BlockView, batch: MicroBatch, depth: int) -> tuple[torch.Tensor, dict[Matrix, torch.Tensor]]:
    """Logits of the untouched model, and its gradient of the first matrix and of one expert if there are any.

    Raises:
        NotScorableError: The loss of a row's first tokens depends on those behind them.
    """
    # The first experts module: what enters it has the same bits both ways, so the same tokens reach each expert;
    # further up, rounding may send a token elsewhere.
    fused = next((matrix for matrix in view.matrices if matrix.expert is not None and matrix.block < depth), None)
    firsts = [view.matrices[0], *([fused] if fused is not None else [])]
    parameters = [matrix.parameter for matrix in firsts]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with _leaves_behind_embedding(view.model) as leaves:
            logits = _untouched(view, batch, depth)
        if not leaves:
            raise NotScorableError(
                f"model: {type(view.model).__name__} does not call its input embedding, so what a token's logits "
                "depend on cannot be known"
            )
        loss = view.weighted_losses(logits.flatten(0, 1)[batch.scored], batch.targets, batch.token_weights).sum()
        gradients = torch.autograd.grad(loss, [*parameters, *leaves], allow_unused=True)
    finally:
        with uninterrupted():
            for parameter in parameters:
                parameter.requires_grad_(False)
    for matrix, gradient in zip(firsts, gradients, strict=False):
        if gradient is None:
            raise ModelError(f"no gradient reaches {matrix.name} in the untouched model")
    refuse_later_tokens(view.model, gradients[len(parameters) :], batch.input_ids.shape, LOUD, EARLY)
    chosen = {view.matrices[0]: view.matrices[0].part_of(gradients[0])}
    if fused is not None:
        experts = [matrix for matrix in view.matrices if matrix.parameter is fused.parameter]
        norms = gradients[1].flatten(1).norm(dim=1)  # not every expert is given one of so few tokens
        busiest = experts[int(norms.argmax())]
        chosen[busiest] = busiest.part_of(gradients[1])
    return logits, chosen


def _refuse_later_tokens_without_mask(view: View, alone: MicroBatch, early: int = EARLY) -> None:
    """Raise if the logits of a row's first tokens depend on those behind them where no row is padded."""
    with _leaves_behind_embedding(view.model) as leaves:
        asked = view.causal_forward(alone)[0, :early].float().sum()
    refuse_without_mask(view.model, torch.autograd.grad(asked, leaves, allow_unused=True), alone.input_ids.shape, early)


def _untouched(view: BlockView, batch: MicroBatch, depth: int) -> torch.Tensor:
    """Logits of the model as any user runs it, or of its first blocks."""
    try:
        return view.learn_return_type(dataclasses.replace(batch, position_ids=None))
    except _ERRORS as error:
        if depth < view.n_blocks or isinstance(error, torch.OutOfMemoryError):
            raise  # not the model itself: the missing blocks, or what else is in memory
        raise _itself_fails(view.model, error) from error


def _itself_fails(model: nn.Module, error: Exception) -> NotScorableError:
    return NotScorableError(
        f"model: {type(model).__name__} itself fails on rows of {' and '.join(map(str, LENGTHS))} tokens "
        f"({type(error).__name__}: {error}), so it cannot be scored"
    )


@torch.no_grad()
def _refuse_use_of_padding(whole: WholeView, batch: MicroBatch) -> None:
    """Raise if logits of the text depend on the padding behind it, or on its mask, which no pass gives to the model.

    Where the model comes apart, the comparison of the parts with the whole says so.
    """
    attended = batch.attention_mask.bool()
    try:
        found = whole.causal_forward(batch)[attended]
        masked = whole.forward(batch.input_ids, batch.attention_mask, batch.position_ids)[attended]
        otherwise = whole.causal_forward(padded_otherwise(batch))[attended]
    except _ERRORS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise _itself_fails(whole.model, error) from error
    for what, other in (("the mask of the padding behind a text", masked), ("the padding itself", otherwise)):
        error = relative_error(found, other)
        if error > TOLERANCE[whole.matrices[0].weight.dtype]:
            raise NotScorableError(
                f"model: {what} changes the logits of the text by {error:.1e} (relative) in "
                f"{type(whole.model).__name__}, so it cannot be scored"
            )


def _shared_container(arguments: BlockArguments) -> str | None:
    """What blocks could leave something in for one another, if there is anything: past the check of the first ones."""
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


def _disagreement(
    view: BlockView,
    batch: MicroBatch,
    logits: torch.Tensor,
    gradients: dict[Matrix, torch.Tensor],
    parts: Sequence[range],
) -> str | None:
    """What differs between the parts and the whole, in words; ``None`` if nothing does."""
    tolerance = TOLERANCE[view.matrices[0].weight.dtype]
    attended = batch.attention_mask.bool()

    # As the engine does: forward from boundary to boundary, then each segment again from the boundary below it. What a
    # block leaves behind, or hands to another segment past the hidden states, shows in the gradient. The second time
    # other tokens are in the place of the padding, which shows what sees them.
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
        watched = [matrix for matrix in gradients if matrix.block in part]
        with Capture(watched, sink) as capture, capture.micro_batch(batch.input_ids.shape):
            leaving = view.run(part.start, part.stop, entering, other_arguments)
            if downstream is None:
                _, downstream = view.losses_and_gradient(leaving, batch, 1.0)
            torch.autograd.backward(leaving, downstream)
        downstream = entering.grad
        # Errors of two segments may cancel in what is below them, and a norm may hide a factor.
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
