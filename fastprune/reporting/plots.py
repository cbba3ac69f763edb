"""The two plots of rates: harm and utility against q, and the controls side by side.

In: a checked record. Out: a :class:`Plot`, or ``None`` if the record has no data for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastprune.reporting.control_findings import controls_finding
from fastprune.reporting.figures import WIDE, Plot, Table, panel_title
from fastprune.reporting.findings import comparison, subject
from fastprune.reporting.formatting import (
    MASKS,
    METRICS,
    MODELS,
    NBSP,
    count,
    figure_of,
    find,
    harm_terms,
    listing,
    measured,
    model_label,
    ordered,
    rate_cell,
    result_rows,
    share,
    short,
)
from fastprune.reporting.masks import baseline, mask_label, role
from fastprune.reporting.palette import LIGHT, model_colors
from fastprune.reporting.plot_findings import sweep_finding
from fastprune.reporting.record import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MARKERS = {"base": "o", "sft": "s", "aligned": "^"}
NAN = float("nan")


def sweep_plot(record: Mapping[str, Any]) -> Plot | None:
    """Harm, utility and number of pruned weights against q, one line per model."""
    rows = sorted((row for row in record.get("sweep") or () if row["q"] > 0), key=lambda row: row["q"])
    keys = [key for key in ("harm", "utility", "pruned") if any(not missing(row.get(key)) for row in rows)]
    if not keys:
        return None
    models = ordered((row["model"] for row in rows), MODELS)
    colors = model_colors(models)
    settings = record.get("settings") or {}
    used = settings.get("q") if any(row["q"] == settings.get("q") for row in rows) else None
    scope = "all matrices" if settings.get("scope") == "global" else "each matrix"
    at_zero = {row["model"]: row for row in record.get("sweep") or () if row["q"] == 0}
    unpruned = {name: find(record.get("results"), name, "none") or at_zero.get(name) or {} for name in models}

    def panel(axes: Axes, key: str) -> dict[str, Line2D]:
        drawn: dict[str, Line2D] = {}
        for name in models:
            line = [row for row in rows if row["model"] == name]
            # a log axis has no 0
            gone = [missing(row.get(key)) or (key == "pruned" and row[key] == 0) for row in line]
            values = [NAN if skip else row[key] for row, skip in zip(line, gone, strict=True)]
            if all(math.isnan(value) for value in values):
                continue
            (drawn[name],) = axes.plot(
                [row["q"] for row in line], values, color=colors[name], linewidth=2, markersize=5,
                marker=MARKERS.get(name, "D"), markeredgecolor=LIGHT["surface"], markeredgewidth=0.6,
                clip_on=False, zorder=3,
            )  # fmt: skip
            level = unpruned[name].get(key)
            if key != "pruned" and not missing(level):
                axes.axhline(level, color=colors[name], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if key == "pruned":
            axes.set_yscale("log")
            _plain_log(axes.yaxis, [row[key] for row in rows if not missing(row.get(key)) and row[key] > 0])
        else:
            axes.set_ylim(0, 1.0)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        if used is not None:
            axes.axvline(used, color=LIGHT["axis"], linewidth=1, zorder=0)
        axes.grid(axis="y")
        return drawn

    titles = {
        "harm": (f"Harm rate{harm_terms(record)}, %", "should fall · dashed: not pruned"),
        "utility": ("Utility, %", "should stay · dashed: not pruned"),
        "pruned": ("Weights removed", "count (log scale)"),
    }

    def draw(figure: Figure) -> None:
        ratios = [0.8 if key == "pruned" else 1 for key in keys]
        grid = figure.subplots(ncols=len(keys), width_ratios=ratios, squeeze=False).ravel()
        lines: dict[str, Line2D] = {}
        for axes, key in zip(grid, keys, strict=True):
            axes.set_xscale("log")
            lines |= panel(axes, key)
            _ticks_at(axes, [row["q"] for row in rows], 5 if key == "pruned" else 6)
            axes.set_xlabel(f"q, % of {scope} (log scale)")
            panel_title(axes, *titles[key])
        if lines:
            shown = [name for name in models if name in lines]
            # matplotlib leaves out of a legend what begins with an underscore
            labels = [short(model_label(name)).lstrip("_") for name in shown]
            figure.legend([lines[name] for name in shown], labels, loc="outside right upper", frameon=False)

    line = "" if used is None else f" The upright line marks q = {share(used)}, which the rest of this report uses."
    return Plot(
        name="sweep",
        title="How much harm and utility are left as more weights are removed",
        caption=f"q is the share of {scope} that the harm score nominates; candidates that benign skills need are "
        f"spared, so fewer are removed.{line}",
        reading="Follow a line to the right: pruning works where harm has fallen and utility has not.",
        finding=sweep_finding(record),
        draw=draw,
        size=(0.8 + 3.1 * len(keys), 3.5),
        table=_sweep_table(rows),
    )


def _sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    rates = measured(rows)
    models = ordered((row["model"] for row in rows), MODELS)
    body = [
        [
            model_label(row["model"]),
            share(row["q"]),
            count(row.get("pruned")),
            *(rate_cell(row.get(name)) for name in rates),
        ]
        for row in sorted(rows, key=lambda row: models.index(row["model"]))
    ]
    return Table(["model", "q", "removed", *(f"{METRICS[name]}, %" for name in rates)], body)


def _ticks_at(axes: Axes, values: Sequence[float], at_most: int) -> None:
    """Ticks at the measured points, without those whose labels would touch."""
    from matplotlib import ticker

    points = sorted(set(values))
    width = math.log10(points[-1] / points[0]) or 1.0
    kept: list[float] = []
    for point in reversed(points):
        if not kept or math.log10(kept[-1] / point) >= width / at_most:
            kept.append(point)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xticks(kept, [share(point).removesuffix(f"{NBSP}%") for point in kept])
    margin = 10 ** (0.06 * width)
    axes.set_xlim(points[0] / margin, points[-1] * margin)


def _plain_log(axis: Any, values: Sequence[int]) -> None:
    """A log axis whose ticks read 200, 500, 1,000 instead of powers of ten."""
    from matplotlib import ticker

    low, high = (min(values), max(values)) if values else (1, 10)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10**d for d in decades for m in ((1, 2, 5) if len(decades) <= 4 else (1,))]
    first = max((m for m in marks if m <= low), default=low)
    last = min((m for m in marks if m >= high and m > first), default=max(high, 2 * low))
    axis.set_minor_locator(ticker.NullLocator())
    ticks = [m for m in marks if first <= m <= last]
    axis.set_ticks(ticks, [f"{m:,.0f}" for m in ticks])
    axis.axes.set_ylim(first, last)


def _label_at(value: float | None, level: float | None) -> float:
    """Where a bar's number starts: at the end of the bar, or after a reference line that would cross the number."""
    if missing(value):
        return 0.0
    return level if not missing(level) and 0 < level - value < 0.17 else value


