"""Criteria as a user names them, and the statistics that they need.

:mod:`fastprune.ops.criteria` has the criteria, and ``ops.top_scores`` forms the scores during selection.
"""

from __future__ import annotations

from fastprune.errors import ArgumentError
from fastprune.ops.criteria import CRITERIA, STATISTICS


def parse_criteria(argument: str, value: str | tuple[str, ...]) -> tuple[str, ...]:
    """Validate ``harm=`` or ``benign=``.

    Args:
        argument: Name of the argument, for the message.
        value: One criterion or a tuple of them.

    Raises:
        ArgumentError: Unknown, repeated or no criterion.
    """
    known = ", ".join(CRITERIA)
    try:
        names = (value,) if isinstance(value, str) else tuple(value)
    except TypeError:
        raise ArgumentError(f"expected one of {known}, or a tuple of them, got {value!r}", argument=argument) from None
    for name in names:
        if name == "random":
            raise ArgumentError(
                "'random' is a mask, not a score; use fastprune.random_mask(model, like=mask)", argument=argument
            )
        if not isinstance(name, str) or name not in CRITERIA:
            raise ArgumentError(f"expected one of {known}, or a tuple of them, got {name!r}", argument=argument)
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"expected one or more different criteria out of {known}, got {value!r}", argument=argument)
    return names


def statistics_of(criteria: tuple[str, ...]) -> tuple[str, ...]:
    """The statistics that these criteria need, each once, in a fixed order."""
    needed = {CRITERIA[name].statistic for name in criteria}
    return tuple(name for name in STATISTICS if name in needed)
