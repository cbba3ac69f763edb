"""The one pass over the model: blocks outside, examples inside.

In: a view of the model and the calibration sets with the statistics wanted of each. Out: for every matrix, as soon as
it is final, a call with its statistics; a segment's accumulators are freed before the next segment begins. Hidden
states are kept at segment boundaries only, so memory grows with the segment and not with the depth of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from fastprune.calibration import CalibrationSet, micro_batches
from fastprune.errors import ScoringError
from fastprune.model.capture import Capture
from fastprune.model.eligible import Matrix
from fastprune.model.view import Batch, BlockArguments, BlockView, WholeView
from fastprune.scoring.rounded import segment_statistics
from fastprune.scoring.statistics import SegmentStatistics

View = BlockView | WholeView
OnFinal = Callable[[str, Matrix, dict[str, torch.Tensor]], None]

# The loss of an fp16 model is scaled so that gradients of about 1e-6, common behind a mean over 100 tokens, stay
# clear of fp16's subnormals (below 6e-5); 1024 leaves room up to a gradient of 64 before overflow. Exact, being a
# power of two.
_FP16_LOSS_SCALE = 1024.0


@dataclass
class _Work:
    """One micro-batch on its way through the model."""

    batch: Batch
    names: list[str]
    arguments: BlockArguments | Batch | None = None
    boundaries: list[torch.Tensor] = field(default_factory=list)
    gradient: torch.Tensor | None = None


@dataclass
class ScoringSet:
    """A calibration set in the pass.

    Attributes:
        role: ``"harm"`` or ``"benign"``.
        examples: The tokenised examples.
        batch_tokens: Budget of a micro-batch in padded tokens.
        statistics: Statistics to form, see :mod:`fastprune.scoring.criteria`.
    """

    role: str
    examples: CalibrationSet
    batch_tokens: int
    statistics: tuple[str, ...]

    def start(self, device: torch.device) -> list[_Work]:
        """Cut into micro-batches on ``device``."""
        batches = micro_batches(self.examples.examples, self.batch_tokens)
        return [
            _Work(Batch.from_micro_batch(batch, device), [self._name(index) for index in batch.example_indices])
            for batch in batches
        ]

    def _name(self, index: int) -> str:
        identity = self.examples.examples[index].id
        return f"{self.role} example {index}" + (f" (id {identity})" if identity is not None else "")


def split_blocks(n_blocks: int, segments: int) -> list[range]:
    """Cut ``n_blocks`` into ``segments`` runs whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(n_blocks, segments)
    starts = [index * size + min(index, longer) for index in range(segments + 1)]
    return [range(first, last) for first, last in itertools.pairwise(starts)]


def run_pass(
    view: View,
    sets: Sequence[ScoringSet],
    *,
    segments: int,
    dtype: torch.dtype,
    on_final: OnFinal,
    backend: str | None = None,
    progress: bool = True,
) -> None:
    """Drive every set through the model once and hand out the statistics.

    Args:
        view: The model; its state is the caller's business (see :func:`fastprune.model.state.quiet`).
        sets: Calibration sets; each segment's weights serve all of them while they are there.
        segments: Number of runs of blocks, 1 … ``view.n_blocks``. One keeps everything resident and recomputes nothing.
        dtype: Of the accumulators; bfloat16 for comparison only, see :mod:`fastprune.scoring.rounded`.
        on_final: Called as ``on_final(role, matrix, statistics)`` for each set and matrix, last segment first.
        backend: Backend of the ops.
        progress: Show a bar (never when standard error is not a terminal).

    Raises:
        ScoringError: A loss or gradient is not finite; names the example and the block.
        ModelError: The model does not behave as the view expects.
    """
    parts = split_blocks(view.n_blocks, segments)
    work = {group.role: group.start(view.device) for group in sets}
    scale = _FP16_LOSS_SCALE if any(matrix.weight.dtype == torch.float16 for matrix in view.matrices) else 1.0
    total = sum(len(items) for items in work.values()) * (2 * segments - 1)
    with tqdm(total=total, desc="scoring", unit="step", disable=None if progress else True, leave=False) as bar:
        for number, part in enumerate(parts):
            for item in (item for items in work.values() for item in items):
                _forward(view, item, part, keep_going=number < segments - 1)
                if number < segments - 1:
                    bar.update()
        for part in reversed(parts):
            bar.set_postfix_str(f"blocks {part.start}-{part.stop - 1}")
            matrices = [matrix for matrix in view.matrices if matrix.block in part or isinstance(view, WholeView)]
            for group in sets:
                statistics = segment_statistics(matrices, group.statistics, dtype, backend)
                with Capture(matrices, statistics) as capture:
                    for item in work[group.role]:
                        _backward(view, item, part, capture, statistics, scale)
                        bar.update()
                statistics.finish(scale)
                for matrix in matrices:
                    on_final(group.role, matrix, statistics.of.pop(matrix.name))


@torch.no_grad()
def _forward(view: View, item: _Work, part: range, keep_going: bool) -> None:
    """Bring one micro-batch to the upper boundary of a segment; the last segment runs in :func:`_backward` only."""
    if part.start == 0:
        hidden, item.arguments = view.prologue(item.batch)
        item.boundaries.append(hidden)
    if keep_going:
        item.boundaries.append(view.run(part.start, part.stop, item.boundaries[-1], item.arguments))


def _backward(
    view: View, item: _Work, part: range, capture: Capture, statistics: SegmentStatistics, scale: float
) -> None:
    """Recompute one segment from its lower boundary and, where gradients are wanted, go back through it."""
    with_gradient = statistics.wants_gradients
    entering = item.boundaries.pop().detach().requires_grad_(with_gradient)
    statistics.begin(item.batch, item.names)
    with capture.micro_batch(item.batch.input_ids.numel()):
        with torch.set_grad_enabled(with_gradient):
            leaving = view.run(part.start, part.stop, entering, item.arguments)
        if with_gradient:
            if part.stop == view.n_blocks:
                losses, item.gradient = view.losses_and_gradient(leaving, item.batch, scale)
                _check_losses(losses, item.names)
            torch.autograd.backward(leaving, item.gradient)
            item.gradient = entering.grad
            statistics.end(item.gradient)


def _check_losses(losses: torch.Tensor, names: Sequence[str]) -> None:
    bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ScoringError(
            f"{names[bad[0]]}: its loss is {losses[bad[0]].item()}; the model gives its response no finite "
            "probability (look at the weights for NaN, and at the example's text)"
        )
