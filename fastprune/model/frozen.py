"""Quiet the model for the length of a pass and give it back exactly as it was.

In: a resident causal LM. Out: nothing; the model's training flags, ``requires_grad`` flags and its config are the
caller's again when the context ends, whatever happened in it. Weights and buffers are never written here.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.quirks import OUTPUT_SWITCHES

_ABSENT = object()
_guard = threading.RLock()
_threads: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_eager, _eager_users = contextlib.ExitStack(), 0


@contextlib.contextmanager
def model_lock(model: nn.Module) -> Iterator[None]:
    """Keep other threads from the model for the length of a pass: its blocks, flags and hooks are not its own then.

    Args:
        model: The plain model, without compilation and adapters.

    Raises:
        ModelError: A pass of another thread is at it.
    """
    first = False
    try:
        with _guard:
            first = model not in _threads
            if _threads.setdefault(model, threading.get_ident()) != threading.get_ident():
                raise ModelError(
                    f"model: another thread is scoring or evaluating this {type(model).__name__}; wait for its end, or "
                    "give each thread a model of its own"
                )
        yield
    finally:
        if first:
            with _guard:
                del _threads[model]


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, no cache and no extra outputs inside the context; nothing compiled runs.

    Args:
        model: The causal LM; its own and its text config's output switches are set to ``False`` for the time being.

    Yields:
        Nothing. On exit, also after an exception or Ctrl-C, every flag has its former value.
    """
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    switched: list[tuple[dict, dict]] = []  # what each config holds, and what of it the switches changed
    try:
        model.eval()
        for parameter in requires_grad:
            parameter.requires_grad_(False)
        with uninterrupted():
            for config in configs.values():
                now, former = vars(config), dict(vars(config))
                for name in OUTPUT_SWITCHES:
                    if getattr(config, name, False):
                        setattr(config, name, False)
                was = {name: former.get(name, _ABSENT) for name in now}
                switched.append((now, {name: value for name, value in was.items() if value is not now[name]}))
        with _uncompiled():
            yield
    finally:
        with uninterrupted():
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)
            for module, flag in training.items():
                module.training = flag
            # Past the setters: some refuse what the config was loaded with (output_attentions beside sdpa).
            for now, former in switched:
                for name, value in former.items():
                    if value is _ABSENT:
                        now.pop(name, None)
                    else:
                        now[name] = value


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Modules on which ``compile`` was called run as they are written: a compiled block traces hooks, or skips them.

    The stance is the process's: the first pass sets it, and the last one of those that overlap puts it back.
    """
    global _eager_users
    # Who has compiled anything has loaded dynamo; nobody else should wait for its import.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with uninterrupted(), _guard:
        if not _eager_users:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _eager_users += 1
    try:
        yield
    finally:
        with _guard:
            _eager_users -= 1
            if not _eager_users:
                _eager.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the end of the context; its handler runs then, whether there was an exception or not.

    For work of moments. Only the main thread is ever interrupted, so in others there is nothing to do; nor is there
    under a handler that Python did not install.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    came: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: came.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
