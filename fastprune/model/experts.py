"""Experts of a mixture run one by one, so that the two products of each can be captured like those of a Linear.

transformers 5 keeps the experts of a block in fused parameters ``(experts, …)`` of one module, which delegates its
forward to a function named in the config. In: the experts modules of a model, and their watchers. Out: inside
:func:`one_by_one` they run :func:`run_experts`, which computes the same as the module's own forward and shows each
product, with the tokens that were routed to it, to the watcher.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.frozen import Changes

# Attributes that `use_experts_implementation` (transformers 5.17 … 5.23) sets on a module and its class.
_INTERFACE = ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate")
_SWITCH = "_experts_implementation_internal"  # the config's own property also writes to its sub-configs

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class ExpertTokens:
    """The tokens of a micro-batch that one expert was given, in the order of the rows of ``x`` and ``dy``.

    Attributes:
        indices: int64 ``(n_tokens,)`` on the model's device, ascending: row of the micro-batch times padded length plus
            position.
        starts: int64 ``(rows,)`` on the CPU: where each row's tokens begin in ``indices``.
        lengths: int64 ``(rows,)`` on the CPU: number of each row's tokens, padding included.
    """

    indices: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


class Watcher(Protocol):
    """Sees the products of an experts module."""

    def called(self, module: nn.Module, n_tokens: int) -> int:
        """A call of the module with ``n_tokens`` flattened tokens begins; returns the rows of the micro-batch."""

    def product(
        self, module: nn.Module, attribute: str, expert: int, x: torch.Tensor, y: torch.Tensor, tokens: ExpertTokens
    ) -> None:
        """``y`` ``(n_tokens, out)`` is ``x`` ``(n_tokens, in)`` times the weight of ``expert`` in ``attribute``."""


_watchers: dict[nn.Module, Watcher] = {}


def follows_interface(module: nn.Module) -> bool:
    """Whether a module holds fused experts and delegates its forward to the function that its config names."""
    return all(hasattr(module, name) for name in _INTERFACE)


def fused_weights(module: nn.Module) -> tuple[str, str]:
    """Names of the two fused weights ``(experts, …)`` of an experts module, in the order of their use."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


@contextmanager
def watched(module: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Show the products of an experts module to ``watcher`` whenever it runs inside :func:`one_by_one`."""
    _watchers[module] = watcher
    try:
        yield
    finally:
        del _watchers[module]


def one_by_one(modules: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """Run experts modules by :func:`run_experts` in a ``with`` block; on exit their configs are restored.

    Raises:
        ModelError: This version of transformers lacks a part of the interface; the message names it.
    """
    configs = {id(config): config for config in (module.config for module in modules)}
    if not configs:
        return nullcontext()
    interface = _interface()
    for config in configs.values():
        if _SWITCH not in vars(config):
            raise ModelError(
                f"{type(config).__name__} has no {_SWITCH}, so experts cannot be watched", argument="transformers"
            )
    # A name of its own for each context: two threads may score two models.
    name = f"fastprune-{next(_numbers)}"

    def switch(undo: ExitStack) -> None:
        undo.callback(interface.pop, name, None)
        interface[name] = run_experts
        for config in configs.values():
            undo.callback(setattr, config, _SWITCH, vars(config)[_SWITCH])
            setattr(config, _SWITCH, name)

    return Changes(switch)


def _interface() -> MutableMapping[str, Callable]:
    """The mapping from a name to an experts function."""
    try:
        return importlib.import_module("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    except (ImportError, AttributeError) as error:
        raise ModelError(
            "transformers has no integrations.moe.ALL_EXPERTS_FUNCTIONS, so experts cannot be watched"
        ) from error


def run_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The forward of an experts module: each expert in turn on its tokens, which stay in ascending order.

    Runs are bit-identical, watched or not. It synchronizes with the device once.

    Args:
        module: The experts module.
        hidden_states: ``(n_tokens, hidden)``.
        top_k_index: int64 ``(n_tokens, k)``, the experts of each token; the number of experts means none.
        top_k_weights: ``(n_tokens, k)``, float.

    Returns:
        ``(n_tokens, hidden)`` in the dtype of ``hidden_states``.
    """
    watcher = _watchers.get(module)
    n_tokens, width = hidden_states.shape
    n_rows = watcher.called(module, n_tokens) if watcher is not None else 1
    n_experts, top_k = len(module.get_parameter("down_proj")), top_k_index.shape[-1]
    expert_of = top_k_index.reshape(-1)
    order = expert_of.argsort(stable=True)  # by expert, then by token: the tokens of one example stay together
    tokens = order // top_k
    lengths = _tokens_of_rows(expert_of, n_experts, n_rows)
    starts = lengths.cumsum(1) - lengths
    sizes = lengths.sum(1).tolist()

    # Each token is copied top_k times before the permutation, so that no two rows of the gradient are added by atomics
    # in an order that differs from run to run; one split, because the gradient of a slice is as large as the whole.
    copies = hidden_states.unsqueeze(1).expand(-1, top_k, -1).reshape(n_tokens * top_k, width)
    parts = copies.index_select(0, order).split(sizes)
    indices = tokens.split(sizes)
    outputs = []
    for expert in (expert for expert in range(n_experts) if sizes[expert]):
        of_expert = ExpertTokens(indices[expert], starts[expert], lengths[expert])
        state = parts[expert]
        for attribute in fused_weights(module):
            product = _product(module, attribute, expert, state)
            if watcher is not None:
                watcher.product(module, attribute, expert, state, product, of_expert)
            state = product if attribute == "down_proj" else _activation(module, product)
        outputs.append(_normed(module, state))
    # Copies that were routed to no expert come last.
    joined = torch.cat([*outputs, hidden_states.new_zeros(sizes[-1], width)])
    weighted = joined * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
    by_token = weighted.index_select(0, order.argsort()).view(n_tokens, top_k, width)
    return by_token.sum(1).to(hidden_states.dtype)


def _tokens_of_rows(expert_of: torch.Tensor, n_experts: int, n_rows: int) -> torch.Tensor:
    """int64 ``(n_experts + 1, n_rows)`` on the CPU: tokens of each row for each expert, and for none of them."""
    row_of = torch.arange(len(expert_of), device=expert_of.device) // (len(expert_of) // n_rows)
    cell = expert_of.clamp(max=n_experts) * n_rows + row_of
    counts = torch.zeros((n_experts + 1) * n_rows, dtype=torch.int64, device=cell.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell)).cpu().view(n_experts + 1, n_rows)


def _product(module: nn.Module, attribute: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, attribute)[expert]
    bias = getattr(module, f"{attribute}_bias")[expert] if module.has_bias else None
    if not module.is_transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else x @ weight + bias


def _activation(module: nn.Module, product: torch.Tensor) -> torch.Tensor:
    return cast("Callable", module._apply_gate if module.has_gate else module.act_fn)(product)


def _normed(module: nn.Module, state: torch.Tensor) -> torch.Tensor:
    return cast("Callable", module.post_expert_norm)(state) if getattr(module, "has_post_expert_norm", False) else state
