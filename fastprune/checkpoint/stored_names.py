"""The stored tensors that hold the matrices of a mask, whole or in pieces.

In: the names and shapes of a mask and the records of the stored tensors. Out: for each matrix its pieces, which stacked
by rows give the matrix; a matrix that is stored as it is in memory has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fastprune.checkpoint.shards import DTYPES, Stored
from fastprune.errors import MaskError
from fastprune.masking.apply import split_name
from fastprune.masking.mask import PruneMask
from fastprune.model.quirks import EXPERT_PARTS, STORED_EXPERT

_Apart = dict[tuple[str, int], dict[str, list[str]]]  # layer and expert, part, names on disk


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix.

    Attributes:
        name: Name of the stored tensor that holds them.
        stored: The place of these rows in it.
        skipped: Elements of the stored tensor before them.
        first: Flat index in the matrix of their first element.
    """

    name: str
    stored: Stored
    skipped: int
    first: int


def places_of(mask: PruneMask, on_disk: Mapping[str, Stored]) -> dict[str, list[Piece]]:
    """The pieces of each matrix of a mask, whose names may differ from those on disk by one prefix, the same for all.

    Raises:
        MaskError: A matrix is missing, has another shape or an unsupported type, or more than one set of tensors would
            fit.
    """
    if not mask.shapes:
        raise MaskError("the mask is over no matrices")
    apart: _Apart = {}
    for name in on_disk:
        if match := STORED_EXPERT.fullmatch(name):
            apart.setdefault((match["layer"], int(match["expert"])), {}).setdefault(match["part"], []).append(name)
    tried = []
    for removed, added in _prefixes(next(iter(mask)), on_disk, apart):
        renamed = {name: added + name.removeprefix(removed) if name.startswith(removed) else "" for name in mask}
        tried.append({name: (stored, _find(stored, on_disk, apart)) for name, stored in renamed.items()})
    fits = [places for places in tried if all(found for _, found in places.values())]
    if not fits:
        best = max(tried, key=lambda places: sum(bool(found) for _, found in places.values()))
        raise MaskError(_why_missing(best, apart))
    if len(fits) > 1:
        raise MaskError(
            f"the names of the mask fit {len(fits)} sets of tensors in the checkpoint, under different prefixes"
        )
    return {name: _pieces(name, mask.shapes[name], found, on_disk) for name, (_, found) in fits[0].items()}


def width_of(stored: Stored) -> int:
    """Bytes of an element.

    Raises:
        MaskError: The type is not supported for weights.
    """
    if stored.dtype not in DTYPES:
        raise MaskError(f"{stored.path}: expected weights of a type in {sorted(DTYPES)}, got {stored.dtype}")
    return DTYPES[stored.dtype].itemsize


def _layer_of(base: str) -> str:
    """The layer of a fused parameter of experts, in whatever module the experts are; empty for any other name."""
    match = re.fullmatch(r"(.+)\.\w+\.experts\.\w+", base)
    return match[1] if match else ""


def _find(name: str, on_disk: Mapping[str, Stored], apart: _Apart) -> tuple[str, ...]:
    """The stored tensors that make up a matrix, under its name or, of an expert, part by part; none if some lack."""
    base, expert = split_name(name)
    if base in on_disk:
        return (base,)
    stored = {} if expert is None else apart.get((_layer_of(base), expert), {})
    for parts in EXPERT_PARTS.get(base.rpartition(".")[2], ()):
        if all(len(stored.get(part, ())) == 1 for part in parts):
            return tuple(stored[part][0] for part in parts)
    return ()


def _prefixes(name: str, on_disk: Mapping[str, Stored], apart: _Apart) -> list[tuple[str, str]]:
    """Candidates ``(prefix of the mask's names, prefix on disk)``; one pair of empty ones if the names are equal.

    A prefix ends where the list of blocks begins: ``model.language_model.layers.0…`` may be stored as
    ``language_model.model.layers.0…``.
    """
    base = split_name(name)[0]
    pairs: dict[tuple[str, str], None] = {}
    for own, others in ((base, set(on_disk)), (_layer_of(base), {layer for layer, _ in apart})):
        if own in others:
            return [("", "")]
        if own:
            blocks = re.search(r"[^.]+\.\d+(\.|$)", own)
            prefix = own[: blocks.start()] if blocks else ""
            rest = own.removeprefix(prefix)
            matching = sorted(other for other in others if f".{other}".endswith(f".{rest}"))
            pairs |= {(prefix, other.removesuffix(rest)): None for other in matching}
    return list(pairs) or [("", "")]


def _why_missing(places: Mapping[str, tuple[str, tuple[str, ...]]], apart: _Apart) -> str:
    missing = {name: renamed for name, (renamed, found) in places.items() if not found}
    message = (
        f"the checkpoint lacks {len(missing)} of the {len(places)} matrices of the mask, the first is "
        f"{split_name(next(iter(missing)))[0]}"
    )
    for name, renamed in missing.items():
        base, expert = split_name(renamed)
        if expert is not None and (parts := apart.get((_layer_of(base), expert))):
            message += (
                f"; the checkpoint stores each expert on its own ({next(iter(parts.values()))[0]}), and not "
                f"under all of the names known to make up {name}"
            )
            break
    return (
        f"{message}. If they are stored otherwise: load the model, mask.apply_(model), model.save_pretrained(out_dir)"
    )


def _pieces(name: str, shape: tuple[int, ...], parts: tuple[str, ...], on_disk: Mapping[str, Stored]) -> list[Piece]:
    expert, pieces, first = split_name(name)[1], [], 0
    for part in parts:
        whole = stored = on_disk[part]
        width = width_of(whole)
        if expert is not None and not STORED_EXPERT.fullmatch(part):  # one expert of a tensor that holds all
            if len(whole.shape) < 2 or expert >= whole.shape[0]:
                raise MaskError(
                    f"{name}: the tensor has the shape {whole.shape} in the checkpoint, so there is no such expert"
                )
            size = math.prod(whole.shape[1:])
            stored = replace(whole, shape=whole.shape[1:], start=whole.start + expert * size * width)
        pieces.append(Piece(part, stored, (stored.start - whole.start) // width, first))
        first += stored.numel
    stored = pieces[0].stored
    joined = stored.shape
    if len(pieces) > 1:
        if len({(piece.stored.shape[1:], piece.stored.dtype) for piece in pieces}) > 1:
            raise MaskError(
                f"{name}: its parts have the shapes {[piece.stored.shape for piece in pieces]} and types "
                f"{[piece.stored.dtype for piece in pieces]} in the checkpoint, and cannot be joined"
            )
        joined = (sum(piece.stored.shape[0] for piece in pieces), *stored.shape[1:])
    if joined != shape:
        raise MaskError(f"{name} has the shape {joined} in the checkpoint and {shape} in the mask")
    return pieces
