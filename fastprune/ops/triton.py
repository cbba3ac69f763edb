"""The ``triton`` backend: passes validated tensors to the launchers of ``fastprune_kernels``.

:mod:`fastprune.ops` and :mod:`fastprune.ops.dispatch` are the only callers, and import this module when they need it:
it imports triton. Work is queued on the current stream of the tensors' device. Where ``TRITON_INTERPRET=1`` was set
before the first import of triton, the same kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from fastprune_kernels import act_sq_sum, grad_abs_sum, grad_sum, launching
from torch import Tensor

INTERPRETED = launching.INTERPRETED

_TILE = 256  # no kernel has a tile with a longer side


def refusal(operation: str, acc: Tensor, *inputs: Tensor) -> str | None:
    """Why the kernels cannot take these tensors; ``None`` if they can."""
    accumulators = (torch.float32, torch.float64) if operation == "accumulate_act_sq_sum" else (torch.float32,)
    if acc.dtype not in accumulators:
        return f"takes {_names(accumulators)} accumulators for {operation}, got {_names([acc.dtype])}"
    if inputs and inputs[0].dtype not in launching.INPUT_DTYPES:
        return f"takes inputs of {_names(launching.INPUT_DTYPES)}, got {_names([inputs[0].dtype])}"
    if operation == "accumulate_act_sq_sum":
        return None
    for tensor in (acc, *inputs):
        if (_TILE - 1) * sum(map(abs, tensor.stride())) >= 1 << 31:  # offsets within a tile have 32 bits
            return f"takes tensors of which {_TILE} rows and columns span less than 2^31 elements, got strides " + str(
                tensor.stride()
            )
    return None


def accumulate_grad_sum(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """:func:`fastprune.ops.reference.accumulate_grad_sum`, with products of 16-bit inputs in tensor cores."""
    grad_sum.accumulate_grad_sum(acc, dy, x)


def accumulate_per_example(accs: Mapping[str, Tensor], dy: Tensor, x: Tensor, spans: list[tuple[int, int]]) -> None:
    """Add each example's gradient, its absolute value and its square, as asked, a tile of the weight at a time.

    Args:
        accs: One or two accumulators by the names of their statistics, not ``grad_sum`` alone; ``(out, in)`` float32,
            of any strides, equal for both.
        dy: ``(n_tokens, out)``, bfloat16, float16 or float32, strided as it may be.
        x: ``(n_tokens, in)``, of the dtype of ``dy``.
        spans: First and end token of each example, none empty.
    """
    # Made on the host even if the caller's tensors are on the device: the mean length selects the tile, and the same
    # examples must give bit-identical sums. Copies of a few hundred bytes do not synchronize.
    starts, ends = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).T.contiguous()
    grad_abs_sum.accumulate_grad_statistics([(dy, accs)], x, starts, ends - starts)


def accumulate_act_sq_sum(acc: Tensor, x: Tensor) -> None:
    """:func:`fastprune.ops.reference.accumulate_act_sq_sum`, bit-identical."""
    act_sq_sum.accumulate_act_sq_sum(acc, x)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(first)} or {last}" if first else last
