"""The running statistics of one calibration set over the matrices of one segment.

In: inputs and output gradients of each matrix, micro-batch by micro-batch, from :class:`Capture`. Out: one tensor for
each matrix and statistic. Gradients are already weighted, each example by 1 / its scored tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastprune import ops
from fastprune.calibration import MicroBatch
from fastprune.model.experts import ExpertTokens
from fastprune.model.matrices import Matrix
from fastprune.ops.criteria import GRADIENT_SUMS
from fastprune.scoring.overflow import NotFiniteError


class _Padding(NamedTuple):
    mask: torch.Tensor  # bool (rows * tokens,), True at padding
    attended: torch.Tensor  # int64, flat positions of all other tokens


class SegmentStatistics:
    """Accumulators, in ``dtype``, for the matrices of one segment.

    Args:
        matrices: Matrices of the segment.
        statistics: Some of :data:`fastprune.ops.criteria.STATISTICS`.
        dtype: ``torch.float32`` or ``torch.float64``.
        backend: Backend of the ops, ``None`` for the best available.
    """

    def __init__(
        self, matrices: Sequence[Matrix], statistics: tuple[str, ...], dtype: torch.dtype, backend: str | None
    ) -> None:
        self._statistics = statistics
        self._backend = backend
        self.wants_inputs = "act_sq_sum" in statistics
        self.wants_gradients = not set(GRADIENT_SUMS).isdisjoint(statistics)
        self.per_example = bool({"grad_abs_sum", "grad_sq_sum"}.intersection(statistics))
        self.of: dict[str, dict[str, torch.Tensor]] = {
            matrix.name: {name: self._zeros(matrix, name, dtype) for name in statistics} for matrix in matrices
        }

    @staticmethod
    def _zeros(matrix: Matrix, statistic: str, dtype: torch.dtype) -> torch.Tensor:
        weight = matrix.weight
        shape = weight.shape
        if statistic == "act_sq_sum":
            shape = shape[:1] if matrix.input_major else shape[1:]
        return torch.zeros(shape, dtype=dtype, device=weight.device)

    def begin(self, batch: MicroBatch, example_names: Sequence[str]) -> None:
        """Start a micro-batch; ``example_names`` are used in error messages, one a row."""
        rows, tokens = batch.attention_mask.shape
        self._names = example_names
        # Kept on the CPU: the ops read them for every matrix, and reading from a device synchronizes.
        self._lengths = batch.lengths
        self._starts = torch.arange(rows) * tokens
        # Right padding receives exactly zero gradient (no token attends to it and it is never scored), so it may stay
        # in a sum of gradients; its inputs are meaningless and must stay out of a sum of inputs.
        padded = int(self._lengths.sum()) < rows * tokens
        self._padding: _Padding | None = None
        if padded and self.wants_inputs:
            mask = batch.attention_mask.flatten() == 0
            self._padding = _Padding(mask, (~mask).nonzero()[:, 0])
        self._checks: dict[int, tuple[str, torch.Tensor]] = {}
        self._losses: torch.Tensor | None = None
        self._outputs: tuple[int, torch.Tensor] | None = None

    def inputs(self, matrix: Matrix, x: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """Add the squares of one matrix's inputs, ``(n_tokens, in_features)``."""
        if self._padding is None:
            real = x
        elif tokens is None:
            real = x.index_select(0, self._padding.attended.to(x.device))
        else:  # zeros add nothing; selecting rows would synchronize once per expert
            real = x.masked_fill(self._padding.mask.to(x.device)[tokens.indices].unsqueeze(1), 0.0)
        ops.accumulate_act_sq_sum(self.of[matrix.name]["act_sq_sum"], real, backend=self._backend)

    def gradients(self, matrix: Matrix, x: torch.Tensor, dy: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """Add one matrix's gradients, formed from ``x`` ``(n_tokens, in)`` and ``dy`` ``(n_tokens, out)``."""
        # A value that is not finite inside a block reaches the gradient that leaves it downwards, so one matrix a block
        # is checked: the first of the backward pass that sees every token.
        if tokens is None and matrix.block not in self._checks:
            self._checks[matrix.block] = f"block {matrix.block} ({matrix.name})", self._sums(dy)
        starts, lengths = (self._starts, self._lengths) if tokens is None else (tokens.starts, tokens.lengths)
        # dW is dy^T x in the usual layout and x^T dy where the weight is stored input-major.
        left, right = (x, dy) if matrix.input_major else (dy, x)
        self._add(matrix, left, right, starts, lengths)

    def _add(
        self, matrix: Matrix, left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        """Add ``left^T right`` of each example, whose tokens ``starts`` and ``lengths`` give."""
        sums = {name: total for name, total in self.of[matrix.name].items() if name in GRADIENT_SUMS}
        ops.accumulate_gradients(sums, left, right, starts, lengths, backend=self._backend)

    def _sums(self, gradient: torch.Tensor) -> torch.Tensor:
        """One number an example, finite only if every element is; enough to name the example later."""
        return gradient.reshape(len(self._names), -1).sum(1, dtype=torch.float32)

    def losses(self, losses: torch.Tensor) -> None:
        """Have the losses ``(rows,)`` of the micro-batch checked at its end, before its gradients."""
        self._losses = losses

    def outputs(self, block: int, leaving: torch.Tensor) -> None:
        """Have the hidden states that leave a block, ``(rows, tokens, hidden)``, checked where inputs are summed.

        An infinite input has an infinite sum of squares, and no loss shows it behind the last scored token.
        """
        if self.wants_inputs:
            text = torch.arange(leaving.shape[1]) < self._lengths.unsqueeze(1)
            masked = leaving.detach().masked_fill(~text.to(leaving.device).unsqueeze(-1), 0.0)
            self._outputs = block, self._sums(masked)

    def end(self, leaving: torch.Tensor | None) -> None:
        """Check the finished micro-batch, all at once, since every read synchronizes.

        Args:
            leaving: ``(rows, tokens, hidden)``, the gradient at the segment's lower boundary; ``None`` without
                gradients.

        Raises:
            NotFiniteError: A loss, a gradient or what leaves the segment was not finite; names the example and the
                block.
        """
        if self.wants_gradients and not self._checks:
            return  # no matrix was used; the capture raises an error that names it
        checks: list[tuple[str, str, torch.Tensor]] = []  # kind, where, one number an example
        if self._losses is not None:
            checks.append(("loss", "", self._losses))
        if self._outputs is not None:
            block, sums = self._outputs
            checks.append(("outputs", f"block {block}", sums))
        if leaving is not None:  # in the order of the backward pass: the first is where it began
            checks += [("gradient", where, sums) for where, sums in self._checks.values()]
            checks.append(("gradient", f"the input of block {min(self._checks)}", self._sums(leaving)))
        if not checks:
            return
        device = checks[-1][2].device
        bad = ~torch.stack([sums.to(device, torch.float32) for _, _, sums in checks]).isfinite().cpu()
        if not bool(bad.any()):
            return
        place, row = bad.nonzero()[0].tolist()
        kind, where, sums = checks[place]
        raise _not_finite(kind, where, sums[row].item(), self._names[row], row)

    def finish(self, scale: float) -> None:
        """Make the sums final: take a loss scale out again (a factor in gradients, its square in squares)."""
        if scale == 1.0:
            return
        for accumulators in self.of.values():
            for name, accumulator in accumulators.items():
                if name in GRADIENT_SUMS:
                    accumulator.mul_(1.0 / scale**2 if name == "grad_sq_sum" else 1.0 / scale)


def _not_finite(kind: str, where: str, value: float, name: str, row: int) -> NotFiniteError:
    """The error for the example of that name: its loss, what leaves a block, or a gradient at ``where``."""
    match kind:
        case "loss":
            message = (
                f"{name}: its loss is {value}; the model gives its response no finite probability (look at the weights "
                "for NaN, and at the example's text)"
            )
        case "outputs":
            message = (
                f"{name}: what leaves {where} is not finite (look at the weights for NaN, and at the example's text)"
            )
        case _:
            message = (
                f"{name}: the gradient that reached {where} is not finite; look at this example's text, or load the "
                "model in float32 or bfloat16"
            )
            return NotFiniteError(message, name, row, gradient_at=where)
    return NotFiniteError(message, name, row)
