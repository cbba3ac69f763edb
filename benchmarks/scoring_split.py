"""Where the time of a scoring pass goes, from a run under torch's profiler.

In: a call that scores. Out: seconds of forward, dX, head, sums of gradients and selection, and what is left: on a GPU
the time in which it has nothing to do, on the CPU everything else. On a GPU the seconds are those of the kernels that a
part launched; dX is what no other part launched, since autograd's thread launches it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastprune import ops
from fastprune.model.view import BlockView
from fastprune.scoring.collect import Collector

PARTS = {
    "forward": (BlockView, "run"),
    "head": (BlockView, "losses_and_gradient"),
    "sums": (ops, "accumulate_gradients"),
    "selection": (Collector, "add"),
    "backward": (torch.autograd, "backward"),
}


def _annotated(part: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        with record_function(f"fastprune {part}"):
            return function(*args, **kwargs)

    return call


def split(device: str, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each part of one call; the profiler's own cost is in them, so they say how time is shared out."""
    on_gpu = device == "cuda"
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, _annotated(part, getattr(owner, name))))
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
        with profile(activities=activities, acc_events=True) as profiler:
            start = time.perf_counter()
            run()
            if on_gpu:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
    events = profiler.key_averages()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if (part := event.key.removeprefix("fastprune ")) in spent and event.device_type.name == "CPU":
            spent[part] += (event.device_time_total if on_gpu else event.cpu_time_total) / 1e6
    backward = spent.pop("backward")
    if on_gpu:
        # An annotation has an event of its own on the device, as long as what it spans.
        on_device = [e for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation]
        kernels = sum(event.self_device_time_total for event in on_device) / 1e6
        return spent | {"dX": kernels - sum(spent.values()), "idle": wall - kernels}
    spent["dX"] = backward - spent["sums"]  # hooks form the sums inside
    return spent | {"rest": wall - sum(spent.values())}
