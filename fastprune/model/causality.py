"""Is a model causal on every path that its attention takes?

In: a view, or gradients of some tokens' outputs. Out: an error if earlier tokens depend on later ones. Attention takes
other paths where no token is masked out (no mask is made then, and a flag decides) and where a row is longer than a
window, so a model may be causal on one of them only. The gradients of later tokens have to be exactly zero, in any
dtype and with any choice of experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastprune.calibration import MicroBatch
from fastprune.errors import ModelError
from fastprune.model.block_view import BlockView, View
from fastprune.model.frozen import hooked
from fastprune.model.quirks import LAYER_INDICES, WINDOWS
from fastprune.model.vocabulary import input_embedding

# Largest accepted share of what earlier tokens depend on that lies in later ones: exactly nothing in a causal model.
_LATER = 1e-6
# Tokens of the long row behind a window's end; half of them are asked what they depend on.
_BEHIND = 8
_MASKED = (
    "an implementation that always makes a mask, attn_implementation='eager', is causal if the model is meant to be"
)


class NotScorableError(ModelError):
    """The model cannot be scored in any view."""


@contextlib.contextmanager
def leaves_behind_embedding(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Make every output of the input embedding a leaf, so that gradients go through all modules of the blocks.

    Yields:
        The leaves, in the order of the calls.
    """
    leaves: list[torch.Tensor] = []

    def start_here(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        leaves.append(output.detach().requires_grad_(True))
        return leaves[-1].clone()  # some models scale embeddings in place

    with hooked(input_embedding(model), start_here):
        yield leaves


def refuse_later_tokens(
    model: nn.Module, gradients: Sequence[torch.Tensor | None], shape: torch.Size, row: int, early: int
) -> None:
    """Raise if what comes out for the first ``early`` tokens of a row depends on tokens behind them.

    Args:
        model: For the message.
        gradients: Of a loss of those tokens alone, at each call of the input embedding.
        shape: ``(rows, tokens)``; a gradient of other shape is of no tokens.
        row: The row.
        early: Number of tokens.
    """
    if any(_reaches(gradient, row, early) for gradient in _of_tokens(gradients, shape)):
        raise NotScorableError(
            f"expected a causal language model; in {type(model).__name__} a token's logits depend on "
            "the tokens behind it, so a loss of predicting them means nothing (a masked language model? a config "
            "with is_decoder=False?)",
            argument="model",
        )


def refuse_later_tokens_without_mask(view: View, alone: MicroBatch, early: int) -> None:
    """As :func:`refuse_later_tokens`, of the only row of a batch without padding."""
    with leaves_behind_embedding(view.model) as leaves:
        asked = view.causal_forward(alone)[0, :early].float().sum()
    gradients, shape = torch.autograd.grad(asked, leaves, allow_unused=True), alone.input_ids.shape
    if any(_reaches(gradient, 0, early) for gradient in _of_tokens(gradients, shape)):
        raise NotScorableError(
            f"expected a causal language model; in {type(view.model).__name__} a token's logits depend on the "
            f"tokens behind it where no row is padded, so an example's score would depend on its batch; {_MASKED}",
            argument="model",
        )


def exceeded_window(config: Any, longest: int) -> int | None:
    """Tokens of the longest window of local attention, or chunk, that a row of ``longest`` tokens exceeds."""
    windows = [getattr(config.get_text_config(), name, None) for name in WINDOWS]
    return max((window for window in windows if isinstance(window, int) and 0 < window < longest), default=None)


def long_row(window: int, longest: int) -> int:
    """Tokens of the row that :func:`refuse_later_tokens_of_long_rows` is given."""
    return min(longest, window + _BEHIND)


def refuse_later_tokens_of_long_rows(view: BlockView, batch: MicroBatch, window: int, depth: int) -> None:
    """Raise if tokens depend on later ones in a row that is longer than a window.

    The row goes through the blocks, and back through the first one of each kind alone: a model whose blocks are causal
    is causal. No logits are needed, and the graph of one block is in memory at a time, so that it costs less than a
    single example of the pass.

    Args:
        view: The blocks.
        batch: One row, longer than ``window``.
        window: Tokens.
        depth: Blocks that are in memory.
    """
    length = batch.input_ids.shape[1]
    early = length - max(1, (length - window) // 2)
    with torch.no_grad():
        hidden, arguments = view.prologue(batch)
    kinds = [_kind(view.blocks[index], *arguments.calls[index]) for index in range(depth)]
    for index in range(max(map(kinds.index, kinds)) + 1):
        first = kinds.index(kinds[index]) == index
        entering = hidden.detach().requires_grad_(first)
        with torch.set_grad_enabled(first):
            hidden = view.run(index, index + 1, entering, arguments)
        if not first:
            continue
        # Weights of random signs: behind a layer norm the plain sum of a token's features is a constant.
        signs = torch.randint(2, hidden.shape[-1:], generator=torch.Generator().manual_seed(0)).to(hidden) * 2 - 1
        (gradient,) = torch.autograd.grad((hidden[0, :early] * signs).float().sum(), entering)
        if _reaches(gradient, 0, early):
            raise NotScorableError(
                f"expected a causal language model; in {type(view.model).__name__}, block {index}, a token "
                f"depends on the tokens behind it in a row of {length} tokens, longer than its window of {window}, so "
                f"the loss of such an example means nothing; {_MASKED}, or leave such examples out (max_length)",
                argument="model",
            )


def _kind(block: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """The kind of a block, which all but its weights make up: classes, settings, hooks, and the mask it is given."""
    modules = [
        (type(module), bool(module._forward_hooks or module._forward_pre_hooks), *_settings(module))
        for module in block.modules()
    ]
    values = [*args, *(value for _, value in sorted(kwargs.items()))]
    # Masks are square; a tensor of another shape may be each block's own.
    masks = [id(value) for value in values if isinstance(value, torch.Tensor) and value.ndim == 4]
    return (*modules, *masks, *(value is None for value in values))


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    own = vars(module)
    return [(name, own[name]) for name in sorted(own) if _is_setting(name, own[name])]


def _is_setting(name: str, value: object) -> bool:
    return name not in LAYER_INDICES and isinstance(value, str | int | float | None)


def _of_tokens(gradients: Sequence[torch.Tensor | None], shape: torch.Size) -> list[torch.Tensor]:
    return [gradient for gradient in gradients if gradient is not None and gradient.shape[:2] == shape]


def _reaches(gradient: torch.Tensor, row: int, early: int) -> bool:
    # Comparisons with NaN are false: a model that gives NaN itself is not refused here.
    return float(gradient[row, early:].float().norm()) > _LATER * float(gradient[row].float().norm())
