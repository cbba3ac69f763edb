"""Several processes at one pass: who takes which examples, who gets which sums, and what happens if one of them fails.

In: the process group that the caller (or torchrun) has set up, if there is one. Out: sums over all processes, each
matrix's on the process that selects from it. One process is the same code with nothing to exchange. It must not know
models or statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastprune.errors import ArgumentError, ScoringError


class Ranks:
    """The processes of this run.

    Attributes:
        rank: Number of this one.
        size: How many there are.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1

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

    def sum_to(self, owner: int, tensor: torch.Tensor) -> None:
        """Add up a tensor over all processes, in place on the owner; elsewhere its values are spent.

        Raises:
            ScoringError: Another process is gone.
        """
        if self.size > 1:
            with self._connected():
                dist.reduce(tensor, dst=owner)

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from each process, in their order, on all of them.

        Raises:
            ScoringError: Another process is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(values, value)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error inside on one process ends the block on all of them with an error, so that none waits for it.

        Raises:
            ScoringError: Another process failed; the message says which and why.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            if not isinstance(error, _Lost):
                self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather(None)):
            if failure is not None:
                raise ScoringError(f"process {rank} of {self.size} failed: {failure}")

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse processes that were not started alike.

        Raises:
            ArgumentError: Some fact differs; names it and the process.
        """
        for rank, other in enumerate(self.gather(dict(facts))):
            for name, value in facts.items():
                if other.get(name) != value:
                    raise ArgumentError(
                        f"process {rank} has another {name} than process {self.rank}: {other.get(name)!r} and "
                        f"{value!r}; start all of them with the same model, data and settings"
                    )

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise _Lost(
                f"process {self.rank} of {self.size} lost the connection to another one, which has probably ended: "
                f"{error}"
            ) from error


class _Lost(ScoringError):
    """A collective operation failed: nobody is left to tell."""
