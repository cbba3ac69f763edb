"""Which stored tensors the matrices of a mask are, or are put together from.

In: the names and shapes of a mask and the records of the stored tensors. Out: for each matrix its pieces, as rows one
below the other; a matrix that is stored as it is in memory has one. It must not know transformers or model classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from fastprune.errors import MaskError
from fastprune.masking.apply import split_name
from fastprune.masking.mask import PruneMask
from fastprune.model.shards import DTYPES, Stored

# Parts of an expert that is stored on its own, in the order in which loading stacks them to the fused parameter.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",), ("w1",)),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT = re.compile(r"(?P<layer>.+)\.\w+\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")


@dataclass(frozen=True)
class Piece:
    """Some rows of a matrix.

    Attributes:
        name: Of the stored tensor that has them.
        stored: These rows of it.
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
        MaskError: A matrix is not there, in another shape, of a type that is no weight's, or more than one set of
            tensors would fit.
    """
    if not mask.shapes:
        raise MaskError("the mask is over no matrices")
    find = _finder(on_disk)
    fits = []
    for removed, added in _prefixes(mask, on_disk):
        found = {name: find(added + name.removeprefix(removed)) for name in mask if name.startswith(removed)}
        if len(found) == len(mask.shapes) and all(found.values()):
            fits.append(found)
    if not fits:
        raise MaskError(_why_missing(mask, on_disk, find))
    if len(fits) > 1:
        raise MaskError(
            f"the names of the mask fit {len(fits)} sets of tensors in the checkpoint, under different prefixes"
        )
    return {name: _pieces(name, mask.shapes[name], there, on_disk) for name, there in fits[0].items()}


def width_of(stored: Stored) -> int:
    """Bytes of an element; a type that no weight has is an error."""
    if stored.dtype not in DTYPES:
        raise MaskError(f"weights of the type {stored.dtype} cannot be patched, expected one of {sorted(DTYPES)}")
    return DTYPES[stored.dtype].itemsize


def _finder(on_disk: Mapping[str, Stored]) -> Callable[[str], tuple[str, ...]]:
    """From the name of a matrix to the stored tensors that make it up; none if some are missing."""
    apart: dict[tuple[str, int, str], list[str]] = {}
    for name in on_disk:
        if match := _EXPERT.fullmatch(name):
            apart.setdefault((match["layer"], int(match["expert"]), match["part"]), []).append(name)

    def find(name: str) -> tuple[str, ...]:
        base, expert = split_name(name)
        if base in on_disk:
            return (base,)
        match = re.fullmatch(r"(.+)\.\w+\.experts\.(\w+)", base)
        if expert is None or match is None:
            return ()
        for parts in _PARTS.get(match[2], ()):
            found = [apart.get((match[1], expert, part), []) for part in parts]
            if all(len(names) == 1 for names in found):
                return tuple(name for names in found for name in names)
        return ()

    return find


def _prefixes(mask: PruneMask, on_disk: Mapping[str, Stored]) -> list[tuple[str, str]]:
    """(prefix of the mask's names, prefix on disk that stands for it); names that are equal leave no question."""
    name = next((name for name in mask if split_name(name)[1] is None), None)
    if name is None:
        name = split_name(next(iter(mask)))[0]
        if name not in on_disk and not any(other.endswith(f".{name}") for other in on_disk):
            return [("", "")]  # of experts alone, which may be stored apart
    if name in on_disk:
        return [("", "")]
    added = [("", other.removesuffix(name)) for other in on_disk if other.endswith(f".{name}")]
    heads = [name[: dot.end()] for dot in re.finditer(r"\.", name)]
    return added + [(head, "") for head in heads if name.removeprefix(head) in on_disk]


def _why_missing(mask: PruneMask, on_disk: Mapping[str, Stored], find: Callable[[str], tuple[str, ...]]) -> str:
    missing = [name for name in mask if not find(name)]
    message = (
        f"the checkpoint lacks {len(missing)} of the {len(mask.shapes)} matrices of the mask, the first is "
        f"{split_name(missing[0])[0]}"
    )
    fused = next((name for name in missing if split_name(name)[1] is not None), None)
    apart = next((name for name in on_disk if _EXPERT.fullmatch(name)), None)
    if fused is None or apart is None:
        return message
    return (
        f"{message}; the checkpoint stores each expert on its own ({apart}), and not under all of the names known to "
        f"make up {fused}. Load the model, mask.apply_(model), model.save_pretrained(out_dir)"
    )


def _pieces(name: str, shape: tuple[int, ...], there: tuple[str, ...], on_disk: Mapping[str, Stored]) -> list[Piece]:
    expert, pieces, first = split_name(name)[1], [], 0
    for part in there:
        whole = stored = on_disk[part]
        width = width_of(whole)
        if expert is not None and not _EXPERT.fullmatch(part):  # one of all, in one tensor
            if len(whole.shape) < 2 or expert >= whole.shape[0]:
                raise MaskError(
                    f"{name}: the tensor has the shape {whole.shape} in the checkpoint, so there is no such expert"
                )
            size = math.prod(whole.shape[1:])
            stored = replace(whole, shape=whole.shape[1:], start=whole.start + expert * size * width)
        pieces.append(Piece(part, stored, (stored.start - whole.start) // width, first))
        first += stored.numel
    stored = pieces[0].stored
    together = stored.shape
    if len(pieces) > 1:
        if len({(piece.stored.shape[1:], piece.stored.dtype) for piece in pieces}) > 1:
            raise MaskError(
                f"{name}: its parts have the shapes {[piece.stored.shape for piece in pieces]} and types "
                f"{[piece.stored.dtype for piece in pieces]} in the checkpoint, and do not go together"
            )
        together = (sum(piece.stored.shape[0] for piece in pieces), *stored.shape[1:])
    if together != shape:
        raise MaskError(f"{name} has the shape {together} in the checkpoint and {shape} in the mask")
    return pieces
