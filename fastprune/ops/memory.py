"""Checks of tensors' memory before a kernel is given raw addresses.

In: tensors as a caller passed them. Out: nothing, or an :class:`~fastprune.errors.ArgumentError`. Some tensors hold no
values (fake, meta, freed) or other values than they show (a lazy negation), and two may share memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastprune.errors import ArgumentError


def _without_class(method: Callable) -> object:
    """What a class method calls, the same for every class that inherits it."""
    return getattr(method, "__func__", method)


# Those of a plain tensor and of a parameter; a subclass with one of its own may return anything.
_PLAIN_FUNCTIONS = (_without_class(Tensor.__torch_function__), torch._C._disabled_torch_function_impl)


def check_held(name: str, tensor: Tensor) -> None:
    """Require a tensor whose storage holds its values where its strides say.

    Raises:
        ArgumentError: ``tensor`` is not one; the message begins with ``name``.
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentError(f"expected a tensor, got {type(tensor).__name__}", argument=name)
    if kind := _other_kind(tensor):
        raise ArgumentError(f"expected a dense tensor with its values in memory, got {kind}", argument=name)


def check_writable(name: str, tensor: Tensor) -> None:
    """Require a tensor that may be written: outside of inference mode, torch refuses one that was made inside."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ArgumentError(
            "expected a tensor that may be written, got one made under torch.inference_mode; .clone() it "
            "outside of that mode, or make this call inside",
            argument=name,
        )


def note_write(tensor: Tensor) -> None:
    """Tell autograd of a write through an address, which autograd does not see."""
    if not tensor.is_inference():  # inference tensors have no version
        torch.autograd.graph.increment_version(tensor)


def check_apart(accs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Require that no two accumulators share an element, and that none overlaps an input.

    Args:
        accs: Of one shape and, along their columns, of unit stride; no two rows of one overlap.
        inputs: What is read while accumulators are written.

    Raises:
        ArgumentError: Two share memory.
    """
    for (name, acc), (other_name, other) in itertools.combinations(accs.items(), 2):
        if _overlap(acc, other) and _share(acc, other):
            raise ArgumentError(
                f"expected memory of its own for each, got one for {name!r} and {other_name!r}; what is added to "
                "one would be added to the other",
                argument="accs",
            )
    for acc, (name, tensor) in itertools.product(accs.values(), inputs.items()):
        if _overlap(acc, tensor):
            raise ArgumentError(f"expected memory of its own, got that of {name}; .clone() one of them", argument="acc")


def check_lists_apart(names: Sequence[str], elements: Sequence[Tensor], offsets: Sequence[Tensor]) -> None:
    """Require that no element is listed for two weights: the second write would save the first one's as the old value.

    Args:
        names: Of the weights.
        elements: A one-dimensional view of each weight's memory, all on one device.
        offsets: int64, those that are listed of each.

    Raises:
        ArgumentError: An element is in the lists of two weights.
    """
    listed = sorted((*_ends(elements[i]), i) for i in range(len(names)) if len(offsets[i]))
    overlapping: set[int] = set()
    furthest, owner = 0, 0
    for start, end, i in listed:
        if start < furthest:
            overlapping |= {owner, i}
        if end > furthest:
            furthest, owner = end, i
    if not overlapping:
        return
    addresses = torch.cat([_ends(elements[i])[0] + offsets[i] * elements[i].element_size() for i in overlapping])
    one_size = len({elements[i].element_size() for i in overlapping}) == 1
    if not one_size or len(addresses.unique()) < len(addresses):
        some = " and ".join(repr(names[i]) for i in sorted(overlapping)[:2])
        raise ArgumentError(f"expected no element in two lists, got {some}, which share memory", argument="weights")


def _other_kind(tensor: Tensor) -> str | None:
    """The kind of a tensor whose storage does not hold its values; ``None`` if it holds them."""
    kind = type(tensor)
    if (
        kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        or _without_class(kind.__torch_function__) not in _PLAIN_FUNCTIONS
    ):
        return f"{kind.__name__}, a subclass with operations of its own"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "one inside a transform of torch.func"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return f"{tensor.layout} on {tensor.device}"
    if tensor.is_neg():
        return "a view that is to be negated; .resolve_neg() forms its values"
    if tensor.is_conj():
        return "a view that is to be conjugated; .resolve_conj() forms its values"
    if tensor._is_zerotensor():
        return "zeros without memory"
    if tensor.numel():
        start, end = _ends(tensor)
        held = tensor.untyped_storage().nbytes()
        if tensor.storage_offset() * tensor.element_size() + end - start > held:
            return f"{tuple(tensor.shape)} in a storage that was cut to {held} bytes"
    return None


def _ends(tensor: Tensor) -> tuple[int, int]:
    """Address of the first element and the address after the last one; the tensor is not empty."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges of two tensors overlap; their elements may still be different ones."""
    if not a.numel() or not b.numel() or a.device != b.device:
        return False
    (a_start, a_end), (b_start, b_end) = _ends(a), _ends(b)
    return a_start < b_end and b_start < a_end


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two accumulators as :func:`check_apart` takes them have an element in common."""
    rows, columns = a.shape
    step = max(a.stride(0), columns)
    distance, rest = divmod(b.data_ptr() - a.data_ptr(), a.element_size())
    down, right = divmod(distance, step)
    # Rows do not overlap, so an element that is `distance` further on lies in the row `down` below or in the next.
    places = ((down, right), (down + 1, right - step))
    return rest != 0 or any(abs(row) < rows and abs(column) < columns for row, column in places)
