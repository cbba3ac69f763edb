"""Two records side by side: by how much each rate differs.

In: two records. Out: plain rows; how they are shown is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastprune.reporting.formatting import find
from fastprune.reporting.record import RATES, checked, missing


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The differences between the results of two records.

    Args:
        before: The record to compare with.
        after: The record of interest.

    Returns:
        One dict ``{"model", "mask", "metric", "before", "after", "change"}`` for each rate (a fraction) and for
        ``pruned`` (a count), in the order of ``after``, for rows that both records hold; values missing on either
        side are left out. ``change`` is ``after - before``.

    Raises:
        ArtifactError: A record is not valid; the message names the key.
    """
    before, after = checked(before), checked(after)
    differences = []
    for row in after.get("results") or ():
        other = find(before.get("results"), row["model"], row["mask"])
        for metric in ("pruned", *RATES) if other is not None else ():
            old, new = other.get(metric), row.get(metric)
            if not missing(old) and not missing(new):
                place = {"model": row["model"], "mask": row["mask"], "metric": metric}
                differences.append({**place, "before": old, "after": new, "change": new - old})
    return differences
