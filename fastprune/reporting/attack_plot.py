"""Harm under each attack and depth, mask by mask: one depth alone may overstate what a mask removes.

In: a checked record. Out: a :class:`Plot`, or ``None`` for a record of one attack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastprune.reporting.figures import Plot, Table, panel_title
from fastprune.reporting.findings import subject
from fastprune.reporting.formatting import (
    DASH,
    MASKS,
    clean,
    count,
    model_label,
    ordered,
    percent,
    rate_cell,
    short,
)
from fastprune.reporting.masks import mask_label, role
from fastprune.reporting.palette import LIGHT
from fastprune.reporting.record import missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "o^sDvPX*"
_COLORS = ("muted", "harm", "aligned", "sft", "base", "other-1", "other-2", "other-3")


def attack_plot(record: Mapping[str, Any]) -> Plot | None:
    """The harm rate of each mask against the attacks, in the order in which they were measured, with intervals."""
    model = subject(record)
    rows = [row for row in record.get("attacks") or () if row["model"] == model]
    attacks = list(dict.fromkeys(row["attack"] for row in rows if not missing(row.get("harm"))))
    if len(attacks) < 2:
        return None
    kinds = list(dict.fromkeys(attack.partition(" ")[0] for attack in attacks))
    masks = ordered((row["mask"] for row in rows), MASKS)
    found = {(row["mask"], row["attack"]): row for row in rows}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, mask in enumerate(masks):
            line = [found.get((mask, attack), {}) for attack in attacks]
            values = [float("nan") if missing(row.get("harm")) else row["harm"] for row in line]
            # apart from each other, so that no interval hides another one
            places = [place + 0.08 * (number - (len(masks) - 1) / 2) for place in range(len(attacks))]
            color = LIGHT[_COLORS[min(number, len(_COLORS) - 1)]]
            for place, row in zip(places, line, strict=True):
                low, high = row.get("interval") or (None, None)
                if not missing(low) and not missing(high):
                    axes.plot([place, place], [low, high], color=color, linewidth=1, zorder=2)
            style: dict[str, Any] = {
                "color": color,
                "linewidth": 2 if role(record, mask) == "method" else 1.2,
                "marker": _MARKERS[number % len(_MARKERS)],
                "markersize": 5,
                "clip_on": False,
                "zorder": 3,
            }
            label = short(mask_label(record, mask)).lstrip("_")
            for kind in kinds:  # only depths of one attack are points of a line
                here = [place for place, attack in enumerate(attacks) if attack.partition(" ")[0] == kind]
                axes.plot([places[n] for n in here], [values[n] for n in here], label=label, **style)
                label = "_"  # which matplotlib leaves out of the legend
        axes.set_xticks(range(len(attacks)), [short(clean(attack)) for attack in attacks])
        axes.set_ylim(0, 1.0)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axes.grid(axis="y")
        panel_title(axes, "Harm rate, %", "should stay low under every attack · lines: 95 % intervals")
        figure.legend(loc="outside right upper", frameon=False)

    return Plot(
        name="attacks",
        title="Harm under each attack and depth",
        caption="A number is a depth: so many tokens of the reference reply are given to the model; “row” is the row's "
        "own prefill. Rows whose reply is too short for a depth are left out of it.",
        reading="A mask that holds has low points under every attack.",
        finding=_finding(record, rows),
        draw=draw,
        size=(3.2 + 1.1 * len(attacks), 3.4),
        table=_table(record, rows),
    )


def _finding(record: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    """The worst case of each mask of the method, beside its mildest."""
    sentences = []
    for mask in dict.fromkeys(row["mask"] for row in rows if row["mask"] != "none"):
        mine = [row for row in rows if row["mask"] == mask and not missing(row.get("harm"))]
        if role(record, mask) == "control" or len(mine) < 2:
            continue
        worst, best = max(mine, key=lambda row: row["harm"]), min(mine, key=lambda row: row["harm"])
        label = mask_label(record, mask)
        if percent(worst["harm"]) == percent(best["harm"]):
            sentences.append(f"With {label}, the harm rate is {percent(worst['harm'])} under every attack.")
        else:
            sentences.append(
                f"With {label}, the harm rate is {percent(worst['harm'])} under the worst attack "
                f"({clean(worst['attack'])}) and {percent(best['harm'])} under the mildest ({clean(best['attack'])})."
            )
    return " ".join(sentences)


def _table(record: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> Table:
    heads = ["model", "weights", "attack", "harm, %", "95 % interval", "rows", "cut at the limit"]
    body = []
    for row in rows:
        low, high = row.get("interval") or (None, None)
        body.append(
            [
                model_label(row["model"]),
                mask_label(record, row["mask"]),
                clean(row["attack"]),
                rate_cell(row.get("harm")),
                DASH if missing(low) or missing(high) else f"{rate_cell(low)} to {rate_cell(high)}",
                count(row.get("n")),
                count(row.get("cut")),
            ]
        )
    return Table(heads, body)
