"""Weights of a mask written in place, and restored bit by bit.

In: a model, and the indices and shapes of its matrices. Out: the changed model and an :class:`Undo`. All old values are
read before anything is written, so that an error or an interrupt at any point leaves the model as it was. The masks on
a model are remembered as long as it lives: a mask that was made for the model fits it while others are applied.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastprune import ops
from fastprune.errors import ArgumentError, FastpruneError, MaskError, ModelError
from fastprune.model.adapters import check_unmerged, plain_name, unwrap
from fastprune.model.fingerprint import Overlay, fingerprint, other_fingerprint
from fastprune.model.frozen import uninterrupted
from fastprune.model.supported import check_stored
from fastprune.ops.validate import FLOAT_DTYPES, checked_scale

Indices = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

# model -> its live undo records, oldest first
_live: weakref.WeakKeyDictionary[torch.nn.Module, list[Undo]] = weakref.WeakKeyDictionary()


class Undo:
    """The values that a mask replaced in one model; returned by :meth:`PruneMask.apply_`. It keeps no model alive."""

    def __init__(self, model: torch.nn.Module, indices: Indices, weights: Mapping[str, torch.Tensor]) -> None:
        self._model = weakref.ref(model)
        touched = {name: weight for name, weight in weights.items() if len(indices[name])}
        self._shapes = {name: tuple(weight.shape) for name, weight in touched.items()}
        self._indices = {name: indices[name].to(weight.device) for name, weight in touched.items()}
        self._old = {name: weight.take(self._indices[name]) for name, weight in touched.items()}

    def restore_(self, model: torch.nn.Module) -> None:
        """Restore the old values bit by bit, NaN payloads and -0 included.

        Args:
            model: The model that the mask was applied to. It may have been moved to another device since.

        Raises:
            MaskError: The model is another one or has other shapes or dtypes now, the mask was restored before, or a
                mask applied later has weights in common and has to be restored first. Nothing is written then.
        """
        model = unwrap(model)
        if self._model() is not model:
            raise MaskError("expected the model that the mask was applied to, got another one", argument="model")
        if not self.live:
            raise MaskError("this mask is not on the model any more; an undo works once")
        records = _live[model]
        for later in records[records.index(self) + 1 :]:
            for name in self._indices.keys() & later._indices.keys():
                if torch.isin(self._indices[name], later._indices[name].to(self._indices[name].device)).any():
                    raise MaskError(f"a mask applied later also changes {name}; restore that one first")
        weights = matrices_of(model, self._shapes)
        for name, weight in weights.items():
            if weight.dtype != self._old[name].dtype:
                raise MaskError(
                    f"{name} is {weight.dtype} now and was {self._old[name].dtype} when the mask was applied"
                )
        self._write_back(weights)
        records.remove(self)

    @property
    def live(self) -> bool:
        """Whether the mask is on the model."""
        model = self._model()
        return model is not None and self in _live.get(model, [])

    def overlay(self) -> Overlay:
        """The replaced values, for the fingerprint of the model without the mask."""
        return {name: (self._indices[name], old) for name, old in self._old.items()}

    def write_(self, weights: Mapping[str, torch.Tensor], scale: float) -> None:
        """Apply the mask wholly or not at all: an error or an interrupt on the way restores the old values."""
        model = self._model()
        assert model is not None  # the caller holds it
        records = _live.setdefault(model, [])
        records.append(self)
        try:
            ops.apply_sparse_each_({name: weights[name] for name in self._indices}, self._indices, scale)
        except FastpruneError:  # raised before anything is written
            records.remove(self)
            raise
        except BaseException:
            self._write_back({name: weights[name] for name in self._indices})
            records.remove(self)
            raise

    def _write_back(self, weights: Mapping[str, torch.Tensor]) -> None:
        indices, old = (
            {name: values[name].to(weight.device) for name, weight in weights.items()}
            for values in (self._indices, self._old)
        )
        ops.restore_sparse_each_(weights, indices, old)


def apply_indices_(
    model: torch.nn.Module, indices: Indices, shapes: Shapes, scale: float, expected: str | None
) -> Undo:
    """Scale some weights of each matrix in place; see :meth:`PruneMask.apply_`.

    Args:
        model: The model.
        indices: Name of each matrix to the flat indices of its weights.
        shapes: Name to the shape that the matrix must have; the same names.
        scale: Factor for the weights.
        expected: The fingerprint that the model must have; ``None`` takes any.
    """
    scale = checked_scale(scale)
    weights, undo = _prepare(model, indices, shapes, expected)
    undo.write_(weights, scale)
    return undo


@contextmanager
def applied(
    model: torch.nn.Module, indices: Indices, shapes: Shapes, scale: float, expected: str | None
) -> Iterator[torch.nn.Module]:
    """As :func:`apply_indices_`, for the length of a context; see :meth:`PruneMask.applied`."""
    scale = checked_scale(scale)
    weights, undo = _prepare(model, indices, shapes, expected)
    try:
        undo.write_(weights, scale)
        yield model
    finally:
        if undo.live:
            try:
                with uninterrupted():  # a second Ctrl-C may come while the first one takes the mask off
                    undo.restore_(model)
            except (MaskError, ModelError) as error:
                error.undo = undo
                error.add_note("the mask is still on the model; this error's attribute `undo` holds the old values")
                raise


def _prepare(
    model: torch.nn.Module, indices: Indices, shapes: Shapes, expected: str | None
) -> tuple[dict[str, torch.Tensor], Undo]:
    """Check the model before anything is written."""
    model = unwrap(model)
    weights = matrices_of(model, shapes)
    if expected is not None and expected not in (known := _fingerprints(model, weights)):
        raise other_fingerprint(str(expected), known[0], "this one")
    return weights, Undo(model, indices, weights)


def matrices_of(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights that a mask names, as detached views that can be written.

    Args:
        model: Any module.
        shapes: Name (``parameter`` or ``parameter[expert]``) to the shape it must have.

    Raises:
        MaskError: A parameter is missing or of another shape.
        ModelError: A parameter is on the meta device, expanded, sharded, not of a float type, or formed anew in each
            forward (pruned by torch, parametrized); or an adapter is merged.
        ArgumentError: It is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(
            f"expected a torch.nn.Module, got {type(model).__name__}; patch_checkpoint takes folders", argument="model"
        )
    check_unmerged(model)
    parameters = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in shapes if split_name(name)[0] not in parameters]
    if missing:
        _check_stored(model, missing)
        raise MaskError(
            f"the model lacks {len(missing)} of the {len(shapes)} matrices of the mask, the first is {missing[0]}"
        )
    found = {}
    for name, shape in shapes.items():
        base, expert = split_name(name)
        weight = parameters[base].detach()
        if expert is not None:
            if weight.ndim < 2 or expert >= len(weight):
                raise MaskError(f"{base} has the shape {tuple(weight.shape)} in the model, so there is no {name}")
            weight = weight[expert]
        if tuple(weight.shape) != tuple(shape):
            raise MaskError(f"{name} has the shape {tuple(weight.shape)} in the model and {tuple(shape)} in the mask")
        if weight.is_meta:
            raise ModelError(f"{name} is on the meta device (not loaded, or offloaded); load the whole model first")
        if type(weight) is not torch.Tensor or weight.dtype not in FLOAT_DTYPES:
            raise ModelError(f"{name}: expected a plain float tensor, got {type(weight).__name__} of {weight.dtype}")
        if any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)):
            raise ModelError(f"{name} is an expanded tensor, several of its weights are one; call .contiguous() on it")
        found[name] = weight
    return found


def _check_stored(model: torch.nn.Module, names: list[str]) -> None:
    """Raise ModelError if a module forms one of these parameters anew in each forward."""
    modules = {plain_name(path): module for path, module in model.named_modules()}
    for name in names:
        path, _, attribute = split_name(name)[0].rpartition(".")
        # The attribute is not read: forming the weight may change the module's state.
        if path in modules and (attribute in vars(modules[path]) or hasattr(type(modules[path]), attribute)):
            check_stored(modules[path], attribute, name)


def split_name(name: str) -> tuple[str, int | None]:
    """``"a.down_proj[3]"`` is expert 3 of the fused tensor ``a.down_proj``; other names are whole parameters."""
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def original_fingerprint(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """Fingerprint of the model without the masks that are on it."""
    return _fingerprints(unwrap(model), weights)[-1]


def original_weight(model: torch.nn.Module, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A matrix without the masks that are on the model; a copy if one of them changes it, otherwise ``weight`` itself.

    Args:
        model: The model.
        name: Name of the matrix, as in a mask.
        weight: The matrix as :func:`matrices_of` gives it; it is only read.
    """
    overlays = [overlay for undo in reversed(_live.get(unwrap(model), [])) if name in (overlay := undo.overlay())]
    if overlays:
        weight = weight.clone()
    for overlay in overlays:  # the latest first: the values that the oldest replaced are the original ones
        indices, old = overlay[name]
        ops.restore_sparse_(weight, indices.to(weight.device), old.to(weight))
    return weight


def _fingerprints(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Of the model as it is, without the latest mask, without the latest two, …; a mask may be made for any of them."""
    overlays = [undo.overlay() for undo in reversed(_live.get(model, []))]
    return [fingerprint(weights, overlays[:depth]) for depth in range(len(overlays) + 1)]
