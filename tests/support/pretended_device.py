"""A CUDA device that is none: tensors that say they lie on one, and refuse to be mixed with those that do not.

They are computed with on the CPU, by the emulated extension and interpreted Triton kernels where the library calls
them. So everything around the kernels runs as on a device: which backend is chosen, where each tensor is made and
moved, what is copied, which of torch.cuda's functions are called with what. What is sent from pinned memory within a
stream is not there before its event is waited for. What a device does not do, nothing here can tell: whether copies
overlap, how much memory there is.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

from fastprune.checkpoint.streamed import Streamed
from fastprune.masking import apply
from fastprune.ops import dispatch, memory, reference, triton

aten = torch.ops.aten
# What may see the CPU's tensors beside a device's: copies, and indices. Concatenation may because the backward pass of
# a split fills up with zeros that autograd makes itself, and on a device makes there.
_MIXED = (aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.cat.default)


class DeviceTensor(Tensor):
    """A tensor on the pretended device; what it holds is in a tensor of the CPU, ``held``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> DeviceTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = Tensor._make_wrapper_subclass(cls, held.shape, **layout, device="cpu")
        self.held, self.device_ = held, device
        return self

    device = property(lambda self: self.device_)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: object) -> None:
        assert stream.device == self.device

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        # A tensor of one element may lie anywhere, unless there are no others.
        places = {t.device for t in tensors if t.ndim} or {t.device for t in tensors if isinstance(t, cls)}
        if len(places) > 1 and func not in _MIXED:
            raise RuntimeError(f"{func}: expected all tensors on one device, got {sorted(map(str, places))}")
        first = tensors[0] if isinstance(tensors[0], cls) else next(t for t in tensors if isinstance(t, cls))
        if func is aten.copy_.default:
            func(*_held((args, kwargs))[0])
            return args[0]
        if func is aten.histc.default:  # a device's takes integers, the CPU's does not
            out = func(args[0].held.double(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            out = func(*_held(args), **_held(kwargs))
        out = tree_map_only(Tensor, lambda tensor: cls(tensor, first.device), out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class _Move(torch.autograd.Function):
    """A copy to another device; its gradient comes back to where it started."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device) -> Tensor:
        ctx.origin = tensor.device
        held = _held(tensor).clone()
        return DeviceTensor(held, device) if device.type == "cuda" else held

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _moved(gradient, ctx.origin), None


class Pretending(TorchFunctionMode):
    """Within it, torch's functions make and move tensors as if there were the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        of_device = args and isinstance(args[0], DeviceTensor)
        match func:
            case Tensor.to:
                return self._to(*args, **kwargs)
            case Tensor.cpu:
                return _moved(args[0], torch.device("cpu"))
            case Tensor.pin_memory:
                assert not of_device, "only the host's memory can be pinned"
                return args[0] if _is_pinned(args[0]) else _pinned(args[0].clone())
            case Tensor.is_pinned:
                return _is_pinned(args[0])
            case Tensor.numpy | Tensor.__array__ if of_device:
                raise TypeError("can't convert cuda tensor to numpy; use Tensor.cpu() first")
            case Tensor.tolist if of_device:
                return args[0].held.detach().tolist()
            case torch.unravel_index if of_device:  # makes a tensor on its argument's device, where no mode sees it
                return _on(args[0].device, func(args[0].held, *args[1:], **kwargs))
        if kwargs.pop("pin_memory", False):
            return _pinned(func(*args, **kwargs))
        device = _device(kwargs.get("device"))
        if device is None or (device.type != "cuda" and not of_device):
            return func(*args, **kwargs)
        made = func(*args, **{**kwargs, "device": None if of_device else "cpu"})
        return _moved(made, device)

    @staticmethod
    def _to(tensor: Tensor, *args: Any, device: Any = None, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            elif not isinstance(value, bool):  # non_blocking
                device = value
        non_blocking = kwargs.pop("non_blocking", False)
        if dtype is not None or kwargs:
            tensor = tensor.to(dtype or tensor.dtype, **kwargs)
        moved = tensor if device is None else _moved(tensor, _device(device))
        if non_blocking and (stream := getattr(_current, "stream", None)):
            assert _is_pinned(tensor), "what is sent from pageable memory holds up the thread"
            moved.held.fill_(torch.nan)
            stream.under_way.append(lambda: moved.held.copy_(tensor))
        return moved


class _Stream(SimpleNamespace):
    cuda_stream = 0

    def __init__(self, device: Any = None) -> None:
        super().__init__(device=_device("cuda" if device is None else device), under_way=[])

    def record_event(self) -> list[Callable]:
        event, self.under_way = self.under_way, []
        return event

    def wait_event(self, event: list[Callable]) -> None:
        while event:
            event.pop()()


_current = threading.local()


@contextlib.contextmanager
def _within(stream: _Stream) -> Iterator[None]:
    _current.stream = stream
    try:
        yield
    finally:
        _current.stream = None


def _pinned(tensor: Tensor) -> Tensor:
    tensor.pinned = True
    return tensor


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "pinned", False)


@contextlib.contextmanager
def pretended(extension: ModuleType) -> Iterator[list[str]]:
    """Let torch and the library see two devices, of which the second is the current one.

    Args:
        extension: The emulated one.

    Yields:
        A list that gets the name of each kernel that is called.
    """
    with pytest.MonkeyPatch.context() as monkeypatch, _forgetting():
        calls = _patch(monkeypatch, extension)
        with Pretending():
            yield calls


@contextlib.contextmanager
def _forgetting() -> Iterator[None]:
    """What the library remembers of devices does not outlive the block, nor enter it."""
    remembered = (dispatch.status, dispatch._too_old, reference.forms_float32)
    for function in remembered:
        function.cache_clear()
    try:
        yield
    finally:
        for function in remembered:
            function.cache_clear()


def _patch(monkeypatch: pytest.MonkeyPatch, extension: ModuleType) -> list[str]:
    calls: list[str] = []

    def noted(name: str, function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            calls.append(name)
            devices = {tensor.device.type for tensor in tree_iter(args) if isinstance(tensor, Tensor)}
            assert devices <= {"cuda"}, f"{name}: got tensors on {devices}"
            return function(*_held(args))

        return call

    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 1,
        "mem_get_info": lambda device: (40 << 30, 80 << 30),
        "memory_reserved": lambda device: 2 << 30,
        "memory_allocated": lambda device: 1 << 30,
        "get_device_capability": lambda device: (9, 0),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": _within,
        "device": contextlib.nullcontext,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensor: None)
    monkeypatch.setattr(memory, "check_held", lambda name, tensor: None)  # what they hold is in another tensor's memory
    # Modes are left while a function runs and belong to one thread; these two call into torch all the same.
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", _pretending(torch.autograd._engine_run_backward))
    monkeypatch.setattr(Streamed, "_read", _pretending(Streamed._read))

    monkeypatch.setattr(triton, "INTERPRETED", False)
    for name in ("accumulate_grad_sum", "accumulate_per_example", "accumulate_act_sq_sum"):
        monkeypatch.setattr(triton, name, noted(name, getattr(triton, name)))
    functions = {name: noted(name, value) for name, value in vars(extension).items() if callable(value)}
    stand_in = SimpleNamespace(**vars(extension) | functions)
    monkeypatch.setitem(sys.modules, "fastprune._cuda", stand_in)
    for kind in (nn.Module, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "to", _module_to)
    kinds = {DeviceTensor: Tensor}  # a mask is applied to plain tensors only
    monkeypatch.setattr(apply, "type", lambda value: kinds.get(type(value), type(value)), raising=False)
    return calls


def _module_to(module: nn.Module, *args: Any) -> nn.Module:
    """``module.to`` of a device or a dtype; torch's own would write into the storage of the parameters."""
    [target] = args
    if isinstance(target, torch.dtype):
        return module._apply(lambda tensor: tensor.to(target) if tensor.is_floating_point() else tensor)
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = made.setdefault(id(parameter), nn.Parameter(_moved(parameter.detach(), _device(target))))
                part._parameters[name] = moved.requires_grad_(parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else _moved(buffer, _device(target))
    return module


def _device(device: Any) -> torch.device | None:
    if device is None or (device := torch.device(device)) != torch.device("cuda"):
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    return _Move.apply(tensor, device) if device.type in ("cpu", "cuda") else _held(tensor).to(device)


def _held(value: Any) -> Any:
    return tree_map_only(DeviceTensor, lambda tensor: tensor.held, value)


def _on(device: torch.device, value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: DeviceTensor(tensor, device), value)


def _pretending(function: Callable) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        with Pretending():
            return function(*args, **kwargs)

    return run
