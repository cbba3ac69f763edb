"""Segments: runs of decoder blocks that a pass holds at a time, and the weights that each of them needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fastprune.model.weights import HEAD, Group

OFFLOADS = ("device", "host", "disk")
"""Where hidden states between segments may be kept, the fastest first."""


def split_blocks(n_blocks: int, segments: int) -> list[range]:
    """Cut ``n_blocks`` into ``segments`` runs whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(n_blocks, segments)
    starts = [index * size + min(index, longer) for index in range(segments + 1)]
    return [range(first, last) for first, last in itertools.pairwise(starts)]


def needs(parts: Sequence[range], number: int, *, backward: bool) -> tuple[Group, ...]:
    """The groups of weights that segment ``number`` needs; the backward pass of the last one begins with the head."""
    if not 0 <= number < len(parts):
        return ()
    return (*parts[number], HEAD) if backward and number == len(parts) - 1 else tuple(parts[number])
