"""Checks of arguments before any backend is called: shapes, dtypes, devices, token ranges and indices.

A check returns its arguments in the form that every backend expects, or raises an
:class:`~fastprune.errors.ArgumentError`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from fastprune.errors import ArgumentError, FastpruneError
from fastprune.ops import memory
from fastprune.ops.criteria import CRITERIA, GRADIENT_SUMS

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the weights that can be scored and pruned."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin errors raised within by the name of the matrix, unless it is empty."""
    try:
        yield
    except FastpruneError as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from error


def check_accumulators(accs: Mapping[str, Tensor]) -> None:
    """Accumulators of the same gradients have names of ``GRADIENT_SUMS`` and one dtype, device and layout."""
    _check_mapping("accs", accs)
    if not accs or not set(accs) <= set(GRADIENT_SUMS):
        got = ", ".join(map(str, accs)) or "none"
        raise ArgumentError(f"expected one or more of {', '.join(GRADIENT_SUMS)}, got {got}", argument="accs")
    for name, acc in accs.items():
        memory.check_held(f"accs[{name!r}]", acc)
    kinds = {name: (acc.dtype, acc.device, tuple(acc.shape), _strides(acc)) for name, acc in accs.items()}
    if len(set(kinds.values())) > 1:
        raise ArgumentError(f"expected one dtype, device, shape and strides for all, got {kinds}", argument="accs")


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Of the dimensions in which there is a next element."""
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def check_accumulator(acc: Tensor, dims: int) -> None:
    """An accumulator has float32 or float64 elements and as many dimensions as its statistic."""
    memory.check_held("acc", acc)
    memory.check_writable("acc", acc)
    if acc.dim() != dims or acc.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"expected {dims}-D float32 or float64, got {acc.dim()}-D {acc.dtype}", argument="acc")
    if any(size > 1 and stride == 0 for size, stride in zip(acc.shape, acc.stride(), strict=True)):
        raise ArgumentError(f"expected no elements that share memory, got {_layout(acc)}", argument="acc")


def check_float(name: str, tensor: Tensor, like: Tensor) -> None:
    """Require a tensor of :data:`FLOAT_DTYPES` on the device of ``like``, whose storage holds its values."""
    memory.check_held(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentError(f"expected float16, bfloat16, float32 or float64, got {tensor.dtype}", argument=name)
    if tensor.device != like.device:
        raise ArgumentError(f"expected a tensor on {like.device}, got one on {tensor.device}", argument=name)


def check_product(acc: Tensor, dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three, detached, swapped if that gives ``acc`` a unit column stride: ``(dy.T @ x).T`` is ``x.T @ dy``."""
    check_accumulator(acc, dims=2)
    for name, tensor, width in (("dy", dy, acc.shape[0]), ("x", x, acc.shape[1])):
        check_float(name, tensor, like=acc)
        if tensor.dim() != 2 or tensor.shape[1] != width:
            raise ArgumentError(
                f"expected (n_tokens, {width}) to fit acc {tuple(acc.shape)}, got {tuple(tensor.shape)}", argument=name
            )
    if dy.dtype != x.dtype or len(dy) != len(x):
        raise ArgumentError(
            f"dy and x: expected one dtype and number of tokens, got {dy.dtype} {len(dy)} and {x.dtype} {len(x)}"
        )
    if acc.shape[1] != 1 and acc.stride(1) != 1:
        if acc.stride(0) != 1:
            raise ArgumentError(f"expected a unit stride in one dimension, got strides {acc.stride()}", argument="acc")
        acc, dy, x = acc.T, x, dy
    if len(acc) > 1 and acc.stride(0) < acc.shape[1]:
        raise ArgumentError(f"expected no rows that share memory, got {_layout(acc)}", argument="acc")
    return acc.detach(), dy.detach(), x.detach()


