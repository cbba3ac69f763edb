"""Hooks that capture the input and the output gradient of each matrix, and hand them to a sink.

In: the matrices of a segment and a sink. Out: ``sink.inputs(matrix, x)`` during a forward and
``sink.gradients(matrix, x, dy)`` during the backward, with ``x`` and ``dy`` as ``(n_tokens, features)``: the whole
micro-batch for a Linear, the tokens that were routed to it for an expert. Weights carry ``requires_grad=False``, so
autograd forms ``dX`` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.experts import ExpertTokens, watched
from fastprune.model.frozen import Changes
from fastprune.model.matrices import Matrix


class Sink(Protocol):
    """Receives inputs and output gradients of matrices. ``per_example`` forbids what cannot be split by example."""

    wants_inputs: bool
    wants_gradients: bool
    per_example: bool

    def inputs(self, matrix: Matrix, x: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """``x``: ``(n_tokens, in_features)``; ``tokens``: which they are, ``None`` for the whole micro-batch."""

    def gradients(self, matrix: Matrix, x: torch.Tensor, dy: torch.Tensor, tokens: ExpertTokens | None = None) -> None:
        """``x`` and ``tokens`` as in :meth:`inputs`; ``dy``: ``(n_tokens, out_features)``."""


def input_of(args: tuple, kwargs: dict) -> torch.Tensor:
    """What a Linear was called with, by place or by name (``input``, ``x``); it takes nothing else."""
    return next(iter([*args, *kwargs.values()]))


class Capture(Changes):
    """Installs the hooks of some matrices for the length of a ``with`` block.

    Experts are captured inside :func:`fastprune.model.experts.one_by_one` only, as a view runs them.

    Args:
        matrices: The matrices to watch.
        sink: Where inputs and gradients go.
    """

    def __init__(self, matrices: Sequence[Matrix], sink: Sink) -> None:
        super().__init__(self._install)
        self._matrices = list(matrices)
        self._of = {(matrix.module, matrix.attribute, matrix.expert): matrix for matrix in self._matrices}
        self._first_of = {matrix.module: matrix for matrix in reversed(self._matrices)}
        self._sink = sink
        self._shape = (0, 0)
        self._calls: Counter[nn.Module] = Counter()
        self._forwards: Counter[str] = Counter()
        self._backwards: Counter[str] = Counter()

    def _install(self, undo: ExitStack) -> None:
        for matrix in self._matrices:
            if matrix.expert is None:
                # Before all other hooks: an ablation's, for example, may replace the output.
                hook = self._forward_hook(matrix)
                handle = matrix.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                undo.callback(handle.remove)
        for module in {matrix.module: None for matrix in self._matrices if matrix.expert is not None}:
            undo.enter_context(watched(module, self))

    @contextmanager
    def micro_batch(self, shape: Sequence[int]) -> Iterator[None]:
        """Capture one forward and backward over ``shape``: rows and padded length.

        An expert that no token was routed to captures nothing, and its gradient is zero.

        Raises:
            ModelError: A matrix was not reached, or, for per-example statistics, was used twice.
        """
        self._shape = (shape[0], shape[1])
        self._calls, self._forwards, self._backwards = Counter(), Counter(), Counter()
        yield
        for matrix in self._matrices:
            if not self._calls[matrix.module]:
                raise ModelError(
                    f"no input of {matrix.name} was seen in a forward pass; it is used without its module being "
                    "called, so it cannot be scored",
                    argument="model",
                )
            forwards, backwards = self._forwards[matrix.name], self._backwards[matrix.name]
            if self._sink.wants_gradients and backwards != forwards:
                raise ModelError(
                    f"no gradient reached {matrix.name}: called {forwards} times, {backwards} with a gradient",
                    argument="model",
                )

    def called(self, module: nn.Module, n_tokens: int) -> int:
        """An experts module begins; see :class:`fastprune.model.experts.Watcher`."""
        self._count_call(self._first_of[module], n_tokens)
        return self._shape[0]

    def product(
        self, module: nn.Module, attribute: str, expert: int, x: torch.Tensor, y: torch.Tensor, tokens: ExpertTokens
    ) -> None:
        """An expert has multiplied; see :class:`fastprune.model.experts.Watcher`."""
        matrix = self._of.get((module, attribute, expert))
        if matrix is not None:
            self._see(matrix, x, y, tokens)

    def _forward_hook(self, matrix: Matrix) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
            x = input_of(args, kwargs)
            self._count_call(matrix, x.numel() // x.shape[-1])
            self._see(matrix, x, output, None)

        return hook

    def _count_call(self, matrix: Matrix, n_tokens: int) -> None:
        """Refuse, in the name of a matrix, a call of its module that cannot be attributed to examples."""
        self._calls[matrix.module] += 1
        uses, expected = self._calls[matrix.module], self._shape[0] * self._shape[1]
        if uses > 1 and self._sink.per_example:
            raise ModelError(
                f"{matrix.name} is used {uses} times in one forward; a per-example statistic would have to "
                "add the uses before the absolute value, which is not supported",
                argument="model",
            )
        if n_tokens != expected:
            raise ModelError(
                f"{matrix.name} saw {n_tokens} token rows where the micro-batch has {expected}; "
                "tokens cannot be attributed to examples",
                argument="model",
            )

    def _see(self, matrix: Matrix, x: torch.Tensor, y: torch.Tensor, tokens: ExpertTokens | None) -> None:
        """Hand on the input of one product now, and with the gradient of its output ``y`` when that is there."""
        if x.dtype != y.dtype:
            raise ModelError(
                f"{matrix.name} was given {x.dtype} and returned {y.dtype}, as under autocast; cast the model "
                "itself, or pass it as it was before accelerate's prepare wrapped its forward",
                argument="model",
            )
        x = x.detach()  # shares the version counter, but not the graph
        # A hook of accelerate may move the input to the weight's device after this hook.
        rows = x.reshape(-1, x.shape[-1]).to(y.device)
        self._forwards[matrix.name] += 1
        if self._sink.wants_inputs:
            self._sink.inputs(matrix, rows, tokens)
        if not (self._sink.wants_gradients and y.requires_grad):
            return
        version = x._version

        def on_gradient(dy: torch.Tensor) -> None:
            if x._version != version:
                raise ModelError(
                    f"the input of {matrix.name} was changed in place between forward and backward, "
                    "so its gradient cannot be formed",
                    argument="model",
                )
            self._backwards[matrix.name] += 1
            self._sink.gradients(matrix, rows, dy.detach().reshape(-1, dy.shape[-1]), tokens)

        y.register_hook(on_gradient)
