"""A Hugging Face causal LM as prologue, decoder blocks and epilogue.

In: the anatomy of a model. Out: :class:`BlockView`, which runs any part of the model on its own. No architecture's
arguments are written by hand: the model's own forward runs with every decoder block replaced by a stub that records
the arguments of the real block, and the head runs on hidden states that the last stub returns.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastprune.calibration import MicroBatch
from fastprune.errors import ModelError
from fastprune.model.anatomy import Anatomy
from fastprune.model.experts import one_by_one
from fastprune.model.frozen import Changes, hooked
from fastprune.model.matrices import Matrix
from fastprune.model.vocabulary import input_embedding, predictable_tokens


def tokens_per_chunk(vocabulary: int, *, on_gpu: bool) -> int:
    """Scored tokens that go through the head together.

    Their logits, in fp32, take 128 MiB on a CPU and 512 MiB on a GPU: small next to the weights of any model whose
    vocabulary makes chunks necessary. A GPU multiplies in tiles of 128 rows, so 261 tokens would cost as much as 384.
    """
    tokens = max(1, (2**27 if on_gpu else 2**25) // vocabulary)
    return tokens - tokens % 128 if tokens > 128 else tokens


@dataclass
class BlockArguments:
    """The arguments of the blocks other than the hidden states, for one micro-batch.

    Attributes:
        batch: The micro-batch.
        calls: The arguments that the model passes to each block; empty for a model that runs as a whole.
    """

    batch: MicroBatch
    calls: list[tuple[tuple, dict]]


class _PrologueDone(Exception):
    """Raised by the last stub of a prologue: head and final norm need not run."""


class _Stub(nn.Module):
    """Stands in for a block: records its arguments and hands hidden states through."""

    def __init__(self, block: nn.Module, on_call: Callable[[tuple, dict], object]) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)  # not registered: the stub owns no parameters
        self.on_call = on_call

    def __getattr__(self, name: str) -> torch.Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models read settings of a layer from its block, such as attention_type
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.on_call(args, kwargs)


def _split_hidden(args: tuple, kwargs: dict) -> tuple[torch.Tensor, tuple, dict]:
    """Separate the hidden states from the other arguments of a call of a block."""
    if args:
        return args[0], args[1:], kwargs
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), (), kwargs


class View:
    """The base of both views: the model's own forward, the eligible matrices and the loss.

    Attributes:
        leaves_logits: Whether the last block returns logits, not hidden states.
    """

    leaves_logits = False

    def __init__(self, anatomy: Anatomy, device: torch.device) -> None:
        self.anatomy = anatomy
        self.model, self.matrices = anatomy.model, anatomy.matrices
        self.device = device  # where token ids go
        self._experts = list({matrix.module: None for matrix in self.matrices if matrix.expert is not None})
        self.n_blocks = len(anatomy.blocks)
        self.accepted = set(inspect.signature(self.model.forward).parameters)

    def matrices_of(self, part: range) -> tuple[Matrix, ...]:
        """The eligible matrices of some blocks, in model order."""
        return tuple(matrix for matrix in self.matrices if matrix.block in part)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """The model's own forward; logits ``(rows, tokens, vocab)``, where token ids go whatever the head's device."""
        extra = {"position_ids": position_ids, "use_cache": False}
        extra = {name: value for name, value in extra.items() if name in self.accepted and value is not None}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **extra).logits.to(self.device)

    def causal_forward(self, batch: MicroBatch) -> torch.Tensor:
        """:meth:`forward` without a mask of the padding.

        Padding comes after a row's tokens, none of which sees it; the self-check makes sure. A mask would do harm: a
        token that sees nothing (padding farther from the text than a sliding window) may get NaN from attention, which
        reaches the text as 0 times NaN; and the fastest kernels of a GPU take no mask.
        """
        return self.forward(batch.input_ids, torch.ones_like(batch.input_ids), batch.position_ids)

    @staticmethod
    def weighted_losses(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each scored token times its weight, in fp32 (fp64 for a float64 model): ``(n_scored,)``."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="none") * weights.to(logits)


class BlockView(View):
    """The model in three parts: ``prologue``, ``run`` (any range of blocks) and ``losses_and_gradient``.

    Args:
        anatomy: The model, taken apart.
        device: Where token ids go.
    """

    def __init__(self, anatomy: Anatomy, device: torch.device) -> None:
        super().__init__(anatomy, device)
        self.block_list, self.blocks = anatomy.block_list, anatomy.blocks
        # Placeholders for what a block returns after the hidden states; None if it returns a tensor alone. Learned when
        # a block first runs.
        self.returns_after: tuple[None, ...] | None = None

    def _stubbed(self, on_call: Callable[[int, tuple, dict], torch.Tensor], first: int = 0) -> Changes:
        """Stubs in place of the blocks from ``first`` on; each returns the hidden states that ``on_call`` gives."""

        def handler(index: int) -> Callable[[tuple, dict], object]:
            def call(args: tuple, kwargs: dict) -> object:
                hidden = on_call(index, args, kwargs)
                return hidden if self.returns_after is None else (hidden, *self.returns_after)

            return call

        def install(undo: contextlib.ExitStack) -> None:
            undo.callback(self._put_back, list(self.block_list))
            for index, block in enumerate(self.blocks[first:], start=first):
                self.block_list[index] = _Stub(block, handler(index))

        return Changes(install)

    def _put_back(self, blocks: list[nn.Module]) -> None:
        for index, block in enumerate(blocks):
            self.block_list[index] = block

    def truncated(self, depth: int) -> Changes:
        """The model with its first ``depth`` blocks alone: the others pass hidden states on unchanged."""
        return self._stubbed(lambda index, args, kwargs: _split_hidden(args, kwargs)[0], first=depth)

    def learn_return_type(self, batch: MicroBatch) -> torch.Tensor:
        """Run the model once as it is, note what its blocks return, and return its logits."""

        def note(module: nn.Module, args: tuple, output: object) -> None:
            self.returns_after = (None,) * (len(output) - 1) if isinstance(output, tuple | list) else None

        with hooked(self.blocks[0], note):
            return self.forward(batch.input_ids, batch.attention_mask, batch.position_ids)

    def entering(self, batch: MicroBatch) -> torch.Tensor:
        """The hidden states ``(rows, tokens, hidden)`` that enter block 0."""
        return self._until(0, batch)[0]

    def prologue(self, batch: MicroBatch) -> tuple[torch.Tensor, BlockArguments]:
        """Everything before the first block.

        Returns:
            The hidden states ``(rows, tokens, hidden)`` that enter block 0, and every block's other arguments.
        """
        entering, calls = self._until(self.n_blocks - 1, batch)
        return entering, BlockArguments(batch, calls)

    def _until(self, last: int, batch: MicroBatch) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """The hidden states that enter block 0, and the other arguments of the blocks up to ``last``, which ends it."""
        entering: list[torch.Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def record(index: int, args: tuple, kwargs: dict) -> torch.Tensor:
            hidden, args, kwargs = _split_hidden(args, kwargs)
            entering.append(hidden)
            calls.append((args, kwargs))
            if index == last:
                raise _PrologueDone
            return hidden

        with self._stubbed(record), contextlib.suppress(_PrologueDone):
            self.causal_forward(batch)
        if len(calls) != last + 1:
            raise ModelError(
                f"{type(self.model).__name__} called {len(calls)} of its {self.n_blocks} decoder blocks in one forward",
                argument="model",
            )
        return entering[0], calls

    def run(self, first: int, last: int, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor:
        """Run blocks ``first`` to ``last - 1``; hidden states in, hidden states out, ``(rows, tokens, hidden)``."""
        with one_by_one(self._experts):  # with and without a capture, so that recomputed segments are bit-identical
            for index in range(first, last):
                args, kwargs = arguments.calls[index]
                output = self.blocks[index](hidden, *args, **kwargs)
                hidden = output if isinstance(output, torch.Tensor) else output[0]
        return hidden

    def epilogue(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm, head, soft-caps and scales of the model on single tokens.

        Args:
            hidden: ``(n_tokens, hidden)`` states that left the last block.

        Returns:
            Logits ``(n_tokens, vocab)``.
        """

        # Each token goes through as a sequence of length 1: the epilogue acts on tokens one by one, so only the tokens
        # whose logits are needed are computed, and models that reshape by the input's shape (GPT-2) still work.
        def replace_last(index: int, args: tuple, kwargs: dict) -> torch.Tensor:
            passed, _, _ = _split_hidden(args, kwargs)
            return hidden.unsqueeze(1) if index == self.n_blocks - 1 else passed

        ids = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=self.device)
        with self._stubbed(replace_last), self._without_embedding(hidden.dtype):
            return self.forward(ids, torch.ones_like(ids), torch.zeros_like(ids)).squeeze(1)

    def _without_embedding(self, dtype: torch.dtype) -> Changes:
        """Zeros instead of embeddings, whose weights may not be in memory while the head runs."""
        embedding = input_embedding(self.model)
        width = embedding.weight.shape[1]

        def replace(undo: contextlib.ExitStack) -> None:
            attributes = vars(embedding)
            if "forward" in attributes:  # an instance's own forward, which some libraries install
                undo.callback(attributes.__setitem__, "forward", attributes["forward"])
            else:
                undo.callback(attributes.pop, "forward")
            attributes["forward"] = lambda ids: torch.zeros(*ids.shape, width, dtype=dtype, device=ids.device)

        return Changes(replace)

    def losses_and_gradient(
        self, hidden: torch.Tensor, batch: MicroBatch, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted loss of each scored token and the gradient of their sum.

        Args:
            hidden: ``(rows, tokens, hidden)`` states that left the last block; no graph is needed.
            batch: The micro-batch they belong to.
            scale: Factor on the loss before the backward pass (a power of two; for fp16 models).

        Returns:
            Losses, fp32 (fp64 for a float64 model) ``(n_scored,)``, unscaled, of which those of a row add up to its
            example's; and ``scale`` times the gradient of their sum with respect to ``hidden``, in its dtype.
        """
        hidden, scored = hidden.detach(), batch.scored.to(hidden.device)
        states = hidden.flatten(0, 1)[scored]
        gradient = torch.zeros_like(states)
        losses: list[torch.Tensor] = []
        step = tokens_per_chunk(predictable_tokens(self.model), on_gpu=self.device.type == "cuda")
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            chunk = states[part].requires_grad_(True)
            with torch.enable_grad():
                token_losses = self.weighted_losses(
                    self.epilogue(chunk), batch.targets[part], batch.token_weights[part]
                )
            losses.append(token_losses.detach())
            (gradient[part],) = torch.autograd.grad(token_losses.sum() * scale, chunk)
        full = hidden.new_zeros(hidden.shape)  # contiguous, whatever the last block returned
        full.view(-1, hidden.shape[-1])[scored] = gradient
        return torch.cat(losses), full
