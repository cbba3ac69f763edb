"""Which masks may be written into weights on disk, where a model outlives the process and can be shared.

In: the metadata of a mask. Out: nothing, or an error with the reason. In memory every mask may be applied, so that
controls can be measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastprune.calibration.refusals import MOSTLY
from fastprune.errors import ArgumentError, MaskError
from fastprune.ops.validate import checked_scale

# Criteria that rank weights by how much they hold the behavior back: pruning the best of them sets it free.
REVERSED = ("signed_reverse",)


def origins(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The origins of a mask: one entry for each selection that its weights come from.

    Returns:
        ``criterion`` of the harm score, and ``refusals``, the share of refusals among the replies of the harm set
        (``None`` if their texts were not known). Empty for masks that no score was used for.
    """
    if metadata.get("kind") == "algebra":
        return list(metadata.get("origins", ()))
    if metadata.get("kind") != "selection":
        return []
    harm = (metadata.get("calibration") or {}).get("harm") or {}
    return [{"criterion": (metadata.get("criteria") or {}).get("harm"), "refusals": harm.get("refusals")}]


def merged(sides: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The origins of a mask that is combined from masks with these metadata, each once.

    The origins of a mask that is subtracted count too: ``every - (every - mask)`` is ``mask``.
    """
    found: list[dict[str, Any]] = []
    for metadata in sides:
        found += [origin for origin in origins(metadata) if origin not in found]
    return found


def why_not_storable(metadata: Mapping[str, Any]) -> str | None:
    """The reason why a mask stays in memory; ``None`` if it may be written to disk."""
    for origin in origins(metadata):
        if origin.get("criterion") in REVERSED:
            return f"it was selected by {origin['criterion']}, which removes what holds the harmful behavior back"
        if (origin.get("refusals") or 0) > MOSTLY:
            return (
                f"its harm set is mostly refusals ({origin['refusals']:.0%} of the replies), so that it removes what "
                "the model refuses with"
            )
    return None


def check_storable(metadata: Mapping[str, Any]) -> None:
    """Refuse masks after which a model no longer refuses.

    Raises:
        MaskError: Says why, and what remains possible.
    """
    reason = why_not_storable(metadata)
    if reason is not None:
        raise MaskError(
            f"expected one that may be written to disk, got one that may not: {reason}; measure it in memory "
            "with mask.applied(model) or `fastprune eval --mask`",
            argument="mask",
        )


def checked_stored_scale(scale: float) -> float:
    """Check the scale of a patch: on disk, weights may be weakened or kept, but not amplified or negated.

    Raises:
        ArgumentError: It is no number in [0, 1].
    """
    value = checked_scale(scale)
    if not 0 <= value <= 1:
        raise ArgumentError(
            f"expected a number in [0, 1] for weights on disk, got {scale!r}; in memory, mask.applied(model, "
            "scale=…) takes any finite one",
            argument="scale",
        )
    return value
