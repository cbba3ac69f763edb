"""The weights of a checkpoint folder, in memory only while they are needed.

A group of weights is read when it is needed, or one step ahead while the step before it computes, and is dropped
afterwards. Parameters outside all groups (norms, position tables) are small and stay in memory.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastprune.checkpoint.shards import DTYPES, read_elements
from fastprune.checkpoint.skeleton import Recipe, skeleton
from fastprune.model.fingerprint import fingerprint_of_samples, sample_positions
from fastprune.model.matrices import decoder_blocks
from fastprune.model.vocabulary import input_embedding
from fastprune.model.weights import EMBEDDING, HEAD, Group, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class _Parameter:
    """One parameter of a streamed model: its places in the modules (several if it is tied), and its current users."""

    recipe: Recipe
    places: list[tuple[nn.Module, str]]
    users: int = 0
    loading: Future | None = None
    meta: dict[tuple[int, str], nn.Parameter] = field(default_factory=dict)


class Streamed(Weights):
    """The weights of a checkpoint folder, in memory only while they are needed.

    Args:
        folder: Checkpoint folder.
        device: Device on which the model runs.
        dtype: Dtype of the weights; ``None`` takes that of the config, see
            :func:`fastprune.checkpoint.skeleton.skeleton`.

    Attributes:
        model: The model; its parameters are on the meta device while they are not held.

    Raises:
        NotFoundError, ArtifactError, ModelError: As :func:`fastprune.checkpoint.skeleton.skeleton`.
    """

    streamed = True

    def __init__(self, folder: str | Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.folder, self._device = Path(folder), device
        self.model, recipes, self._stored = skeleton(folder, dtype)
        self._groups: dict[Group, list[_Parameter]] = {}
        self._reserved: list[_Parameter] = []
        # One reader: groups arrive in the order of the requests, and a disk is read from front to back.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fastprune-read")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sort(recipes)

    @property
    def device(self) -> torch.device:
        """The device on which the model runs."""
        return self._device

    def _sort(self, recipes: dict[str, Recipe]) -> None:
        """Sort parameters into groups; load at once those that belong to none."""
        model = self.model
        prefix = decoder_blocks(model)[0] + "."
        embedding, head = input_embedding(model), cast("PreTrainedModel", model).get_output_embeddings()
        by_identity: dict[int, _Parameter] = {}
        groups_of: dict[int, set[Group]] = {}
        recipe_of = {
            id(tensor): recipes[name] for name, tensor in model.state_dict(keep_vars=True).items() if name in recipes
        }
        for path, module in model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                entry = by_identity.setdefault(id(parameter), _Parameter(recipe_of[id(parameter)], []))
                entry.places.append((module, name))
                entry.meta[id(module), name] = parameter
                groups = groups_of.setdefault(id(parameter), set())
                if f"{path}.".startswith(prefix):
                    groups.add(int(path.removeprefix(prefix).split(".")[0]))
                elif module is embedding:
                    groups.add(EMBEDDING)
                elif module is head:
                    groups.add(HEAD)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    recipe = recipe_of.get(id(buffer))
                    module._buffers[name] = (recipe.read(model) if recipe else buffer).to(self.device)
        for key, entry in by_identity.items():
            for group in groups_of[key]:
                self._groups.setdefault(group, []).append(entry)
            if not groups_of[key]:
                self._place(entry, *self._read(entry.recipe))

    @contextlib.contextmanager
    def held(self, groups: Iterable[Group], then: Iterable[Group] = ()) -> Iterator[None]:
        """Have some groups in memory for the length of a ``with`` block.

        Args:
            groups: The groups.
            then: Groups that the next call will need: read while this block runs, or kept if they are in memory.

        Raises:
            ArtifactError: A shard cannot be read.
        """
        needed = self._of(groups)
        before, self._reserved = self._reserved, []
        try:
            self._want(needed)
            self._reserved = self._of(then)
            self._want(self._reserved)
            self._drop(before)
            before = []
            for entry in needed:
                assert entry.loading is not None  # wanted above
                self._place(entry, *entry.loading.result())
            yield
        finally:
            self._drop([*before, *needed])

    def identity(self) -> str:
        """A hash of samples of every tensor on disk, which differs between checkpoints."""
        floats = {name: stored for name, stored in self._stored.items() if stored.dtype in DTYPES}
        return fingerprint_of_samples(
            {
                name: (stored.shape, read_elements(stored, sample_positions(stored.numel)))
                for name, stored in floats.items()
            }
        )

    def files(self) -> list[list[Any]]:
        """Name, size and time of change of each shard, which show a patch even if no sample does."""
        found = [(shard.name, shard.stat()) for shard in sorted({stored.path for stored in self._stored.values()})]
        return [[name, status.st_size, status.st_mtime_ns] for name, status in found]

    def close(self) -> None:
        """Drop all weights and end the reading thread."""
        self._drop(self._reserved)
        self._reserved = []
        self._reader.shutdown(cancel_futures=True)

    def _of(self, groups: Iterable[Group]) -> list[_Parameter]:
        return [entry for group in groups for entry in self._groups.get(group, ())]

    def _want(self, entries: Sequence[_Parameter]) -> None:
        for entry in entries:
            entry.users += 1
            if entry.loading is None:
                entry.loading = self._reader.submit(self._read, entry.recipe)

    def _read(self, recipe: Recipe) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """The tensor on the device, and the event that a stream has to wait for before it uses the tensor."""
        if self._stream is None:
            return recipe.read(self.model).to(self.device), None
        with torch.cuda.stream(self._stream):
            tensor = recipe.read(self.model, pinned=True).pin_memory()  # no copy if it was read into pinned memory
            # Without waiting: the next tensor is read while this one is copied. Its pinned memory may be freed at once,
            # as torch's allocator reuses it only after the copies from it are done.
            return tensor.to(self.device, non_blocking=True), self._stream.record_event()

    def _drop(self, entries: Sequence[_Parameter]) -> None:
        dropped = False
        for entry in entries:
            entry.users -= 1
            if entry.users == 0 and entry.loading is not None:
                dropped = True
                entry.loading.cancel()
                entry.loading = None
                for module, name in entry.places:
                    module._parameters[name] = entry.meta[id(module), name]
        if dropped:
            _return_freed_memory()

    def _place(self, entry: _Parameter, tensor: torch.Tensor, sent: torch.cuda.Event | None) -> None:
        if sent is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            # Keeps the allocator from giving its memory to the reader while work that uses it is still queued.
            tensor.record_stream(current)
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, name in entry.places:
            module._parameters[name] = parameter


def _return_freed_memory() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of up to 32 MiB in each thread's pool: weights that the reading thread allocates and the
    main thread frees would add up from segment to segment (160 MiB over four segments of a 0.3 B model). Other C
    libraries have no such call, and keep no such pools.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
