"""The view of a model that only runs as a whole, behind the interface of the one that comes apart.

In: the anatomy of a model. Out: the steps that the engine drives, with one "block". It must not know scores or files.
"""

from __future__ import annotations

import torch

from fastprune.calibration import MicroBatch
from fastprune.model.anatomy import Anatomy
from fastprune.model.block_view import BlockArguments, View
from fastprune.model.experts import one_by_one
from fastprune.model.frozen import uninterrupted
from fastprune.model.matrices import Matrix


class WholeView(View):
    """The same interface for a model that only runs as a whole: one "block", the logits as its hidden states.

    Memory for the whole model's activations and statistics is needed at once (``segments=1``).
    """

    leaves_logits = True

    def __init__(self, anatomy: Anatomy, device: torch.device) -> None:
        super().__init__(anatomy, device)
        self.n_blocks = 1

    def matrices_of(self, part: range) -> tuple[Matrix, ...]:
        """All of them: the one "block" is the whole model."""
        return self.matrices

    def prologue(self, batch: MicroBatch) -> tuple[torch.Tensor, BlockArguments]:
        """Nothing runs before the one block; a leaf stands for hidden states, so that both views are driven alike."""
        leaf = torch.zeros(len(batch.names), 1, 1, dtype=self.matrices[0].weight.dtype, device=self.device)
        return leaf, BlockArguments(batch, [])

    def run(self, first: int, last: int, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor:
        """The whole forward; logits ``(rows, tokens, vocab)`` with a graph that starts at the embedding's output.

        ``hidden``, one zero a row, is added there: its gradient is the sum over the row's.
        """
        hook = None
        if torch.is_grad_enabled():
            embedding = self.model.get_input_embeddings()
            hook = embedding.register_forward_hook(lambda module, args, output: output.detach() + hidden)
        try:
            with one_by_one(self._experts):
                return self.causal_forward(arguments.batch)
        finally:
            if hook is not None:
                with uninterrupted():
                    hook.remove()

    def losses_and_gradient(
        self, hidden: torch.Tensor, batch: MicroBatch, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`BlockView.losses_and_gradient`; ``hidden`` are the logits."""
        logits = hidden.detach().requires_grad_(True)
        with torch.enable_grad():
            per_token = self.weighted_losses(logits.flatten(0, 1)[batch.scored], batch.targets, batch.token_weights)
        (gradient,) = torch.autograd.grad(per_token.sum() * scale, logits)
        return per_token.detach(), gradient
