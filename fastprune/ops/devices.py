"""Devices on which a model can run."""

from __future__ import annotations

import torch

from fastprune.errors import ArgumentError


def usable_device(device: str | torch.device, kinds: tuple[str, ...] = ("cpu", "cuda")) -> torch.device:
    """The device of this name, if it is present and supported.

    By default CPU and CUDA only: scoring needs float64, which Apple's GPUs lack, and ``meta`` holds no values.

    Raises:
        ArgumentError: The device is of another kind, or is not present.
    """
    try:
        found = torch.device(device)
        if found.type in kinds:
            torch.empty(0, device=found)
            return found
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ArgumentError(f"{str(device)!r} cannot be used: {error}", argument="device") from error
    raise ArgumentError(f"expected {', '.join(kinds)} or one such as cuda:1, got {str(device)!r}", argument="device")
