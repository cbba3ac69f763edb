"""Several processes share a pass: its examples, its sums, and the news that one of them failed.

In: the process group that the caller (or torchrun) has set up, if any. Out: sums over all processes; those of a matrix
go to the process that selects from it. A single process runs the same code with nothing to exchange.

No process may wait for one that has left. An error on one process reaches the others at the next exchange, because
every :meth:`Processes.all_gather` carries a value or an error. Sums carry none, so a :meth:`Processes.barrier` has to
come right before them. A process that is killed, or leaves by Ctrl-C, closes its connections, which the others notice.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastprune.errors import ArgumentError, ScoringError


class Processes:
    """The processes of this run.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        self._parted = False  # whether every other process has been told of an error, or is gone

    def share(self, costs: Sequence[int]) -> list[int]:
        """Which pieces of work this process takes.

        The costliest piece first, each to the process with the least work so far. The result depends on the costs and
        the number of processes only.

        Args:
            costs: Cost of each piece, e.g. its padded tokens.

        Returns:
            Indices, ascending; each piece goes to exactly one process.
        """
        loads = [0] * self.size
        mine = []
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            least = loads.index(min(loads))
            loads[least] += costs[index]
            if least == self.rank:
                mine.append(index)
        return sorted(mine)

    def owner(self, index: int) -> int:
        """The process that selects from the matrix with this number."""
        return index % self.size

    def reduce(self, owner: int, tensor: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place on the owner; its values on the others become meaningless.

        Raises:
            ScoringError: Another process is gone.
        """
        if self.size > 1:
            with self._connected():
                dist.reduce(tensor, dst=owner)

    def all_gather(self, value: Any) -> list[Any]:
        """One picklable value from each process, in the order of ranks, on all of them.

        Raises:
            ScoringError: Another process failed (the message says which and why) or is gone.
        """
        return [value] if self.size == 1 else self._exchange(value, None)

    def barrier(self) -> None:
        """Wait for the others, and learn whether one of them failed; see :meth:`all_gather`."""
        self.all_gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error on one process inside the block ends the block on all of them with an error, so that none waits.

        All exchanges of a run belong inside one such block. Ctrl-C is not announced: the others may be an hour from
        their next exchange, and a process that was stopped should not wait for that.

        Raises:
            ScoringError: Another process failed; the message says which and why.
        """
        try:
            yield
            self.barrier()  # no process leaves before all are through
        except Exception as error:
            if self.size > 1 and not self._parted:
                with contextlib.suppress(ScoringError):
                    self._exchange(None, f"{type(error).__name__}: {error}")
            raise

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were started differently.

        Raises:
            ArgumentError: A fact differs; names it and the process.
        """
        for rank, other in enumerate(self.all_gather(dict(facts))):
            for name in {**facts, **other}:
                if other.get(name) != facts.get(name):
                    self._parted = True  # every process finds a difference, and raises here too
                    raise ArgumentError(
                        f"process {rank} has another {name} than process {self.rank}: {other.get(name)!r} and "
                        f"{facts.get(name)!r}; start all of them with the same model, data and settings"
                    )

    def check_device(self, device: torch.device) -> None:
        """Refuse a process group that cannot add tensors of a device.

        Raises:
            ArgumentError: The message says how to initialize one that can.
        """
        if self.size > 1 and device.type not in dist.get_backend_config():
            raise ArgumentError(
                f"expected a process group that adds tensors on {device}, got one of "
                f"{dist.get_backend_config()}; initialize it with backend='cpu:gloo,cuda:nccl', which serves both",
                argument="device",
            )

    def sharing(self, device: torch.device) -> int:
        """Number of processes of this run that have their model on the same device of the same machine."""
        here = (socket.gethostname(), str(device))
        return self.all_gather(here).count(here)

    def _exchange(self, value: Any, failure: str | None) -> list[Any]:
        answers: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(answers, (failure, value))
        for rank, (failed, _) in enumerate(answers):
            if failed is not None:
                self._parted = True
                raise ScoringError(f"process {rank} of {self.size} failed: {failed}")
        return [answer for _, answer in answers]

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._parted = True
            raise ScoringError(
                f"process {self.rank} of {self.size} lost the connection to another one, which has probably ended: "
                f"{error}"
            ) from error
