"""Check of each matrix's module in the untouched model: does it multiply, and does it keep rows apart?

In: matrices, and one forward and backward of the whole model in which the loss is that of a single row. Out: a
ModelError that names a module whose output is not the product of its input and its weight, or whose tokens cannot be
attributed to examples. The comparison of parts and whole shows neither, as both compute the same. Hooks observe a run
that takes place anyway.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.frozen import Changes
from fastprune.model.hooks import input_of
from fastprune.model.matrices import Matrix

# Largest accepted relative error (norm-wise) of what a model computes, by weight dtype. Rounding alone stays 10x below:
# two orders of the same sums differ by a few units of eps * sqrt(depth * width); a structural misfit is of order 1.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}

# Largest accepted relative error (norm-wise) of one product by weight dtype. Both sides round the same sums once: half
# an ulp is 0.4 % of an element in bfloat16 and 0.05 % in float16.
_PRODUCT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}

# Largest accepted share of a gradient in rows that the loss does not depend on: it is exactly zero where each row is
# computed on its own, and of order 1 where rows are taken for others.
_STRAY = 1e-2


class ModuleCheck(Changes):
    """Checks the first call of each module inside a ``with`` block, and the backward of that call.

    Args:
        matrices: The matrices whose modules are checked.
        shape: Rows and padded length of the batch that runs.
        row: The only row that the loss depends on.
    """

    def __init__(self, matrices: Sequence[Matrix], shape: Sequence[int], row: int) -> None:
        super().__init__(self._install)
        self._matrices, self._shape, self._row = matrices, (shape[0], shape[1]), row
        self._called: set[nn.Module] = set()
        self._strangers: list[str] = []
        self._mixing: dict[str, None] = {}  # in order, each once: several backward passes may run

    def _install(self, undo: contextlib.ExitStack) -> None:
        for module, matrix in {matrix.module: matrix for matrix in reversed(self._matrices)}.items():
            # Before all other hooks: an ablation's, for example, may replace the output.
            hook = module.register_forward_hook(self._hook(matrix), prepend=True, with_kwargs=True)
            undo.callback(hook.remove)

    def refuse(self) -> None:
        """Raise ModelError if anything was found."""
        if self._strangers:
            raise ModelError(
                f"the module of {self._strangers[0]} does not multiply its input by its weight and add its bias "
                f"({len(self._strangers)} such); its output's gradient is not the product's, so it cannot be scored",
                argument="model",
            )
        if self._mixing:
            raise ModelError(
                f"{next(iter(self._mixing))} is not given its tokens example by example ({len(self._mixing)} "
                "such): the loss of one example has a gradient where those of another should be; expected (rows, "
                "tokens, features), as of the input, and no row that depends on another, got another order or rows "
                "that are mixed; such a model cannot be scored",
                argument="model",
            )

    def _hook(self, matrix: Matrix) -> Callable:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            if module in self._called:
                return
            self._called.add(module)
            # Experts are run by this package when they are scored: their products need no check, their tokens do.
            if matrix.expert is None:
                self._compare_product(module, input_of(args, kwargs), output, matrix)
            rows, tokens = self._shape
            # A call with another number of tokens is refused when it is captured.
            if output.requires_grad and output.numel() == rows * tokens * output.shape[-1]:
                output.register_hook(lambda dy: self._look_for_strays(dy, matrix))

        return hook

    def _compare_product(self, module: nn.Module, x: torch.Tensor, output: torch.Tensor, matrix: Matrix) -> None:
        weight = matrix.weight.T if matrix.input_major else matrix.weight
        bias = module.bias.to(weight) if isinstance(module.bias, torch.Tensor) else None
        product = nn.functional.linear(x.to(weight), weight, bias)
        if relative_error(output, product) > _PRODUCT_TOLERANCE[weight.dtype]:
            self._strangers.append(matrix.name)

    def _look_for_strays(self, dy: torch.Tensor, matrix: Matrix) -> None:
        by_row = dy.detach().reshape(self._shape[0], -1).float().norm(dim=1)
        own = by_row[self._row].clone()
        by_row[self._row] = 0.0
        if float(by_row.norm()) > _STRAY * float(own):  # not so where the model itself gives NaN
            self._mixing[matrix.name] = None


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm-wise, in float64, on the device of ``truth``; infinite if only ``value`` has NaN, NaN if ``truth`` has."""
    truth = truth.detach().double()
    value = value.detach().to(truth)
    error = float((value - truth).norm() / truth.norm().clamp(min=1e-300))
    # Every comparison with NaN is false, which suits only a model that gives NaN itself: the pass names the place.
    return math.inf if math.isnan(error) and bool(truth.isfinite().all()) else error
