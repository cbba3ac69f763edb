"""Selects the backend of a call, or gives the reason why a backend cannot serve it.

In: the name of an operation, the requested backend (or none), and the tensors. Out: a name of :data:`BACKENDS`, or an
error with the reason. A backend's packages are imported on first use: ``import fastprune`` imports neither triton nor
an extension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable

import torch
from torch import Tensor

from fastprune.errors import ArgumentError, BackendError

BACKENDS = ("torch", "cpp", "triton", "cuda")

_SUMS = {
    "accumulate_grad_sum",
    "accumulate_grad_abs_sum",
    "accumulate_grad_sq_sum",
    "accumulate_gradients",
    "accumulate_act_sq_sum",
}
_SELECTION = {"top_scores", "apply_sparse_", "restore_sparse_"}
_OPERATIONS = {"torch": _SUMS | _SELECTION, "cpp": _SUMS | _SELECTION, "triton": _SUMS, "cuda": _SELECTION}
_PREFERRED = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}  # else plain torch

_ABSENT = "not built or cannot be loaded"
_OLDEST = (8, 0)  # compute capability of an A100: bfloat16 in tensor cores, asynchronous copies


@functools.cache
def status(backend: str) -> str:
    """``"available"``, or the reason why the backend cannot be used in this process."""
    match backend:
        case "cpp":
            try:
                importlib.import_module("fastprune._cpp")
            except ImportError as error:
                return f"the C++ extension was {_ABSENT} ({error}); installing with a compiler builds it"
        case "triton":
            try:
                from fastprune.ops import triton
            except ImportError as error:
                return f"triton is not installed or cannot be loaded ({error}); torch for CUDA on Linux brings it"
            return "available" if triton.INTERPRETED else _devices()
        case "cuda":
            try:
                importlib.import_module("fastprune._cuda")
            except ImportError as error:
                return f"the CUDA extension was {_ABSENT} ({error}); installing with nvcc on PATH builds it"
            return _devices()
    return "available"


def refusal(backend: str, operation: str, tensors: Iterable[Tensor]) -> str | None:
    """Why a backend cannot serve a call; ``None`` if it can.

    Args:
        backend: One of :data:`BACKENDS`.
        operation: Name of a function of :mod:`fastprune.ops`.
        tensors: Accumulator and inputs, or the weight, as :mod:`fastprune.ops.validate` returns them; on one device.
    """
    if operation not in _OPERATIONS[backend]:
        others = [name for name in BACKENDS if operation in _OPERATIONS[name]]
        return f"has no {operation}; there are {', '.join(others)}"
    if (reason := status(backend)) != "available":
        return f"is not available: {reason}"
    tensors = list(tensors)
    device = tensors[0].device
    match backend:
        case "cpp" if device.type != "cpu":
            return f"works on CPU tensors, got one on {device}"
        case "triton":
            from fastprune.ops import triton

            return _wrong_device(device, interpreted=triton.INTERPRETED) or triton.refusal(operation, *tensors)
        case "cuda":
            if operation == "top_scores" and tensors[0].numel() >= 1 << 32:
                return f"selects from matrices of fewer than 2^32 weights, got one of {tensors[0].numel()}"
            return _wrong_device(device)
    return None


def choose(backend: str | None, operation: str, *tensors: Tensor) -> str:
    """The backend that serves a call: the requested one, else the best available.

    Raises:
        ArgumentError: ``backend`` is not one of :data:`BACKENDS`.
        BackendError: The named backend cannot serve; the message says why.
    """
    if backend is None:
        candidates = _PREFERRED.get(tensors[0].device.type, ())
        return next((name for name in candidates if refusal(name, operation, tensors) is None), "torch")
    check_name(backend)
    if reason := refusal(backend, operation, tensors):
        raise BackendError(f"backend {backend!r} {reason}")
    return backend


def check_serves(backend: str | None, operations: Iterable[str]) -> None:
    """Raise early what a call would raise: a named backend is not available, or lacks one of the operations."""
    if backend is None:
        return
    check_name(backend)
    for operation in operations:
        if operation not in _OPERATIONS[backend]:
            raise BackendError(f"backend {backend!r} {refusal(backend, operation, ())}; None takes the best for each")
    if (reason := status(backend)) != "available":
        raise BackendError(f"backend {backend!r} is not available: {reason}")


def check_name(backend: str) -> None:
    """Raise ArgumentError unless ``backend`` is one of :data:`BACKENDS`."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ArgumentError(f"expected one of {', '.join(BACKENDS)} or None, got {backend!r}", argument="backend")


def _devices() -> str:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    if all(map(_too_old, range(torch.cuda.device_count()))):
        return f"no CUDA device of compute capability {_OLDEST[0]}.{_OLDEST[1]} or higher"
    return "available"


@functools.cache
def _too_old(device: int) -> bool:
    return torch.cuda.get_device_capability(device) < _OLDEST


def _wrong_device(device: torch.device, *, interpreted: bool = False) -> str | None:
    if interpreted:
        return None if device.type == "cpu" else f"is interpreted and works on CPU tensors, got one on {device}"
    if device.type != "cuda":
        return f"works on CUDA tensors, got one on {device}"
    if _too_old(device.index):
        return f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]} or higher, {device} has less"
    return None
