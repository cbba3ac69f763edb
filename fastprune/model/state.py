"""Quiet the model for the length of a pass and give it back exactly as it was.

In: a resident causal LM. Out: nothing; the model's training flags, ``requires_grad`` flags and output switches of its
config are the caller's again when the context ends, whatever happened in it. Weights and buffers are never written
here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn

# Each of these makes a model return or keep more than hidden states: a recorded cache would grow at every recompute,
# and router outputs would add an auxiliary loss.
_OUTPUT_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits")


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, no cache and no extra outputs inside the context; nothing compiled runs.

    Args:
        model: The causal LM; its own and its text config's output switches are set to ``False`` for the time being.

    Yields:
        Nothing. On exit, also after an exception or Ctrl-C, every flag has its former value.
    """
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    switches = [
        (config, name, getattr(config, name))
        for config in configs.values()
        for name in _OUTPUT_SWITCHES
        if getattr(config, name, False)
    ]
    try:
        model.eval()
        for parameter in requires_grad:
            parameter.requires_grad_(False)
        for config, name, _ in switches:
            setattr(config, name, False)
        with _uncompiled():
            yield
    finally:
        for config, name, value in switches:
            setattr(config, name, value)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        for module, flag in training.items():
            module.training = flag


def _uncompiled() -> contextlib.AbstractContextManager:
    """Modules on which ``compile`` was called run as they are written: a compiled block traces hooks, or skips them."""
    # Who has compiled anything has loaded dynamo; nobody else should wait for its import.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
