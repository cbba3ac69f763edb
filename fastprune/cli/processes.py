"""A command that torchrun has started several times: its process group, and which process prints.

In: the environment that torchrun sets. Out: a ``torch.distributed`` group for the length of a ``with`` block.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import sys
from collections.abc import Iterator

from fastprune.errors import ArgumentError, printable

# A process that ends is noticed at once by its closed connection, so this is not how long a failure goes unseen. It has
# to exceed the longest wait of one process for another: a whole pass over a large model on a CPU where there are fewer
# micro-batches than processes.
_TIMEOUT = datetime.timedelta(days=1)


def started() -> int:
    """How many processes the launcher has started, on all nodes; 1 without one."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process writes files and prints."""
    return started() == 1 or _number("RANK", 0) == 0


def note(text: object, kind: str = "note") -> None:
    """One line on standard error, once and not once a process."""
    if is_first():
        print(printable(f"fastprune: {kind}: {text}"), file=sys.stderr)


def complain(text: object) -> None:
    """An error as one line on standard error, from every process that has one."""
    print(printable(f"fastprune: error: {text}"), file=sys.stderr)


def say(text: object) -> None:
    """A result on standard output; names in it may come from files."""
    print(printable(text))


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[None]:
    """The group of all processes that were started; nothing if there is one.

    Each takes the GPU of its ``LOCAL_RANK``. Sums of a GPU go through NCCL, everything else through gloo, which notices
    at once when a process is gone.

    Args:
        device: What the user asked for; ``None``: a GPU if there is one.

    Raises:
        ArgumentError: All were sent to one GPU, or the launcher's environment is incomplete.
    """
    if started() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    if device is not None and ":" in device:
        raise ArgumentError(
            f"expected cuda or cpu for several processes, each of which takes a GPU of its own, got {device!r}",
            argument="device",
        )
    if on_gpu:
        number, count = _number("LOCAL_RANK", 0), torch.cuda.device_count()
        if number >= count:
            raise ArgumentError(
                f"process {number} of this node needs a GPU of its own, and there are {count}", argument="device"
            )
        torch.cuda.set_device(number)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_TIMEOUT)
    except ValueError as error:
        raise ArgumentError(
            f"WORLD_SIZE is {started()}, but the processes cannot meet: {error}; use torchrun"
        ) from error
    try:
        yield
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    atexit.register(_leave)


def _leave() -> None:
    """End the process without taking the interpreter down.

    A thread of gloo's may still let go of the last exchange's tensors, for which it needs an interpreter: some runs
    whose work was done were reported as aborted ("terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default
