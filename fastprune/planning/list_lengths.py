"""How many scores of each matrix are kept, and what the lists take in memory and on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALL_MATRIX = 16_384  # entries kept of each matrix whatever the fraction, so that tiny models lose nothing ...
SMALL_BYTES = 1 << 30  # ... as long as all lists together stay below this
ENTRY_BYTES = 12  # int64 index, float32 value


def local_counts(sizes: Sequence[int], fraction: float, n_lists: int) -> list[int]:
    """Entries kept of each matrix for its own sake."""
    local = [math.ceil(fraction * n) for n in sizes]
    raised = [max(k, min(n, SMALL_MATRIX)) for k, n in zip(local, sizes, strict=True)]
    return raised if n_lists * ENTRY_BYTES * sum(raised) < SMALL_BYTES else local


def kept_bytes(sizes: Sequence[int], first: int = 0, fraction: float = 1e-3, n_lists: int = 2) -> int:
    """Memory of the lists of so many keepers over matrices of these sizes, global candidates included.

    With ``first``, of the matrices from that one on: a pass goes backward, so these are the ones it has kept by then.
    """
    own = sum(local_counts(sizes, fraction, n_lists)[first:])
    of_all = min(math.ceil(fraction * sum(sizes)), sum(sizes[first:]))
    return n_lists * ENTRY_BYTES * (own + of_all)


def stored_bytes(sizes: Sequence[int], fractions: Sequence[float]) -> int:
    """Least size on disk of the lists of all matrices, one list of each for every fraction."""
    return sum(ENTRY_BYTES * sum(local_counts(sizes, fraction, len(fractions))) for fraction in fractions)
