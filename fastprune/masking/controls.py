"""Control masks: as many weights per matrix as another mask has, chosen without regard to any behavior.

In: a model and the mask to match. Out: a mask; masks that are on the model make no difference to it. Each matrix has a
random stream of its own, so that the draw does not depend on the order or the number of matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from numbers import Integral

import torch

from fastprune import ops
from fastprune.errors import ArgumentError, MaskError
from fastprune.masking.apply import matrices_of, original_fingerprint, original_weight
from fastprune.masking.mask import PruneMask
from fastprune.model.adapters import unwrap

MATCHES = ("count", "magnitude")

# Half the width, in ranks by |w|, of the window in which a weight's substitute is first drawn. Among millions of
# weights, 32 neighbors are nearly equal in magnitude; where they are taken already, the window doubles.
_WINDOW = 32


def random_mask(model: torch.nn.Module, like: PruneMask, seed: int = 0, match: str = "count") -> PruneMask:
    """A random mask with as many weights in each matrix as another one.

    Args:
        model: The model.
        like: The mask to match.
        seed: Equal seeds give equal masks.
        match: ``"count"``: uniform among all weights of the matrix. ``"magnitude"``: for each weight of ``like`` one
            that is not in ``like`` and has nearly the same ``|w|`` (a neighbor in the order by ``|w|``).

    Returns:
        The mask, with ``kind``, ``seed`` and the digest of ``like`` in its metadata.

    Raises:
        ArgumentError: ``match`` or ``seed`` is not usable.
        MaskError: ``like`` does not fit the model, or (``"magnitude"``) a matrix has too few weights outside ``like``.
        ModelError: A weight is not there to be read.
    """
    if not isinstance(match, str) or match not in MATCHES:
        raise ArgumentError(f"expected one of {MATCHES}, got {match!r}", argument="match")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise ArgumentError(f"expected an integer, got {seed!r}", argument="seed")
    seed = int(seed)  # integers of NumPy cannot be written as JSON

    def draw(name: str, weight: torch.Tensor) -> torch.Tensor:
        # not hash(), which differs from process to process
        state = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
        generator = torch.Generator().manual_seed(state)
        if match == "count":
            return _distinct(weight.numel(), len(like[name]), generator)
        return _like_in_magnitude(name, original_weight(model, name, weight), like[name], generator)

    return _control(model, like, draw, {"kind": f"random ({match})", "seed": seed})


def largest_magnitude_mask(model: torch.nn.Module, like: PruneMask) -> PruneMask:
    """The largest weights by ``|w|``, as many in each matrix as another mask has; equal ones by lower index.

    Args:
        model: The model.
        like: The mask to match.

    Raises:
        MaskError: ``like`` does not fit the model.
        ModelError: A weight is not there to be read.
    """

    def draw(name: str, weight: torch.Tensor) -> torch.Tensor:
        return ops.top_scores(original_weight(model, name, weight), None, "magnitude", len(like[name]))[0].cpu()

    return _control(model, like, draw, {"kind": "largest magnitude"})


def _control(
    model: torch.nn.Module,
    like: PruneMask,
    draw: Callable[[str, torch.Tensor], torch.Tensor],
    facts: Mapping[str, object],
) -> PruneMask:
    if not isinstance(like, PruneMask):
        raise MaskError(f"expected a PruneMask, got {type(like).__name__}", argument="like")
    weights = matrices_of(unwrap(model), like.shapes)
    indices = {
        name: draw(name, weight).sort().values if len(like[name]) else torch.empty(0, dtype=torch.int64)
        for name, weight in weights.items()
    }
    metadata = {**facts, "like": like.digest, "fingerprint": original_fingerprint(model, weights)}
    # An evaluation encodes its rows as those behind the mask were, for the control too.
    metadata |= {key: like.metadata[key] for key in ("model", "calibration") if key in like.metadata}
    return PruneMask(indices, like.shapes, metadata)


def _distinct(n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """``k`` different numbers below ``n``, every such set equally likely."""
    if 2 * k > n:
        return torch.randperm(n, generator=generator)[:k]
    drawn = torch.empty(0, dtype=torch.int64)
    # The first k different values of a uniform stream: a permutation of n would be as large as the matrix.
    while len(drawn) < k:
        more = torch.randint(n, (k + 16,), generator=generator)
        drawn = _first_of_each(torch.cat([drawn, more]))
    return drawn[:k]


def _like_in_magnitude(
    name: str, weight: torch.Tensor, masked: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    n, k = weight.numel(), len(masked)
    if k > n - k:
        raise MaskError(
            f"{name}: {k} of {n} weights are masked, too many to draw as many others of nearly the same magnitude; "
            'match="count" can serve'
        )
    order = weight.reshape(-1).abs().to(torch.float32).cpu().argsort(stable=True)
    in_like = torch.zeros(n, dtype=torch.bool)
    in_like[masked] = True
    in_like = in_like[order]
    free = order[~in_like]  # by rising |w|
    places = torch.arange(n)[in_like] - torch.arange(k)  # rank of each masked weight among the free ones
    taken = torch.zeros(len(free), dtype=torch.bool)
    window = _WINDOW
    while len(places):
        low, high = (places - window).clamp(min=0), (places + window).clamp(max=len(free))
        offered = low + (torch.rand(len(places), generator=generator, dtype=torch.float64) * (high - low)).long()
        placed = torch.zeros(len(places), dtype=torch.bool)
        placed[_first_positions(offered)] = True
        placed &= ~taken[offered]
        taken[offered[placed]] = True
        crowded = 4 * int(placed.sum()) < len(places)
        places = places[~placed]
        if crowded and window < len(free):
            window *= 2
        elif crowded:  # almost no weight is free, so take any that is
            left = torch.nonzero(~taken).flatten()
            taken[left[torch.randperm(len(left), generator=generator)[: len(places)]]] = True
            break
    return free[taken]


def _first_positions(values: torch.Tensor) -> torch.Tensor:
    """Positions at which a value appears for the first time, ascending."""
    ordered, by_value = values.sort(stable=True)
    new = torch.ones(len(values), dtype=torch.bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return by_value[new].sort().values


def _first_of_each(values: torch.Tensor) -> torch.Tensor:
    return values[_first_positions(values)]
