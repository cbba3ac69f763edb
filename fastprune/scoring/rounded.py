"""Sums in bfloat16, as the published code keeps them. For comparison only: they are wrong, and this measures how much.

In and out: as :class:`SegmentStatistics`, whose gradients' sums it replaces. Each example's gradient is formed in
float32, rounded to bfloat16, and added to a bfloat16 sum, one example after the other in the order of the
micro-batches; an addend below 2^-9 of the sum is lost. See docs/precision.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastprune import ops
from fastprune.model.matrices import Matrix
from fastprune.scoring.statistics import SegmentStatistics


class RoundedStatistics(SegmentStatistics):
    """Accumulators in bfloat16, float32 at the end; ``act_sq_sum`` is float32 throughout.

    Args:
        matrices: Matrices of the segment.
        statistics: As for :class:`SegmentStatistics`.
        backend: Of the product that forms one example's gradient.
    """

    def __init__(self, matrices: Sequence[Matrix], statistics: tuple[str, ...], backend: str | None) -> None:
        super().__init__(matrices, statistics, torch.bfloat16, backend)
        self.per_example = self.wants_gradients  # the plain sum too: the order of roundings is the point

    @staticmethod
    def _zeros(matrix: Matrix, statistic: str, dtype: torch.dtype) -> torch.Tensor:
        return SegmentStatistics._zeros(matrix, statistic, torch.float32 if statistic == "act_sq_sum" else dtype)

    def _add(
        self, matrix: Matrix, left: torch.Tensor, right: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        exact = torch.empty(left.shape[1], right.shape[1], dtype=torch.float32, device=left.device)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            if length == 0:
                continue
            tokens = slice(start, start + length)
            ops.accumulate_grad_sum(exact.zero_(), left[tokens], right[tokens], backend=self._backend)
            gradient = exact.to(torch.bfloat16)
            for name, accumulator in self.of[matrix.name].items():
                match name:
                    case "grad_sum":
                        accumulator += gradient
                    case "grad_abs_sum":
                        accumulator += gradient.abs()
                    case "grad_sq_sum":
                        accumulator += gradient.square()

    def finish(self, scale: float) -> None:
        """As for the exact sums; then float32, in which scores are formed."""
        super().finish(scale)
        self.of = {name: {key: total.float() for key, total in sums.items()} for name, sums in self.of.items()}


def segment_statistics(
    matrices: Sequence[Matrix], statistics: tuple[str, ...], dtype: torch.dtype, backend: str | None
) -> SegmentStatistics:
    """The sums of one segment in a dtype; arguments as for :class:`SegmentStatistics`, or bfloat16."""
    if dtype == torch.bfloat16:
        return RoundedStatistics(matrices, statistics, backend)
    return SegmentStatistics(matrices, statistics, dtype, backend)
