"""The view of a model that only runs as a whole: the interface of :class:`BlockView`, with one "block"."""

from __future__ import annotations

import contextlib

import torch

from fastprune.calibration import MicroBatch
from fastprune.model.anatomy import Anatomy
from fastprune.model.block_view import BlockArguments, View
from fastprune.model.experts import one_by_one
from fastprune.model.frozen import hooked
from fastprune.model.matrices import Matrix
from fastprune.model.vocabulary import input_embedding


class WholeView(View):
    """A model run as a whole: its one "block" leaves logits.

    Activations and statistics of the whole model are in memory at once (``segments=1``).
    """

    leaves_logits = True

    def __init__(self, anatomy: Anatomy, device: torch.device) -> None:
        super().__init__(anatomy, device)
        self.n_blocks = 1

    def matrices_of(self, part: range) -> tuple[Matrix, ...]:
        """All of them: the one "block" is the whole model."""
        return self.matrices

    def prologue(self, batch: MicroBatch) -> tuple[torch.Tensor, BlockArguments]:
        """Nothing runs before the one block; a leaf stands in for hidden states, as the engine expects them."""
        leaf = torch.zeros(len(batch.names), 1, 1, dtype=self.matrices[0].weight.dtype, device=self.device)
        return leaf, BlockArguments(batch, [])

    def run(self, first: int, last: int, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor:
        """The whole forward; logits ``(rows, tokens, vocab)`` with a graph that starts at the embedding's output.

        ``hidden``, one zero a row, is added there: its gradient is the sum over the row's.
        """
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled():
                embedding = input_embedding(self.model)
                stack.enter_context(hooked(embedding, lambda module, args, output: output.detach() + hidden))
            stack.enter_context(one_by_one(self._experts))
            return self.causal_forward(arguments.batch)

    def losses_and_gradient(
        self, hidden: torch.Tensor, batch: MicroBatch, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`BlockView.losses_and_gradient`; ``hidden`` are the logits."""
        logits = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            per_token = self.weighted_losses(logits.flatten(0, 1)[batch.scored], batch.targets, batch.token_weights)
        (gradient,) = torch.autograd.grad(per_token.sum() * scale, logits)
        return per_token.detach(), gradient
