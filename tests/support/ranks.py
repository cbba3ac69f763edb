"""Groups of real processes for the tests: each runs one function with a rank, and any of them may die.

Processes are forked from a server that has imported torch and transformers once, so a group starts in about a second.
The server has no thread and has run no operation, which is what makes forking it safe.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Much more than any group of these tests takes, much less than the half hour after which torch gives up by itself: a
# group that is still there then hangs.
LIMIT = 90.0

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch.distributed", "transformers.models.llama.modeling_llama"])


def run_group(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Run ``work(rank, *args)`` in ``size`` processes of one gloo group.

    Returns:
        Of each process what it returned, or the exception that it raised, or its exit code if it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_context.Pipe(duplex=False) for _ in range(size)]
        group = [
            _context.Process(target=_member, args=(rank, size, folder, ends[rank][1], work, args), daemon=True)
            for rank in range(size)
        ]
        for process, (_, sender) in zip(group, ends, strict=True):
            process.start()
            sender.close()
        until = time.monotonic() + LIMIT
        try:
            return [_answer(process, ends[rank][0], until) for rank, process in enumerate(group)]
        finally:
            for process in group:
                process.kill()


def _answer(process: Any, receiver: Any, until: float) -> Any:
    try:
        if not receiver.poll(max(0.0, until - time.monotonic())):
            raise TimeoutError(f"{process.name} hangs")
        return receiver.recv()
    except EOFError:
        process.join(LIMIT)
        return process.exitcode


def _member(rank: int, size: int, folder: str, sender: Any, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=size)
    try:
        sender.send(work(rank, *args))
    except Exception as error:
        sender.send(error)
    finally:
        sender.close()
        dist.destroy_process_group()