def check_spans(starts: Tensor, lengths: Tensor, n_tokens: int, *, disjoint: bool = False) -> list[tuple[int, int]]:
    """First and end token of each example that has tokens. Synchronizes if the two are not on the CPU."""
    for name, tensor in (("starts", starts), ("lengths", lengths)):
        memory.check_held(name, tensor)
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ArgumentError(
                f"expected int64 (n_examples,), got {tensor.dtype} {tuple(tensor.shape)}", argument=name
            )
    if len(starts) != len(lengths):
        raise ArgumentError(f"starts and lengths: expected as many of both, got {len(starts)} and {len(lengths)}")
    spans = []
    for i, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if start < 0 or length < 0 or start + length > n_tokens:
            raise ArgumentError(
                f"starts, lengths: expected spans within {n_tokens} tokens, got start {start} and length {length} for "
                f"example {i}"
            )
        if length:
            spans.append((start, start + length))
    if disjoint:
        for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
            if start < end:
                raise ArgumentError(f"starts, lengths: expected each token in one example, got token {start} in two")
    return spans


def checked_pair(pair: object) -> tuple[Tensor, Tensor | None]:
    """A weight and its statistic."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ArgumentError(
            f"expected a weight and its statistic or None, got {type(pair).__name__}", argument="matrices"
        )
    return pair[0], pair[1]


def check_scores(weight: Tensor, statistic: Tensor | None, criterion: str, k: int) -> int:
    """Require weight and statistic to fit the criterion; returns the number of scores to select as an int."""
    if not isinstance(criterion, str) or criterion not in CRITERIA:
        raise ArgumentError(f"expected one of {', '.join(CRITERIA)}, got {criterion!r}", argument="criterion")
    check_float("weight", weight, like=weight)
    k = _count("k", k)
    row = CRITERIA[criterion]
    if row.statistic is None:
        if statistic is not None:
            raise ArgumentError(f"expected None for {criterion!r}, which needs no data", argument="statistic")
        return k
    if statistic is not None:
        memory.check_held("statistic", statistic)
    if statistic is None or statistic.dtype not in (torch.float32, torch.float64):
        got = None if statistic is None else statistic.dtype
        raise ArgumentError(f"expected a float32 or float64 tensor for {criterion!r}, got {got}", argument="statistic")
    check_float("statistic", statistic, like=weight)
    try:
        fits = statistic.shape == weight.shape or (
            row.broadcasts and torch.broadcast_shapes(statistic.shape, weight.shape) == weight.shape
        )
    except RuntimeError:
        fits = False
    if not fits:
        broadcastable = " or a shape that broadcasts to it" if row.broadcasts else ""
        raise ArgumentError(
            f"expected the weight's shape {tuple(weight.shape)}{broadcastable}, got {tuple(statistic.shape)}",
            argument="statistic",
        )
    return k


def _count(argument: str, value: int) -> int:
    """An integer of 0 or more as an int; NumPy's and torch's are accepted."""
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # arrays of torch and NumPy, of several elements or of fractions
        raise ArgumentError(f"expected an integer, got {value!r}", argument=argument) from None
    if count < 0:
        raise ArgumentError(f"expected 0 or more, got {count}", argument=argument)
    return count


def checked_scale(scale: float) -> float:
    """The scale as a float; it has to be a finite number (NumPy's are accepted)."""
    try:
        value = math.nan if isinstance(scale, bool) or not isinstance(scale, Real) else float(scale)
    except OverflowError:  # an integer beyond every float
        value = math.inf
    if not math.isfinite(value):
        raise ArgumentError(f"expected a finite number, got {scale!r}", argument="scale")
    return value


def check_old(weights: Mapping[str, Tensor], indices: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Require old values as ``apply_sparse_`` returned them."""
    check_names("indices", indices, weights)
    check_names("old", old, weights)
    for name, weight in weights.items():
        kept, listed = old[name], indices[name]
        with naming(name):
            check_float("weight", weight, like=weight)
            memory.check_held("old", kept)
            memory.check_held("indices", listed)
        shape = listed.shape
        if kept.dtype != weight.dtype or kept.shape != shape or kept.device != weight.device:
            with naming(name):
                raise ArgumentError(
                    f"expected {weight.dtype} {tuple(shape)} on {weight.device}, as apply_sparse_ returned it, "
                    f"got {kept.dtype} {tuple(kept.shape)} on {kept.device}",
                    argument="old",
                )


class Elements(NamedTuple):
    """Single elements of the matrices on one device: names, one-dimensional views of their memory, offsets there."""

    names: list[str]
    elements: list[Tensor]
    offsets: list[Tensor]


def check_elements(weights: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> list[Elements]:
    """The indexed elements of each weight in memory, device by device; synchronizes once for each."""
    check_names("indices", indices, weights)
    groups: dict[torch.device, Elements] = {}
    for name, weight in weights.items():
        with naming(name):
            check_float("weight", weight, like=weight)
            memory.check_writable("weight", weight)
            listed = indices[name]
            memory.check_held("indices", listed)
            if listed.dim() != 1 or listed.dtype != torch.int64 or listed.device != weight.device:
                got = f"{listed.dtype} {tuple(listed.shape)} on {listed.device}"
                raise ArgumentError(f"expected int64 (n,) on {weight.device}, got {got}", argument="indices")
            group = groups.setdefault(weight.device, Elements([], [], []))
            elements, offsets = _located(weight.detach(), listed)
            group.names.append(name)
            group.elements.append(elements)
            group.offsets.append(offsets)
    for group in groups.values():
        _check_ranges({name: (weights[name], indices[name]) for name in group.names if len(indices[name])})
        memory.check_lists_apart(group.names, group.elements, group.offsets)
    return list(groups.values())


def _check_mapping(argument: str, given: object) -> None:
    if not isinstance(given, Mapping):
        raise ArgumentError(f"expected a mapping from names, got {type(given).__name__}", argument=argument)


def check_names(argument: str, given: Mapping[str, object], weights: Mapping[str, object], of: str = "weights") -> None:
    """Require two mappings with the same keys."""
    _check_mapping(of, weights)
    _check_mapping(argument, given)
    if differing := given.keys() ^ weights.keys():
        raise ArgumentError(
            f"expected the names of the {len(weights)} {of}, got {len(given)}; "
            f"{min(differing, key=str)!r} is in one of the two only",
            argument=argument,
        )


def _check_ranges(listed: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Require indices within each weight, none twice: a second write would not replace the old value."""
    if not listed:
        return
    # All facts of a device in one tensor, since every read synchronizes.
    facts = [
        fact for _, indices in listed.values() for fact in (*indices.aminmax(), (indices[1:] > indices[:-1]).all())
    ]
    facts = torch.stack([fact.to(torch.int64) for fact in facts]).tolist()
    for (name, (weight, indices)), lowest, highest, ascending in zip(
        listed.items(), facts[::3], facts[1::3], facts[2::3], strict=True
    ):
        with naming(name):
            if lowest < 0 or highest >= weight.numel():
                expected = f"0 to {weight.numel() - 1} for a weight {tuple(weight.shape)}"
                raise ArgumentError(f"expected {expected}, got {lowest} to {highest}", argument="indices")
            if not ascending and len(indices.unique()) < len(indices):
                raise ArgumentError(
                    "expected each weight once, got one twice; .unique() leaves them out", argument="indices"
                )


def _layout(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} with strides {tensor.stride()}"


def _located(weight: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The weight's memory in one dimension, and the offsets of the indexed elements in it."""
    if weight.is_contiguous():
        return weight.view(-1), indices
    extents = sorted((stride, size) for stride, size in zip(weight.stride(), weight.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in extents:
        if stride <= reach:
            raise ArgumentError(f"expected no elements that share memory, got {_layout(weight)}", argument="weight")
        reach += stride * (size - 1)
    offsets = torch.zeros_like(indices)
    rest = indices
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        offsets += rest % size * stride
        rest = rest // size
    return weight.as_strided((reach + 1,), (1,)), offsets
