"""A model in memory, for the commands that need all of it, and the masks that are measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import fastprune
from fastprune.cli.app import quiet_loading
from fastprune.errors import ArgumentError

if TYPE_CHECKING:
    from torch.nn import Module

    from fastprune.masking import PruneMask

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def loaded_model(folder: Path, device: str | None, dtype: str, device_map: str | None = None) -> Module:
    """The model of a checkpoint folder on a device, or on all GPUs of a node.

    Args:
        folder: The checkpoint.
        device: Its name; ``None``: a GPU if there is one.
        dtype: Of the weights, one of ``auto``, ``float32``, ``bfloat16`` and ``float16``.
        device_map: As of :func:`fastprune.checkpoint.load.load_model`; instead of a device.

    Raises:
        ArgumentError: The dtype is unknown, or the device cannot be used or cannot hold the model.
        ModelError: The GPUs cannot hold the model.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"expected one of {', '.join(_DTYPES)}, got {dtype!r}", argument="dtype")
    import torch

    from fastprune.checkpoint.load import load_model
    from fastprune.ops.devices import usable_device

    quiet_loading()
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    if device_map is not None:
        return load_model(folder, kind, device_map)
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), ("cpu", "cuda", "mps"))
    model = load_model(folder, kind)
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"{str(place)!r} cannot hold the model: {error}", argument="device") from error


def named_masks(paths: Sequence[Path]) -> dict[str, PruneMask]:
    """The masks by the names of their files without ending, which is what records and stores call them.

    Raises:
        ArgumentError: Two have one name, or one has that of the unpruned model.
    """
    names = [path.stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        if name == "none":
            raise ArgumentError(f'"none" is what the report calls the unpruned model; rename {path}', argument="mask")
        if names.count(name) > 1:
            raise ArgumentError(
                f"two of the mask files have the same name, {name}, so their rows could not be told apart",
                argument="mask",
            )
    return {name: fastprune.PruneMask.load(path) for name, path in zip(names, paths, strict=True)}
