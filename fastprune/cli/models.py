"""A model in memory, for the commands that need all of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastprune.cli.app import quiet_loading
from fastprune.errors import ArgumentError

if TYPE_CHECKING:
    from torch.nn import Module

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def loaded_model(folder: Path, device: str | None, dtype: str) -> Module:
    """The model of a checkpoint folder on a device.

    Args:
        folder: The checkpoint.
        device: Its name; ``None``: a GPU if there is one.
        dtype: Of the weights, one of ``auto``, ``float32``, ``bfloat16`` and ``float16``.

    Raises:
        ArgumentError: The dtype is unknown, or the device cannot be used or cannot hold the model.
    """
    if dtype not in _DTYPES:
        raise ArgumentError(f"expected one of {', '.join(_DTYPES)}, got {dtype!r}", argument="dtype")
    import torch

    from fastprune.checkpoint.load import load_model
    from fastprune.ops.devices import usable_device

    quiet_loading()
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), ("cpu", "cuda", "mps"))
    model = load_model(folder, dtype if dtype == "auto" else getattr(torch, dtype))
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"{str(place)!r} cannot hold the model: {error}", argument="device") from error
