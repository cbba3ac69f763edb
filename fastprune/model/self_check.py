"""Before a long pass: does this model, taken apart, compute what it computes as a whole?

In: a model's weights, and the examples of the pass. Out: its view, or the whole-model view with a warning, or an error.
Two short rows are driven both ways, through the blocks and through the untouched model
(:mod:`fastprune.model.parts_check`); logits and the gradients of one weight, and of one expert where there are any, are
compared, and each segment's output when it runs for the second time, with other tokens in the place of the padding.
This catches what reading code cannot: blocks that share state, padding that leaks, tokens that see later ones
(:mod:`fastprune.model.causality`), experts that are run another way, rows that see each other and Linears that do more
than multiply (:mod:`fastprune.model.module_check`). The model itself is used, which costs a few passes over about ten
tokens; of a streamed model only the blocks of the first segment, which are in memory then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fastprune.calibration import Example, MicroBatch
from fastprune.errors import FastpruneError, ModelError, setting, warn
from fastprune.model.block_view import BlockView
from fastprune.model.causality import (
    NotScorableError,
    exceeded_window,
    long_row,
    refuse_later_tokens_of_long_rows,
    refuse_later_tokens_without_mask,
)
from fastprune.model.module_check import TOLERANCE, ModuleCheck, relative_error
from fastprune.model.parts_check import ANY_ERROR, disagreement, itself_fails, reference
from fastprune.model.positions import other_positions
from fastprune.model.probe import EARLY, LOUD, batch_of, draw, padded_otherwise, probe, tokens_of
from fastprune.model.weights import Weights
from fastprune.model.whole_view import WholeView


def checked_view(
    weights: Weights, parts: Sequence[range], segments: int | None, examples: Sequence[Example] = ()
) -> BlockView | WholeView:
    """Build the view of a model and check it.

    Args:
        weights: Of a causal LM inside :func:`fastprune.model.frozen.frozen_eval`. Of a streamed one, embedding,
            head and the blocks of ``parts`` have to be held.
        parts: Runs of blocks, from the first one on, as the pass will go through them; the check covers these.
        segments: The number that the caller asked for; more than one rules the whole-model view out.
        examples: All examples of the pass. The check draws its tokens from them, as the embeddings of others do not
            matter; the longest of them decides which windows of attention are exceeded.

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
            expected = reference(view, batch, parts[-1].stop)
            refuse_later_tokens_without_mask(view, alone, EARLY)
            counted_otherwise = _counts_otherwise(view, batch)
            reason = disagreement(view, batch, *expected, parts)
        if window is not None and reason is None:
            row = batch_of(view, [draw(tokens, long_row(window, longest))])
            refuse_later_tokens_of_long_rows(view, row, window, parts[-1].stop)
    except NotScorableError:
        raise
    except FastpruneError as error:
        reason = str(error)
    except ANY_ERROR as error:
        reason = f"{type(error).__name__}: {error}"
    modules.refuse()
    if counted_otherwise:
        raise other_positions(view.model, "scored")
    if reason is None:
        return view
    if weights.streamed:
        raise ModelError(
            f"{type(view.model).__name__} cannot be run block by block ({reason}), so it cannot be streamed; "
            "load it and pass the model",
            argument="model",
        )
    if segments is not None and segments > 1:
        raise ModelError(
            f"{type(view.model).__name__} cannot be run block by block ({reason}); use {setting('segments', 1)}, "
            "which runs it whole",
            argument="model",
        )
    whole = WholeView(weights.anatomy, weights.device)
    _refuse_use_of_padding(whole, batch)
    refuse_later_tokens_without_mask(whole, alone, EARLY)
    if window is not None:
        row = batch_of(view, [draw(tokens, long_row(window, longest))])
        refuse_later_tokens_without_mask(whole, row, window + 1)
    warn(
        f"{type(view.model).__name__} cannot be run block by block ({reason}); it is scored whole, with "
        f"{setting('segments', 1)}"
    )
    return whole


def _counts_otherwise(view: BlockView, batch: MicroBatch) -> bool:
    """Whether the model's own positions differ from those that the pass gives, as its embeddings show.

    Where positions act inside the blocks, as rotary ones do, only their differences matter.
    """
    if "position_ids" not in view.accepted:
        return False
    with torch.no_grad():
        given = view.entering(batch)
        own = view.entering(dataclasses.replace(batch, position_ids=None))
    attended = batch.attention_mask.bool().to(own.device)
    # Sums of the same rows of tables if positions are equal, hence bit-identical.
    return relative_error(given[attended], own[attended]) > 1e-6


@torch.no_grad()
def _refuse_use_of_padding(whole: WholeView, batch: MicroBatch) -> None:
    """Raise if logits of the text depend on the padding behind it, or on its mask, which the pass does not give.

    For the whole-model view; of the block view, the comparison of the parts with the whole shows it.
    """
    attended = batch.attention_mask.bool()
    try:
        found = whole.causal_forward(batch)[attended]
        masked = whole.forward(batch.input_ids, batch.attention_mask, batch.position_ids)[attended]
        otherwise = whole.causal_forward(padded_otherwise(batch))[attended]
    except ANY_ERROR as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise itself_fails(whole.model, error) from error
    for what, other in (("the mask of the padding behind a text", masked), ("the padding itself", otherwise)):
        difference = relative_error(found, other)
        if difference > TOLERANCE[whole.matrices[0].weight.dtype]:
            raise NotScorableError(
                f"{what} changes the logits of the text by {difference:.1e} (relative) in "
                f"{type(whole.model).__name__}, so it cannot be scored",
                argument="model",
            )
