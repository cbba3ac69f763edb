"""The one pass over the model: blocks outside, examples inside.

In: a view of the model, and the micro-batches of each calibration set with the statistics wanted of it. Out: for every
segment and set, as soon as they are final, a call with the matrices' statistics, which are freed before the next ones
are begun. Hidden states are kept at segment boundaries only, so memory grows with the segment and not with the depth of
the model. The weights of a segment are asked for before it runs, for both sets together: twice in the whole pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from fastprune.calibration import CalibrationLoader, MicroBatch
from fastprune.errors import ScoringError
from fastprune.model.block_view import BlockArguments, BlockView
from fastprune.model.hooks import Capture
from fastprune.model.matrices import Matrix
from fastprune.model.weights import EMBEDDING, Weights
from fastprune.model.whole_view import WholeView
from fastprune.planning.segments import needs
from fastprune.progress import Progress
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.journal import Journal, NullJournal
from fastprune.scoring.overflow import NotFiniteError, overflow
from fastprune.scoring.processes import Processes
from fastprune.scoring.statistics import SegmentStatistics

# The loss of an fp16 model is scaled so that gradients of about 1e-6, common behind a mean over 100 tokens, stay
# clear of fp16's subnormals (below 6e-5); 1024 leaves room up to a gradient of 64 before overflow. Exact, being a
# power of two.
_FP16_LOSS_SCALE = 1024.0


class Sink(Protocol):
    """Takes what a pass finishes."""

    def add(self, role: str, final: Mapping[Matrix, Mapping[str, torch.Tensor]]) -> None:
        """Take the statistics of some matrices; of several processes, on the owner of each matrix."""

    def add_losses(self, role: str, losses: torch.Tensor) -> None:
        """Take the sums ``(2,)`` float64 of this process's weighted losses: of end-of-turn tokens, and of all tokens.

        Called once for each set that has gradients.
        """


class Pass:
    """Drives every set through the model once and hands out the statistics.

    Args:
        view: The model; the caller has put it into :func:`fastprune.model.frozen.frozen_eval`.
        weights: Where its weights come from.
        loaders: Calibration sets by role; each segment's weights serve all of them while they are there.
        statistics: Statistics to form for each role, see :mod:`fastprune.scoring.criteria`.
        parts: Runs of blocks, see :func:`split_blocks`. One keeps everything resident and recomputes nothing.
        dtype: Of the accumulators.
        boundaries: Store of the hidden states at the boundaries of segments.
        gradients: Store of their gradients; on disk if there is a journal.
        processes: The processes that share the examples.
        backend: Backend of the ops.
        progress: Show a bar (never when standard error is not a terminal).
    """

    def __init__(
        self,
        view: BlockView | WholeView,
        weights: Weights,
        loaders: Mapping[str, CalibrationLoader],
        statistics: Mapping[str, tuple[str, ...]],
        parts: Sequence[range],
        *,
        dtype: torch.dtype,
        boundaries: ActivationStore,
        gradients: ActivationStore,
        processes: Processes,
        backend: str | None = None,
        progress: bool = True,
    ) -> None:
        self._view, self._weights, self._parts = view, weights, parts
        self._statistics, self._dtype, self._backend = statistics, dtype, backend
        self._boundaries, self._gradients, self._processes = boundaries, gradients, processes
        self._scale = _FP16_LOSS_SCALE if any(m.weight.dtype == torch.float16 for m in view.matrices) else 1.0
        self._owners = {matrix.name: processes.owner(index) for index, matrix in enumerate(view.matrices)}
        # The micro-batches of this process, by the numbers under which their hidden states are stored.
        numbers = itertools.count()
        self._batches = {
            role: {
                next(numbers): loader.micro_batches[index].to(view.device)
                for index in processes.share(loader.padded_tokens)
            }
            for role, loader in loaders.items()
        }
        self._arguments: dict[int, BlockArguments] = {}
        self._show = progress and processes.rank == 0

    def run(self, sink: Sink, journal: Journal | NullJournal) -> None:
        """Go through the model, from where ``journal`` says.

        Args:
            sink: Given each set's losses and each matrix's statistics as soon as they are final, last segment first.
            journal: Of an earlier run on the same inputs, or a new one; finished segments are not run again.

        Raises:
            ScoringError: A loss or gradient is not finite (names the example and the block), the disk is full, or
                another process failed.
            ModelError: The model does not behave as the view expects.
            ArtifactError: A shard of a streamed model cannot be read.
        """
        # Segments from `end` on are finished; boundaries up to number `ready` are there.
        end = journal.unfinished(len(self._parts))
        ready = journal.ready(self._boundaries, end)
        total = sum(map(len, self._batches.values())) * (max(0, end - 1 - ready) + end)
        with Progress(total, "scoring", "step", self._show) as bar:
            if end:
                self._prologue(ready, end)
            for number in range(ready, end - 1):
                self._forward(number, end, bar)
                journal.add_boundary(self._boundaries, f"boundary-{number + 1}")
            for number in reversed(range(end)):
                bar.note(f"blocks {self._parts[number].start}-{self._parts[number].stop - 1}")
                self._backward(number, sink, bar)
                journal.add_segment(number, self._gradients, f"gradient-{number}" if number else None)
                self._boundaries.drop(f"boundary-{number}")
                self._gradients.drop(f"gradient-{number + 1}")

    def _every_batch(self) -> Iterator[tuple[int, MicroBatch]]:
        return itertools.chain.from_iterable(batches.items() for batches in self._batches.values())

    @torch.no_grad()
    def _prologue(self, ready: int, end: int) -> None:
        following = needs(self._parts, ready if ready < end - 1 else end - 1, backward=ready >= end - 1)
        with self._weights.held((EMBEDDING,), then=following):
            for item, batch in self._every_batch():
                hidden, self._arguments[item] = self._view.prologue(batch)
                self._boundaries.put("boundary-0", item, hidden)
        self._processes.barrier()

    @torch.no_grad()
    def _forward(self, number: int, end: int, bar: Progress) -> None:
        """Bring every micro-batch to the upper boundary of a segment; the last one runs in :meth:`_backward` only."""
        part = self._parts[number]
        following = needs(self._parts, number + 1, backward=number + 2 == end)
        with self._weights.held(needs(self._parts, number, backward=False), then=following):
            for item, _ in self._every_batch():
                hidden = self._boundaries.get(f"boundary-{number}", item)
                leaving = self._view.run(part.start, part.stop, hidden, self._arguments[item])
                self._boundaries.put(f"boundary-{number + 1}", item, leaving)
                bar.advance()
        self._processes.barrier()

    def _backward(self, number: int, sink: Sink, bar: Progress) -> None:
        """Form the statistics of a segment, one set after the other, and hand them out."""
        matrices = self._view.matrices_of(self._parts[number])
        following = needs(self._parts, number - 1, backward=True)
        with self._weights.held(needs(self._parts, number, backward=True), then=following):
            for role, batches in self._batches.items():
                statistics = SegmentStatistics(matrices, self._statistics[role], self._dtype, self._backend)
                losses = torch.zeros(2, dtype=torch.float64, device=self._view.device)
                with Capture(matrices, statistics) as capture:
                    for item, batch in batches.items():
                        statistics.begin(batch, [f"{role} {name}" for name in batch.names])
                        try:
                            self._one_micro_batch(number, item, batch, capture, statistics, losses)
                        except NotFiniteError as error:
                            raise self._explained(error, batch) from None
                        bar.advance()
                    statistics.finish(self._scale)
                if statistics.wants_gradients and number == len(self._parts) - 1:
                    sink.add_losses(role, losses.cpu())
                sink.add(role, self._reduced(matrices, statistics))
                statistics.of.clear()  # before the next set's are made: they are as large as the segment in float32

    def _reduced(
        self, matrices: Sequence[Matrix], statistics: SegmentStatistics
    ) -> dict[Matrix, dict[str, torch.Tensor]]:
        """The sums over all processes of the matrices that this one owns."""
        self._processes.barrier()  # a sum would wait for a process that failed
        for matrix in matrices:
            for tensor in statistics.of[matrix.name].values():
                self._processes.reduce(self._owners[matrix.name], tensor)
        mine = [matrix for matrix in matrices if self._owners[matrix.name] == self._processes.rank]
        return {matrix: statistics.of[matrix.name] for matrix in mine}

    def _one_micro_batch(
        self,
        number: int,
        item: int,
        batch: MicroBatch,
        capture: Capture,
        statistics: SegmentStatistics,
        losses: torch.Tensor,
    ) -> None:
        """Recompute one segment from its lower boundary and, where gradients are wanted, go back through it.

        The last segment adds to ``losses`` ``(2,)``: those of end-of-turn tokens, and of all.
        """
        part, with_gradient = self._parts[number], statistics.wants_gradients
        entering = self._boundaries.take(f"boundary-{number}", item).detach().requires_grad_(with_gradient)
        rows, tokens = batch.input_ids.shape
        with capture.micro_batch((rows, tokens)):
            with torch.set_grad_enabled(with_gradient):
                leaving = self._view.run(part.start, part.stop, entering, self._arguments[item])
            if not self._view.leaves_logits:  # those are what the loss is of, which is checked itself
                statistics.outputs(part.stop - 1, leaving)
            if not with_gradient:
                statistics.end(None)
                return
            if number == len(self._parts) - 1:
                of_tokens, gradient = self._view.losses_and_gradient(leaving, batch, self._scale)
                of_examples = of_tokens.new_zeros(rows).index_add_(0, batch.rows_of_scored, of_tokens)
                statistics.losses(of_examples)
                losses += torch.stack([_of_ends_of_turn(of_tokens, batch), of_examples.sum()]).double()
            else:
                gradient = self._gradients.take(f"gradient-{number + 1}", item)
            # Of a model on several devices, host memory and disk give everything back on the first of them.
            torch.autograd.backward(leaving, gradient.to(leaving.device))
            statistics.end(entering.grad)
            if number and entering.grad is not None:  # without one the capture refuses a matrix by name
                self._gradients.put(f"gradient-{number}", item, entering.grad)

    def _explained(self, error: NotFiniteError, batch: MicroBatch) -> ScoringError:
        """The error as a caller gets it, which says so if it was an overflow of a float16 model."""
        if self._scale == 1.0:
            return ScoringError(str(error))
        # The hidden states that it began from may be gone: the prologue gives them once more.
        with self._weights.held((EMBEDDING,)), torch.no_grad():
            entering, arguments = self._view.prologue(batch)
        return overflow(error, self._view, self._weights, self._parts, entering, arguments, batch)


def _of_ends_of_turn(losses: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Sum of the losses ``(n_scored,)`` of the last scored token of each row that ends its turn."""
    rows = batch.rows_of_scored
    last = torch.searchsorted(rows, torch.arange(len(batch.names), device=rows.device), right=True) - 1
    return (losses[last] * batch.ends_turn).sum()
