"""Where the weights of a part of the model come from while it is needed.

In: a model in memory, or a checkpoint folder. Out: an object whose ``held`` context makes sure that some groups of
weights are there: ``"embedding"``, ``"head"``, and blocks by their index. :class:`Resident` has everything at all
times; :class:`fastprune.checkpoint.streamed.Streamed` reads groups as they are needed.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastprune.model.anatomy import Anatomy
from fastprune.model.identity import identity_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
        """The model taken apart, when it is first asked for.

        Raises:
            ModelError: It holds weights that cannot be scored.
        """
        return Anatomy.of(self.model, allow_meta=self.streamed)

    @property
    @abc.abstractmethod
    def device(self) -> torch.device:
        """Where token ids go."""

    @abc.abstractmethod
    def held(self, groups: Iterable[Group], then: Iterable[Group] = ()) -> AbstractContextManager[None]:
        """Have some groups in memory for the length of a ``with`` block; ``then`` is what the next call will need."""

    @abc.abstractmethod
    def identity(self) -> str:
        """A hash over the weights; tells a model from another one."""

    def files(self) -> list[list[Any]]:
        """Name, size and time of change of each file that is read."""
        return []

    def close(self) -> None:  # noqa: B027 -- nothing to do for a model in memory
        """Drop what is still in memory."""


class Resident(Weights):
    """The weights of a model in memory; its input embedding's device is where token ids go."""

    streamed = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        embedding = cast("PreTrainedModel", self.model).get_input_embeddings()
        return cast(torch.Tensor, embedding.weight).device

    def held(self, groups: Iterable[Group], then: Iterable[Group] = ()) -> AbstractContextManager[None]:
        """All are there at all times."""
        return contextlib.nullcontext()

    def identity(self) -> str:
        """A hash over all that the model holds, each bit of which counts; tells a model from a pruned one."""
        return identity_of(self.model)
