"""A model frozen for the length of a pass, and given back exactly as it was.

In: a causal LM in memory. Out: contexts that change flags, modules and hooks of the model, and take every change back
whatever happens inside: errors, Ctrl-C at any moment. Weights and buffers are never written here.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import nn

from fastprune.errors import ModelError
from fastprune.model.quirks import OUTPUT_SWITCHES
from fastprune.model.vocabulary import config_of

_ABSENT = object()
_guard = threading.RLock()
_threads: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_eager, _eager_users = contextlib.ExitStack(), 0


class Changes:
    """Temporary changes to a model: made whole on entering a ``with`` block, and taken back whole on leaving it.

    Ctrl-C waits while they are made and while they are taken back, so it never leaves a model half changed.

    Args:
        make: Makes the changes, and gives the stack what takes each of them back.
    """

    def __init__(self, make: Callable[[contextlib.ExitStack], object]) -> None:
        self._make, self._undo = make, contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            with uninterrupted():
                self._make(self._undo)
            return self  # in here: Ctrl-C may come before the block has begun
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        with uninterrupted():
            self._undo.close()


def hooked(module: nn.Module, hook: Callable) -> Changes:
    """A forward hook for the length of a ``with`` block."""
    return Changes(lambda undo: undo.callback(module.register_forward_hook(hook).remove))


@contextlib.contextmanager
def model_lock(model: nn.Module) -> Iterator[None]:
    """Keep other threads from a model while this one scores or evaluates it: its modules and hooks are changed then.

    Args:
        model: The plain model, without compilation and adapters.

    Raises:
        ModelError: Another thread is already scoring or evaluating this model.
    """
    first = False
    try:
        with _guard:
            first = model not in _threads
            if _threads.setdefault(model, threading.get_ident()) != threading.get_ident():
                raise ModelError(
                    f"another thread is scoring or evaluating this {type(model).__name__}; wait for its end, or "
                    "give each thread a model of its own",
                    argument="model",
                )
        yield
    finally:
        if first:
            with _guard:
                del _threads[model]


def frozen_eval(model: nn.Module) -> Changes:
    """Evaluation mode, no parameter gradients, no cache and no extra outputs; nothing compiled runs.

    Args:
        model: The causal LM. The output switches of its config and of its text config are ``False`` inside.

    Returns:
        A context. When it is left, also by an exception or Ctrl-C, every flag has its former value.
    """

    def make(undo: contextlib.ExitStack) -> None:
        training = {module: module.training for module in model.modules()}
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        undo.callback(_set_flags, training, requires_grad)
        model.eval()
        for parameter in requires_grad:
            parameter.requires_grad_(False)
        config = config_of(model)
        for each in {id(config): config for config in (config, config.get_text_config())}.values():
            undo.callback(_put_back, vars(each), _switch_off(each))
        _run_uncompiled(undo)

    return Changes(make)


def _set_flags(training: dict[nn.Module, bool], requires_grad: dict[nn.Parameter, bool]) -> None:
    for parameter, flag in requires_grad.items():
        parameter.requires_grad_(flag)
    for module, flag in training.items():
        module.training = flag


def _switch_off(config: object) -> dict[str, Any]:
    """Set the output switches of a config to ``False``; returns the former values of all attributes that this changed.

    A setter may change more than one, and the caller's own changes meanwhile are to stay.
    """
    now, former = vars(config), dict(vars(config))
    for name in OUTPUT_SWITCHES:
        if getattr(config, name, False):
            setattr(config, name, False)
    was = {name: former.get(name, _ABSENT) for name in now}
    return {name: value for name, value in was.items() if value is not now[name]}


def _put_back(attributes: dict[str, Any], former: dict[str, Any]) -> None:
    # Past the setters: some refuse what the config was loaded with (output_attentions with sdpa).
    for name, value in former.items():
        if value is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = value


def _run_uncompiled(undo: contextlib.ExitStack) -> None:
    """Run modules on which ``compile`` was called as they are written: a compiled block traces hooks, or skips them.

    The stance is the process's: the first pass sets it, and the last one of those that overlap puts it back.
    """
    global _eager_users
    # Without dynamo nothing was compiled, and its import takes seconds.
    if "torch._dynamo" not in sys.modules:
        return
    with _guard:
        if not _eager_users:
            _eager.enter_context(torch.compiler.set_stance("force_eager"))
        _eager_users += 1
        undo.callback(_run_compiled)


def _run_compiled() -> None:
    global _eager_users
    with _guard:
        _eager_users -= 1
        if not _eager_users:
            _eager.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT back until the end of the context; its handler runs then, whether there was an exception or not.

    For work of moments. Python interrupts the main thread only, so in others there is nothing to do; nor is there under
    a handler that Python did not install.
    """
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(handler):
        yield
        return
    held: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *signal_and_frame: held.append(signal_and_frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
