"""Several processes at one pass: who takes which examples, who gets which sums, and what happens if one of them fails.

In: the process group that the caller (or torchrun) has set up, if there is one. Out: sums over all processes, each
matrix's on the process that selects from it. One process is the same code with nothing to exchange. It must not know
models or statistics.

Nobody may wait for a process that has left. An error on one process is told to the others at the next exchange,
whichever that is: every :meth:`Processes.all_gather` carries a value or an error. Sums carry none, so a
:meth:`Processes.barrier` has to come right before them. A process that is killed, or leaves by Ctrl-C, closes its
connections, which the others see.
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
        rank: Number of this one.
        size: How many there are.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        self._parted = False  # every other process has been told of an error, or is gone

    def share(self, costs: Sequence[int]) -> list[int]:
        """Which pieces of work this process takes.

        The costliest first, each to whoever has least so far: depends on the costs and the number of processes alone.

        Args:
            costs: Of each piece, e.g. its padded tokens.

        Returns:
            Indices, ascending; together the processes take each piece once.
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
        """Add up a tensor over all processes, in place on the owner; elsewhere its values are spent.

        Raises:
            ScoringError: Another process is gone.
        """
        if self.size > 1:
            with self._connected():
                dist.reduce(tensor, dst=owner)

    def all_gather(self, value: Any) -> list[Any]:
        """One picklable value from each process, in their order, on all of them.

        Raises:
            ScoringError: Another process failed, and the message says which and why; or it is gone.
        """
        return [value] if self.size == 1 else self._exchange(value, None)

    def barrier(self) -> None:
        """Wait for the others, and learn whether one of them failed; see :meth:`all_gather`."""
        self.all_gather(None)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error inside on one process ends the block on all of them with an error, so that none waits for it.

        All of a run's exchanges belong inside one such block. Ctrl-C is not told: the others may be an hour from the
        next exchange, and who stops a process does not want it to wait.

        Raises:
            ScoringError: Another process failed; the message says which and why.
        """
        try:
            yield
            self.barrier()  # nobody leaves before all are through
        except Exception as error:
            if self.size > 1 and not self._parted:
                with contextlib.suppress(ScoringError):
                    self._exchange(None, f"{type(error).__name__}: {error}")
            raise

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were not started alike.

        Raises:
            ArgumentError: Some fact differs; names it and the process.
        """
        for rank, other in enumerate(self.all_gather(dict(facts))):
            for name in {**facts, **other}:
                if other.get(name) != facts.get(name):
                    self._parted = True  # who is not like all the others is refused on all of them
                    raise ArgumentError(
                        f"process {rank} has another {name} than process {self.rank}: {other.get(name)!r} and "
                        f"{facts.get(name)!r}; start all of them with the same model, data and settings"
                    )

    def check_device(self, device: torch.device) -> None:
        """Refuse a process group that cannot add tensors of a device.

        Raises:
            ArgumentError: Says how to initialise one that can.
        """
        if self.size > 1 and device.type not in dist.get_backend_config():
            raise ArgumentError(
                f"device: the model is on {device}, and a process group of {dist.get_backend_config()} adds nothing "
                "there; initialise one with backend='cpu:gloo,cuda:nccl', which serves both"
            )

    def sharing(self, device: torch.device) -> int:
        """How many processes of this run have their model on the same device of the same machine."""
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
