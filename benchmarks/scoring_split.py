"""Where the time of a scoring pass goes.

In: a call that scores. Out: seconds of forward, dX, head, sums of gradients and selection, and the rest, which together
are the whole. On a GPU they are read on its own clock, from events queued before and after each part.

Torch's profiler is not used: it attributes a kernel that is not torch's (a Triton kernel, one of the CUDA extension) to
the operator that launched it and to no annotation of ours. One stream does all the work, also what autograd's thread
launches, so a part's two events enclose that part and nothing else. Time in which the device waits for the host counts
for the part in which it waits.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from measure import Instant

from fastprune import ops
from fastprune.model.block_view import BlockView
from fastprune.scoring.collect import Collector

PARTS = {
    "forward": (BlockView, "run"),
    "head": (BlockView, "losses_and_gradient"),
    "sums": (ops, "accumulate_gradients"),
    "selection": (Collector, "add"),
    "dX": (torch.autograd, "backward"),
}


def _noted(function: Callable, now: Callable[[], object], spans: list[tuple]) -> Callable:
    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        begin = now()
        result = function(*args, **kwargs)
        spans.append((begin, now()))
        return result

    return call


def split(device: str, run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each part of one call."""
    now = Instant if device == "cuda" else time.perf_counter
    spans: dict[str, list[tuple]] = {part: [] for part in PARTS}
    with ExitStack() as stack:
        for part, (owner, name) in PARTS.items():
            stack.enter_context(mock.patch.object(owner, name, _noted(getattr(owner, name), now, spans[part])))
        begin = now()
        run()
        whole = now() - begin
    spent = {part: sum(end - begin for begin, end in of_part) for part, of_part in spans.items()}
    spent["dX"] -= spent["sums"]  # hooks form the sums inside
    return spent | {"rest": whole - sum(spent.values())}


def shares(device: str, run: Callable[[], object]) -> dict[str, object]:
    """What a line says of :func:`split`: each part's share, or the error for which there is none.

    Times are worth having without it, so no error of its own may end the run that measures them.
    """
    try:
        seconds = split(device, run)
    except Exception as error:
        return {"split_error": f"{type(error).__name__}: {error}"[:300]}
    whole = sum(seconds.values())
    return {"shares_of_time": {part: round(part_seconds / whole, 3) for part, part_seconds in seconds.items()}}