def _tick(record: Mapping[str, Any], mask: str) -> str:
    """The name at a bar; the number in that of a patched model gets its own line and is never cut."""
    label = mask_label(record, mask)
    return label.replace(" (", "\n(") if mask == "none" else short(label)


def controls_plot(record: Mapping[str, Any]) -> Plot | None:
    """All measured rates for each way of choosing weights, on one model."""
    model = subject(record)
    rows = [row for row in result_rows(record) if row["model"] == model]
    first = (find(rows, model, mask) for mask in ordered((row["mask"] for row in rows), MASKS))
    rows = [row for row in first if row is not None]
    metrics = measured(rows)
    if model is None or len(rows) < 2 or not metrics:
        return None
    reference = find(rows, model, "none") or {}
    found = comparison(record)
    main = [] if found is None else [row["mask"] for row in found.after]

    def panel(axes: Axes, metric: str, labelled: bool) -> None:
        strong, tint = ("harm", "harm-tint") if metric == "harm" else ("kept", "kept-tint")
        level = reference.get(metric)
        for place, row in enumerate(rows):
            value, chosen = row.get(metric), row["mask"] in main
            if not missing(value):
                axes.barh(place, value, height=0.68, color=LIGHT[strong if chosen else tint])
            axes.annotate(
                figure_of(value), (_label_at(value, level), place), xytext=(4, 0),
                textcoords="offset points", va="center", color=LIGHT["ink"], fontweight="bold" if chosen else "normal",
            )  # fmt: skip
        if not missing(level):
            axes.axvline(level, color=LIGHT["muted"], linewidth=1, linestyle=(0, (4, 3)), zorder=3)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_yticks(range(len(rows)), [_tick(record, row["mask"]) for row in rows] if labelled else [])
        for text, row in zip(axes.get_yticklabels(), rows, strict=False):
            text.set(color=LIGHT["ink"], fontweight="bold" if row["mask"] in main else "normal")
        axes.set_xlim(0, 1.18)
        axes.set_xticks([0, 0.5, 1], ["0", "50", "100"])
        axes.tick_params(axis="y", length=0)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="x")
        panel_title(axes, f"{METRICS[metric].capitalize()}, %", "should fall" if metric == "harm" else "should stay")

    def draw(figure: Figure) -> None:
        grid = figure.subplots(ncols=len(metrics), squeeze=False).ravel()
        for position, (axes, metric) in enumerate(zip(grid, metrics, strict=True)):
            panel(axes, metric, position == 0)

    counts = [row["pruned"] for row in rows if row["mask"] != "none" and not missing(row.get("pruned"))]
    same = f" Every mask removes {count(counts[0])} weights." if len(counts) > 1 and len(set(counts)) == 1 else ""
    label = short(model_label(model))
    rest = {role(record, row["mask"]) for row in rows if row["mask"] not in ("none", *main)}
    method = ""
    if main and all(role(record, mask) == "method" for mask in main):
        names = listing([mask_label(record, mask) for mask in main])
        method = f"; {names} {'is' if len(main) == 1 else 'are masks of'} the method"
        method += ", the others are controls" if rest == {"control"} else ""
    return Plot(
        name="controls",
        title=f"What each choice of weights does to {f'the {label} model' if model in MODELS else label}",
        caption=f"Dashed: the level {baseline(record)}.{same}",
        reading=f"A good choice has a short bar for harm and long bars for everything else{method}.",
        finding=controls_finding(record),
        draw=draw,
        size=(WIDE if len(metrics) > 2 else 6.0, 0.27 * len(rows) + 0.85),
    )
