"""Ctrl-C at every line of what changes a model in several steps, and configs that refuse their own values."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

import pytest
import torch
import transformers
from support.architectures import CONFIGS, HARM, build, slow_except

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.masking import apply
from fastprune.model import block_view, frozen, hooks, module_check
from fastprune.model.frozen import uninterrupted


@contextmanager
def signal_at(code: object, line: int) -> Iterator[list[int]]:
    """Send this process SIGINT when the so-manyth line event of a function comes; yields the events so far."""
    events = [0]

    def on_line(frame: FrameType, event: str, argument: object) -> Callable:
        if event == "line":
            events[0] += 1
            if events[0] == line:
                os.kill(os.getpid(), signal.SIGINT)
        return on_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: on_line if frame.f_code is code else None)
    try:
        yield events
    finally:
        sys.settrace(before)


def inner(function: Callable, name: str) -> CodeType:
    """The code of a function that is defined in another one."""
    return next(c for c in function.__code__.co_consts if isinstance(c, CodeType) and c.co_name == name)


def state_of(model: torch.nn.Module) -> tuple:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    return [id(m) for m in model.modules()], hooks, flags, dict(vars(model.config))


INSIDE = {
    "enter": frozen.Changes.__enter__.__code__,
    "capture": hooks.Capture._install.__code__,
    "remove": torch.utils.hooks.RemovableHandle.remove.__code__,
    "check": module_check.ModuleCheck._install.__code__,
    "stubs": inner(block_view.BlockView._stubbed, "install"),
    "unstub": block_view.BlockView._put_back.__code__,
    "flags": inner(frozen.frozen_eval, "make"),
}


@pytest.mark.parametrize("place", slow_except(INSIDE, "capture"))
def test_an_interrupted_pass_leaves_the_model_as_it_was(place: str) -> None:
    lines = 0
    for line in range(1, 60):
        model = build("Llama").train()
        before = state_of(model)
        with signal_at(INSIDE[place], line) as events:
            try:
                fastprune.score(model, CalibrationSet(HARM[:2]), segments=2, progress=False)
            except KeyboardInterrupt:
                lines += 1
        assert state_of(model) == before, line
        if events[0] < line:
            break
    assert lines > 2


def test_a_mask_comes_off_whatever_interrupts_it() -> None:
    model = build("Llama")
    mask = fastprune.score(model, CalibrationSet(HARM), progress=False).select(None, 0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for line in range(1, 200):
        with signal_at(apply.Undo.restore_.__code__, line) as events, pytest.raises(KeyboardInterrupt):
            with mask.applied(model):
                assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
            if events[0] < line:
                raise KeyboardInterrupt
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), line
        if events[0] < line:
            break
    assert line > 10


def test_the_interrupt_comes_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all of it")
    assert done
    thread = threading.Thread(target=lambda: [done.append("there") for _ in [0] if not uninterrupted().__enter__()])
    thread.start()
    thread.join()
    assert done[-1] == "there" and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_config_that_refuses_the_value_it_was_loaded_with_gets_it_back() -> None:
    """transformers loads output_attentions beside sdpa, but does not let anybody set it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIGS["Llama"], output_attentions=True)
    model = transformers.LlamaForCausalLM(config).train()
    before = state_of(model)
    assert model.config.output_attentions and model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
    fastprune.score(model, CalibrationSet(HARM), progress=False)
    assert state_of(model) == before
    with frozen.frozen_eval(model):
        assert not model.config.output_attentions


def test_passes_that_overlap_on_one_config_and_changes_of_the_callers_own() -> None:
    first = build("Llama")
    second = type(first)(first.config)
    before = dict(vars(first.config))
    one, other = frozen.frozen_eval(first), frozen.frozen_eval(second)
    with one:
        other.__enter__()
        first.config.of_the_caller = 1
    other.__exit__(None, None, None)
    assert dict(vars(first.config)) == {**before, "of_the_caller": 1} and first.config.use_cache
