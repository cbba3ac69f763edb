"""Numbers of scores that are kept of each matrix, and the size of their lists in memory and on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence

SMALL_MATRIX = 16_384  # entries kept of each matrix at any fraction, so that tiny models lose nothing ...
SMALL_BYTES = 1 << 30  # ... as long as all lists together stay below this
ENTRY_BYTES = 12  # int64 index, float32 value


def local_counts(sizes: Sequence[int], fraction: float, n_lists: int) -> list[int]:
    """Entries kept of each matrix regardless of the others."""
    local = [math.ceil(fraction * n) for n in sizes]
    raised = [max(k, min(n, SMALL_MATRIX)) for k, n in zip(local, sizes, strict=True)]
    return raised if n_lists * ENTRY_BYTES * sum(raised) < SMALL_BYTES else local


def kept_bytes(sizes: Sequence[int], first: int = 0, fraction: float = 1e-3, n_lists: int = 2) -> int:
    """Memory of ``n_lists`` lists for each of the matrices, global candidates included.

    Args:
        sizes: Weights of each matrix.
        first: Count the matrices from this index on: a pass goes backward, so it has kept these by then.
        fraction: Kept fraction.
        n_lists: Number of collectors.
    """
    own = sum(local_counts(sizes, fraction, n_lists)[first:])
    of_all = min(math.ceil(fraction * sum(sizes)), sum(sizes[first:]))
    return n_lists * ENTRY_BYTES * (own + of_all)


def stored_bytes(sizes: Sequence[int], fractions: Sequence[float]) -> int:
    """Lower bound of the size on disk of the lists of all matrices, one list of each for every fraction."""
    return sum(ENTRY_BYTES * sum(local_counts(sizes, fraction, len(fractions))) for fraction in fractions)
