"""The weights of a model that are pruned, as a value: flat indices per matrix, set algebra, one file.

In: indices and the shapes of their matrices. Out: a mapping that can be compared, combined, saved, and applied to a
model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from fastprune.artifact import read_artifact, write_artifact
from fastprune.calibration.leakage import merged_calibration
from fastprune.errors import ArgumentError, ArtifactError, MaskError
from fastprune.masking.apply import Undo, applied, apply_indices_
from fastprune.masking.storable import merged
from fastprune.ops.memory import check_held


class PruneMask(Mapping[str, torch.Tensor]):
    """Parameter name to the flat indices of its pruned weights (int64, ascending); every eligible matrix is a key.

    One expert of a fused tensor has the name of the tensor and its number: ``….experts.down_proj[3]``.

    Args:
        indices: Name to row-major flat indices in the stored layout.
        shapes: Name to the shape of the matrix; the same names.
        metadata: Values that JSON can hold; ``fingerprint`` is that of the model the mask was made for.
        nominal: Number of weights that were requested, before any were protected; by default the total.

    Raises:
        MaskError: Names differ, or indices are not int64, ascending, unique and inside the matrix.
    """

    def __init__(
        self,
        indices: Mapping[str, torch.Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        metadata: Mapping[str, Any] | None = None,
        nominal: int | None = None,
    ) -> None:
        for argument, given in (
            ("indices", indices),
            ("shapes", shapes),
            ("metadata", {} if metadata is None else metadata),
        ):
            if not isinstance(given, Mapping):
                raise MaskError(f"expected a mapping, got {type(given).__name__}", argument=argument)
        if set(indices) != set(shapes):
            unmatched = sorted(set(indices) ^ set(shapes), key=str)
            raise MaskError(
                f"indices and shapes: expected the same matrices in both, got these in one alone: {unmatched[:3]}"
            )
        self.shapes: dict[str, tuple[int, ...]] = {name: _checked_shape(name, shape) for name, shape in shapes.items()}
        self._indices = _checked(indices, self.shapes)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.nominal: int = self.total if nominal is None else _whole_number("nominal", nominal)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def counts(self) -> dict[str, int]:
        """Pruned weights of each matrix."""
        return {name: len(indices) for name, indices in self._indices.items()}

    @property
    def total(self) -> int:
        """Pruned weights in all."""
        return sum(map(len, self._indices.values()))

    def density(self, model: torch.nn.Module) -> float:
        """Pruned weights as a fraction of all parameters of the model, embeddings included.

        Raises:
            ArgumentError: It is no module, or one without parameters.
        """
        size = sum(p.numel() for p in model.parameters()) if isinstance(model, torch.nn.Module) else 0
        if not size:
            raise ArgumentError(
                f"expected a torch.nn.Module with parameters, got {type(model).__name__}", argument="model"
            )
        return self.total / size

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shapes and indices, metadata left out; the name of this mask in the metadata of others."""
        digest = hashlib.sha256()
        for name in sorted(self._indices):
            digest.update(json.dumps([name, self.shapes[name], len(self._indices[name])]).encode())
            digest.update(self._indices[name].numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def applied(
        self, model: torch.nn.Module, scale: float = 0.0, strict: bool = True
    ) -> AbstractContextManager[torch.nn.Module]:
        """Prune inside a ``with`` block; on leaving, also by an exception, the old values are restored bit by bit.

        Arguments and errors are those of :meth:`apply_`. The block gets the model.

        Raises:
            MaskError: On leaving, if the old values do not fit any more: the block has cast the model, or left another
                mask on it. The mask is then still on the model; ``error.undo.restore_`` takes it off once they fit.
        """
        return applied(model, self, self.shapes, scale, self._expected(strict))

    def apply_(self, model: torch.nn.Module, scale: float = 0.0, strict: bool = True) -> Undo:
        """Multiply the weights of the mask by ``scale`` in place; 0 writes +0.

        Args:
            model: Any module with parameters of these names and shapes; compiled models too.
            scale: Finite factor.
            strict: Refuse a model with another fingerprint than the mask's. Shapes have to fit in any case.

        Returns:
            An undo, whose :meth:`Undo.restore_` restores the old values bit by bit.

        Raises:
            MaskError: A matrix is missing or of another shape, or the model is not the one of the mask.
            ModelError: A weight is on the meta device, sharded, or not of a float type.
            ArgumentError: ``scale`` is not finite.
        """
        return apply_indices_(model, self, self.shapes, scale, self._expected(strict))

    def _expected(self, strict: bool) -> str | None:
        return self.metadata.get("fingerprint") if strict else None

    def __and__(self, other: PruneMask) -> PruneMask:
        return self._combine(other, "and", lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def __or__(self, other: PruneMask) -> PruneMask:
        return self._combine(other, "or", lambda a, b: torch.cat([a, b]).unique())

    def __sub__(self, other: PruneMask) -> PruneMask:
        return self._combine(other, "sub", lambda a, b: a[torch.isin(a, b, assume_unique=True, invert=True)])

    def jaccard(self, other: PruneMask) -> float:
        """Size of the intersection over size of the union; 1 for two empty masks.

        Raises:
            MaskError: The masks have other shapes.
        """
        self.check_shapes(other)
        both = sum(int(torch.isin(a, other[name], assume_unique=True).sum()) for name, a in self.items())
        either = self.total + other.total - both
        return both / either if either else 1.0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruneMask):
            return NotImplemented
        return self.shapes == other.shapes and all(torch.equal(a, other[name]) for name, a in self.items())

    __hash__ = None  # type: ignore[assignment]  # metadata can change

    def check_shapes(self, other: PruneMask) -> None:
        """Raise MaskError unless the other mask is over the same matrices with the same shapes."""
        if not isinstance(other, PruneMask):
            raise MaskError(f"expected a PruneMask, got {type(other).__name__}", argument="other")
        if self.shapes != other.shapes:
            names = [n for n in {**self.shapes, **other.shapes} if self.shapes.get(n) != other.shapes.get(n)]
            ours, theirs = self.shapes.get(names[0]), other.shapes.get(names[0])
            raise MaskError(
                f"expected a mask over the same matrices, got one in which shapes differ: {names[0]} has the "
                f"shape {ours} in one and {theirs} in the other",
                argument="other",
            )

    def _combine(self, other: PruneMask, operation: str, combine: Callable[..., torch.Tensor]) -> PruneMask:
        self.check_shapes(other)
        metadata: dict[str, Any] = {"kind": "algebra", "operation": operation, "parents": [self.digest, other.digest]}
        for key in ("model", "fingerprint"):
            if key in self.metadata and self.metadata[key] == other.metadata.get(key):
                metadata[key] = self.metadata[key]
        if sources := merged((self.metadata, other.metadata)):
            metadata["origins"] = sources
        if calibration := merged_calibration((self.metadata, other.metadata)):
            metadata["calibration"] = calibration
        return PruneMask({name: combine(a, other[name]) for name, a in self.items()}, self.shapes, metadata)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: a tensor of indices per matrix, everything else as JSON in its metadata.

        Raises:
            NotFoundError: The folder does not exist.
            ArtifactError: JSON cannot hold the metadata.
        """
        content = {"shapes": self.shapes, "nominal": self.nominal, "metadata": self.metadata}
        return write_artifact(path, "mask", self._indices, content)

    @classmethod
    def load(cls, path: str | Path) -> PruneMask:
        """Read a file of :meth:`save`.

        Raises:
            NotFoundError: There is no such file.
            ArtifactError: The file is truncated, foreign, of another kind or version, or its contents were changed.
        """
        tensors, content = read_artifact(path, "mask")
        try:
            return cls(tensors, content["shapes"], content["metadata"], content["nominal"])
        except (KeyError, TypeError, AttributeError, MaskError) as error:
            raise ArtifactError(f"{path}: this mask file is damaged ({error})") from error

    def __repr__(self) -> str:
        size = sum(math.prod(shape) for shape in self.shapes.values())
        share = f"{self.total / size:.3g}" if size else "0"
        return (
            f"PruneMask({self.total} of {size} weights ({share}) in {len(self)} matrices, nominal {self.nominal}, "
            f"kind {self.metadata.get('kind')!r})"
        )


def _checked_shape(name: object, shape: object) -> tuple[int, ...]:
    if not isinstance(name, str):
        raise MaskError(f"expected names of parameters, got {name!r}", argument="shapes")
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise MaskError(f"{name}: expected a shape, a tuple of integers, got {shape!r}")
    return tuple(_whole_number(f"{name}: shape", size) for size in shape)


def _whole_number(argument: str, value: object) -> int:
    """An integer of 0 or more, also of NumPy, as an ``int`` that can be written as JSON."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise MaskError(f"expected an integer of 0 or more, got {value!r}", argument=argument)
    return int(value)


def _checked(indices: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    checked = {}
    for name, shape in shapes.items():
        given = indices[name]
        if not isinstance(given, torch.Tensor):
            raise MaskError(f"{name}: indices: expected a 1-D int64 tensor, got {type(given).__name__}")
        try:
            check_held("indices", given)
        except ArgumentError as error:
            raise MaskError(f"{name}: {error}") from None
        if given.dtype != torch.int64 or given.ndim != 1:
            raise MaskError(f"{name}: indices: expected a 1-D int64 tensor, got {given.dtype} {tuple(given.shape)}")
        checked[name] = given.detach().clone(memory_format=torch.contiguous_format).cpu()  # never the caller's own
        array, numel = checked[name].numpy(), math.prod(shape)
        if len(array) and (array[0] < 0 or array[-1] >= numel or (array[1:] <= array[:-1]).any()):
            raise MaskError(
                f"{name}: indices: expected ascending, unique ones in [0, {numel}) for the shape {shape}, got others"
            )
    return checked
