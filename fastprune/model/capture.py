"""Hooks that hand the input and the output gradient of each Linear to whoever forms statistics.

In: the matrices of a segment and a sink. Out: ``sink.inputs(matrix, x)`` during a forward and
``sink.gradients(matrix, x, dy)`` during the backward, with ``x`` and ``dy`` as ``(rows * tokens, features)``. Weights
carry ``requires_grad=False``, so autograd forms ``dX`` only. Nothing here knows which statistics are formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

import torch
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.eligible import Matrix


class Sink(Protocol):
    """Receives what a Linear saw. ``per_example`` forbids what cannot be split by example."""

    wants_inputs: bool
    wants_gradients: bool
    per_example: bool

    def inputs(self, matrix: Matrix, x: torch.Tensor) -> None:
        """``x``: ``(n_tokens, in_features)``."""

    def gradients(self, matrix: Matrix, x: torch.Tensor, dy: torch.Tensor) -> None:
        """``x``: ``(n_tokens, in_features)``; ``dy``: ``(n_tokens, out_features)``."""


class Capture:
    """Installs the hooks of some matrices for the length of a ``with`` block.

    Args:
        matrices: The matrices to watch.
        sink: Where inputs and gradients go.
    """

    def __init__(self, matrices: Sequence[Matrix], sink: Sink) -> None:
        self._matrices = list(matrices)
        self._sink = sink
        self._n_tokens = 0
        self._forwards: dict[str, int] = {}
        self._backwards: dict[str, int] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Capture:
        for matrix in self._matrices:
            self._handles.append(matrix.module.register_forward_hook(self._forward_hook(matrix)))
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def micro_batch(self, n_tokens: int) -> Iterator[None]:
        """Watch one forward and backward over ``n_tokens`` (rows times padded length).

        Raises:
            ModelError: A matrix was not reached, or, for per-example statistics, was used twice.
        """
        self._n_tokens = n_tokens
        self._forwards, self._backwards = {}, {}
        yield
        for matrix in self._matrices:
            forwards, backwards = self._forwards.get(matrix.name, 0), self._backwards.get(matrix.name, 0)
            if forwards == 0:
                raise ModelError(
                    f"model: no input of {matrix.name} was seen in a forward pass; it is used without its module being "
                    "called, so it cannot be scored"
                )
            if self._sink.wants_gradients and backwards != forwards:
                raise ModelError(
                    f"model: no gradient reached {matrix.name}: called {forwards} times, {backwards} with a gradient"
                )

    def _forward_hook(self, matrix: Matrix):
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach()
            uses = self._forwards[matrix.name] = self._forwards.get(matrix.name, 0) + 1
            if uses > 1 and self._sink.per_example:
                raise ModelError(
                    f"model: {matrix.name} is used {uses} times in one forward; a per-example statistic would have to "
                    "add the uses before the absolute value, which is not supported"
                )
            rows = x.reshape(-1, x.shape[-1])
            if len(rows) != self._n_tokens:
                raise ModelError(
                    f"model: {matrix.name} saw {len(rows)} token rows where the micro-batch has {self._n_tokens}; "
                    "tokens cannot be attributed to examples"
                )
            if self._sink.wants_inputs:
                self._sink.inputs(matrix, rows)
            if self._sink.wants_gradients and output.requires_grad:
                version = args[0]._version

                def on_gradient(dy: torch.Tensor) -> None:
                    if args[0]._version != version:
                        raise ModelError(
                            f"model: the input of {matrix.name} was changed in place between forward and backward, "
                            "so its gradient cannot be formed"
                        )
                    self._backwards[matrix.name] = self._backwards.get(matrix.name, 0) + 1
                    self._sink.gradients(matrix, rows, dy.detach().reshape(-1, dy.shape[-1]))

                output.register_hook(on_gradient)

        return hook
