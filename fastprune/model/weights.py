"""Access to the weights of parts of a model.

In: a model in memory, or a checkpoint folder. Out: an object whose ``held`` context has some groups of weights in
memory: ``"embedding"``, ``"head"``, and blocks by their index. :class:`Resident` has all of them at all times;
:class:`fastprune.checkpoint.streamed.Streamed` reads groups as they are needed.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fastprune.model.anatomy import Anatomy
from fastprune.model.identity import identity_of
from fastprune.model.vocabulary import input_embedding

Group = int | str
EMBEDDING, HEAD = "embedding", "head"


class Weights(abc.ABC):
    """The weights of one model.

    Attributes:
        model: The model; parameters that are not held may be on the meta device.
        streamed: Whether weights are in memory only while they are held.
    """

    model: nn.Module
    streamed: bool

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The parts of the model, formed at the first access.

        Raises:
            ModelError: The model holds weights that cannot be scored.
        """
        return Anatomy.of(self.model, allow_meta=self.streamed)

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """The device of token ids."""

    @abc.abstractmethod
    def held(self, groups: Iterable[Group], then: Iterable[Group] = ()) -> AbstractContextManager[None]:
        """Have some groups in memory for the length of a ``with`` block; ``then`` are those of the next call."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A hash over the weights, which differs between models."""

    def files(self) -> list[list[Any]]:
        """Name, size and time of change of each file that is read."""
        return []

    def close(self) -> None:  # noqa: B027 -- nothing to do for a model in memory
        """Free the weights."""


class Resident(Weights):
    """The weights of a model in memory; token ids go to the device of its input embedding."""

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return input_embedding(self.model).weight.device

    def held(self, groups: Iterable[Group], then: Iterable[Group] = ()) -> AbstractContextManager[None]:
        """All groups are in memory at all times."""
        return contextlib.nullcontext()

    def identity(self) -> str:
        """A hash over every bit that the model holds, which differs between a model and a pruned one."""
        return identity_of(self.model)
