"""The one pass over the model: blocks outside, examples inside.

In: a view of the model and the calibration sets with the statistics wanted of each. Out: for every segment and set, as
soon as they are final, a call with the matrices' statistics, which are freed before the next ones are begun. Hidden
states are kept at segment offload only, so memory grows with the segment and not with the depth of the model. A
segment's weights are asked for before it runs, for both sets together: twice in the whole pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from fastprune.calibration import CalibrationSet, MicroBatch, micro_batches
from fastprune.errors import ScoringError
from fastprune.model.block_view import Batch, BlockArguments, BlockView
from fastprune.model.hooks import Capture
from fastprune.model.matrices import Matrix
from fastprune.model.weights import EMBEDDING, Weights
from fastprune.model.whole_view import WholeView
from fastprune.planning.segments import needs
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.journal import Journal
from fastprune.scoring.overflow import NotFiniteError, overflow
from fastprune.scoring.processes import Processes
from fastprune.scoring.statistics import SegmentStatistics

View = BlockView | WholeView
OnFinal = Callable[[str, Mapping[Matrix, dict[str, torch.Tensor]]], None]
OnLosses = Callable[[str, torch.Tensor], None]

# The loss of an fp16 model is scaled so that gradients of about 1e-6, common behind a mean over 100 tokens, stay
# clear of fp16's subnormals (below 6e-5); 1024 leaves room up to a gradient of 64 before overflow. Exact, being a
# power of two.
_FP16_LOSS_SCALE = 1024.0


@dataclass
class _Work:
    """One micro-batch on its way through the model."""

    number: int
    batch: Batch
    names: list[str]
    ends_turn: torch.Tensor  # bool (rows,), whether a row's last scored token is its end of turn
    arguments: BlockArguments | Batch | None = None


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

    def start(self, device: torch.device, ranks: Processes, number: Iterator[int]) -> list[_Work]:
        """The micro-batches of this process, on ``device``."""
        mine = ranks.share(self.padded_tokens())
        return [
            _Work(
                next(number),
                Batch.from_micro_batch(self._batches[index], device),
                [self._name(example) for example in self._batches[index].example_indices],
                torch.tensor(
                    [self.examples.examples[example].ends_turn for example in self._batches[index].example_indices],
                    device=device,
                ),
            )
            for index in mine
        ]

    def largest(self) -> tuple[int, int, int]:
        """Rows, tokens of each and scored tokens of the largest micro-batch."""
        batch = max(self._batches, key=lambda batch: batch.input_ids.numel())
        return (*batch.input_ids.shape, int((batch.labels != -100).sum()))

    def padded_tokens(self) -> list[int]:
        """Tokens of each micro-batch."""
        return [batch.input_ids.numel() for batch in self._batches]

    @functools.cached_property
    def _batches(self) -> list[MicroBatch]:
        return micro_batches(self.examples.examples, self.batch_tokens)

    def _name(self, index: int) -> str:
        identity = self.examples.examples[index].id
        return f"{self.role} example {index}" + (f" (id {identity})" if identity is not None else "")


class Pass:
    """Drives every set through the model once and hands out the statistics.

    Args:
        view: The model; its state is the caller's business (see :func:`fastprune.model.frozen.frozen_eval`).
        weights: Where its weights come from.
        sets: Calibration sets; each segment's weights serve all of them while they are there.
        parts: Runs of blocks, see :func:`split_blocks`. One keeps everything resident and recomputes nothing.
        dtype: Of the accumulators.
        offload: Store of the hidden states.
        gradients: Store of their gradients; on disk if there is a journal.
        ranks: The processes that share the examples.
        backend: Backend of the ops.
        progress: Show a bar (never when standard error is not a terminal).
    """

    def __init__(
        self,
        view: View,
        weights: Weights,
        sets: Sequence[ScoringSet],
        parts: Sequence[range],
        *,
        dtype: torch.dtype,
        offload: ActivationStore,
        gradients: ActivationStore,
        ranks: Processes,
        backend: str | None = None,
        progress: bool = True,
    ) -> None:
        self._view, self._weights, self._sets, self._parts = view, weights, sets, parts
        self._dtype, self._backend, self._ranks = dtype, backend, ranks
        self._boundaries, self._gradients = offload, gradients
        self._scale = _FP16_LOSS_SCALE if any(m.weight.dtype == torch.float16 for m in view.matrices) else 1.0
        numbers = itertools.count()
        self._work = {group.role: group.start(view.device, ranks, numbers) for group in sets}
        self._show = progress and ranks.rank == 0

    def run(self, on_final: OnFinal, journal: Journal | None = None, on_losses: OnLosses | None = None) -> None:
        """Go through the model, from where ``journal`` says.

        Args:
            on_final: Called for each set with its role and each matrix's statistics, last segment first; of several
                processes, on the matrix's owner.
            journal: Of an earlier run on the same inputs, or a new one; finished segments are not run again.
            on_losses: Called for each set that has gradients with its role and ``(2,)`` float64: this process's sums of
                the weighted losses of end-of-turn tokens, and of all tokens.

        Raises:
            ScoringError: A loss or gradient is not finite (names the example and the block), the disk is full, or
                another process failed.
            ModelError: The model does not behave as the view expects.
            ArtifactError: A shard of a streamed model cannot be read.
        """
        # Segments from `end` on are finished; offload up to number `ready` are there.
        end = len(self._parts) if journal is None else journal.unfinished(len(self._parts))
        ready = 0 if journal is None else journal.ready(self._boundaries, end)
        n_items = sum(len(items) for items in self._work.values())
        total = n_items * (max(0, end - 1 - ready) + end)
        with tqdm(total=total, desc="scoring", unit="step", disable=None if self._show else True, leave=False) as bar:
            if end:
                self._prologue(ready, end)
            for number in range(ready, end - 1):
                self._forward(number, end, bar)
                if journal is not None:
                    journal.add_boundary(self._boundaries, f"boundary-{number + 1}")
            for number in reversed(range(end)):
                bar.set_postfix_str(f"blocks {self._parts[number].start}-{self._parts[number].stop - 1}")
                self._backward(number, on_final, on_losses, bar)
                if journal is not None:
                    journal.add_segment(number, self._gradients, f"gradient-{number}" if number else None)
                    self._ranks.barrier()  # nobody frees what another one's unfinished segment would need again
                self._boundaries.drop(f"boundary-{number}")
                self._gradients.drop(f"gradient-{number + 1}")

    def _items(self) -> Iterator[_Work]:
        return itertools.chain.from_iterable(self._work.values())

    @torch.no_grad()
    def _prologue(self, ready: int, end: int) -> None:
        following = needs(self._parts, ready if ready < end - 1 else end - 1, backward=ready >= end - 1)
        with self._weights.held((EMBEDDING,), then=following):
            for item in self._items():
                hidden, item.arguments = self._view.prologue(item.batch)
                self._boundaries.put("boundary-0", item.number, hidden)
        self._ranks.barrier()

    @torch.no_grad()
    def _forward(self, number: int, end: int, bar: tqdm) -> None:
        """Bring every micro-batch to the upper boundary of a segment; the last one runs in :meth:`_backward` only."""
        part = self._parts[number]
        following = needs(self._parts, number + 1, backward=number + 2 == end)
        with self._weights.held(needs(self._parts, number, backward=False), then=following):
            for item in self._items():
                hidden = self._boundaries.get(f"boundary-{number}", item.number)
                leaving = self._view.run(part.start, part.stop, hidden, item.arguments)
                self._boundaries.put(f"boundary-{number + 1}", item.number, leaving)
                bar.update()
        self._ranks.barrier()

    def _backward(self, number: int, on_final: OnFinal, on_losses: OnLosses | None, bar: tqdm) -> None:
        part = self._parts[number]
        of_part = [
            (index, matrix)
            for index, matrix in enumerate(self._view.matrices)
            if matrix.block in part or isinstance(self._view, WholeView)
        ]
        matrices = [matrix for _, matrix in of_part]
        following = needs(self._parts, number - 1, backward=True)
        with self._weights.held(needs(self._parts, number, backward=True), then=following):
            for group in self._sets:
                statistics = SegmentStatistics(matrices, group.statistics, self._dtype, self._backend)
                losses = torch.zeros(2, dtype=torch.float64, device=self._view.device)
                with Capture(matrices, statistics) as capture:
                    for item in self._work[group.role]:
                        try:
                            self._one_micro_batch(number, item, capture, statistics, losses)
                        except NotFiniteError as error:
                            raise self._in_words(error, item) from None
                        bar.update()
                    statistics.finish(self._scale)
                if on_losses is not None and statistics.wants_gradients and number == len(self._parts) - 1:
                    on_losses(group.role, losses.cpu())
                self._ranks.barrier()  # a sum would wait for a process that failed
                for index, matrix in of_part:
                    for tensor in statistics.of[matrix.name].values():
                        self._ranks.reduce(self._ranks.owner(index), tensor)
                mine = [matrix for index, matrix in of_part if self._ranks.owner(index) == self._ranks.rank]
                on_final(group.role, {matrix: statistics.of[matrix.name] for matrix in mine})
                statistics.of.clear()  # before the next set's are made: they are as large as the segment in float32

    def _one_micro_batch(
        self, number: int, item: _Work, capture: Capture, statistics: SegmentStatistics, losses: torch.Tensor
    ) -> None:
        """Recompute one segment from its lower boundary and, where gradients are wanted, go back through it.

        The last segment adds to ``losses`` ``(2,)``: those of end-of-turn tokens, and of all.
        """
        part, with_gradient = self._parts[number], statistics.wants_gradients
        entering = self._boundaries.take(f"boundary-{number}", item.number).detach().requires_grad_(with_gradient)
        statistics.begin(item.batch, item.names)
        with capture.micro_batch(item.batch.input_ids.shape):
            with torch.set_grad_enabled(with_gradient):
                leaving = self._view.run(part.start, part.stop, entering, item.arguments)
            if isinstance(self._view, BlockView):  # of a whole model they are the logits, which the loss is of
                statistics.outputs(part.stop - 1, leaving)
            if not with_gradient:
                statistics.end(None)
                return
            if number == len(self._parts) - 1:
                of_tokens, gradient = self._view.losses_and_gradient(leaving, item.batch, self._scale)
                rows = item.batch.rows_of_scored
                of_examples = of_tokens.new_zeros(len(item.names)).index_add_(0, rows, of_tokens)
                statistics.losses(of_examples)
                last = torch.searchsorted(rows, torch.arange(len(item.names), device=rows.device), right=True) - 1
                losses += torch.stack([(of_tokens[last] * item.ends_turn).sum(), of_examples.sum()]).double()
            else:
                gradient = self._gradients.take(f"gradient-{number + 1}", item.number)
            # Of a model on several devices, host memory and disk give everything back on the first of them.
            torch.autograd.backward(leaving, gradient.to(leaving.device))
            statistics.end(entering.grad)
            if number:
                self._gradients.put(f"gradient-{number}", item.number, entering.grad)

    def _in_words(self, error: NotFiniteError, item: _Work) -> ScoringError:
        """The error as a caller gets it, which says so if it was an overflow of a float16 model."""
        if self._scale == 1.0:
            return ScoringError(str(error))
        # The hidden states that it began from may be gone: the prologue gives them once more.
        with self._weights.held((EMBEDDING,)), torch.no_grad():
            entering, arguments = self._view.prologue(item.batch)
        return overflow(error, self._view, self._weights, self._parts, entering, arguments, item.batch)
