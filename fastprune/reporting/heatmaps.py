"""The two heat maps: where the pruned weights are, and whether the mask of one category works on the others.

In: a checked record. Out: a :class:`Plot`, or ``None`` if the record has no data for it. Blue is for weights, magenta
for harm, as in the whole report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastprune.reporting.figures import TEXT, WIDE, Plot, Table
from fastprune.reporting.formatting import (
    DASH,
    clean,
    count,
    figure_of,
    harm_terms,
    model_label,
    per_mille,
    rate_cell,
    short,
)
from fastprune.reporting.palette import LIGHT, STEPS, shade
from fastprune.reporting.plot_findings import heatmap_finding, transfer_finding
from fastprune.reporting.record import missing
from fastprune.reporting.significance import points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = Sequence[Sequence[float | None]]
# With more rows the numbers in the cells would be too small to read, so that only colors are shown.
READABLE_ROWS = 16
HALF = "95 % interval, points at most"
GAP = 0.25  # between the masks and the reference row, in cells


def heatmap_plot(record: Mapping[str, Any]) -> Plot | None:
    """Pruned weights per layer and matrix, as a share of each matrix."""
    data = record.get("heatmap")
    if not data or not data["layers"] or not data["matrices"]:
        return None
    layers, sizes, counts = data["layers"], data.get("sizes"), data["counts"]
    names, ending = _without_common_ending([clean(name) for name in data["matrices"]])

    def value(row: int, column: int) -> float | None:
        n = counts[row][column]
        if sizes is None or missing(n):
            return n
        size = sizes[row][column]
        return None if missing(size) or not size else 1000 * n / size

    values = [[value(row, column) for column in range(len(names))] for row in range(len(layers))]
    no_sizes = [[None] * len(names)] * len(layers)
    top = max((v for row in values for v in row if not missing(v)), default=0)
    numbers = len(layers) <= READABLE_ROWS and len(names) <= READABLE_ROWS

    cell = 0.42 if numbers else max(0.12, min(0.3, 6 / len(layers)))  # height in inches

    def words(row: int, column: int) -> str:
        n = counts[row][column]
        if missing(values[row][column]):
            return DASH
        return count(n) if sizes is None else f"{per_mille(n, sizes[row][column])}\n({count(n)})"

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _cells(axes, values, top, "weights", words if numbers else lambda row, column: "")
        _labels(axes, [str(layer) for layer in layers], [short(name, 18) for name in names])
        axes.set_ylabel("layer")
        axes.set_xlabel(f"weight matrix ({clean(ending)} left out)" if ending else "weight matrix")
        end = f"{top:,} weights removed" if sizes is None else f"{per_mille(top, 1000)} ‰ of the matrix removed"
        _scale(axes, cell, end)

    unit = "the number of weights removed" if sizes is None else "the share of that matrix removed, per mille (‰)"
    second = ", with the count in brackets" if numbers and sizes is not None else ""
    model = f" on the {short(model_label(data['model']))} model" if data.get("model") else ""
    return Plot(
        name="heatmap",
        title="Where the removed weights are",
        caption=f"Each cell is one weight matrix{model}; its {'number' if numbers else 'color'} is {unit}{second}.",
        reading="The stronger the color, the more of that matrix is gone; "
        "rows go from the input (top) to the output (bottom).",
        finding=heatmap_finding(record),
        draw=draw,
        size=(max(6.0, min(WIDE, 1.6 + 0.8 * len(names))), 1.5 + cell * len(layers)),
        table=Table(
            ["layer", *(clean(name) for name in data["matrices"])],
            [
                [str(layer), *(_counted(n, size) for n, size in zip(line, size_line, strict=True))]
                for layer, line, size_line in zip(layers, counts, sizes or no_sizes, strict=True)
            ],
        ),
    )


def transfer_plot(record: Mapping[str, Any]) -> Plot | None:
    """Harm left on every category after pruning on each one, and the overlap of the masks."""
    data = record.get("transfer")
    if not data or not data["categories"]:
        return None
    names = [clean(name) for name in data["categories"]]
    n = len(names)
    unpruned, overlap = data.get("unpruned"), data.get("overlap")
    harm = [*data["harm"], unpruned] if unpruned else data["harm"]
    row_names = [*names, "not pruned"] if unpruned else names
    tops = [short(name, 14) for name in names]
    sizes = data.get("n")
    tested = [f"{top} ({count(size)})" for top, size in zip(tops, sizes, strict=True)] if sizes else tops
    longest = max(map(len, tested))
    height = 0.36 * len(row_names) + 1.05 + (0.065 * longest if longest > 6 else 0)

    def whole(grid: Grid) -> Callable[[int, int], str]:
        return lambda row, column: figure_of(grid[row][column])

    def draw(figure: Figure) -> None:
        n_panels = 2 if overlap else 1
        panels = figure.subplots(1, n_panels, squeeze=False).ravel()
        numbers = n <= READABLE_ROWS
        _cells(panels[0], harm, 1.0, "rate", whole(harm) if numbers else lambda r, c: "", gap_after=n)
        _labels(panels[0], [short(name, 22) for name in row_names], tested, n)
        panels[0].set(
            xlabel="category tested (held-out prompts)" if sizes else "category tested", ylabel="category pruned on"
        )
        panels[0].set_title(f"Harm rate{harm_terms(record)}, %")
        _outline_diagonal(panels[0], n)
        if overlap:
            _cells(panels[1], overlap, 1.0, "weights", whole(overlap) if numbers else lambda r, c: "")
            _labels(panels[1], [short(name, 22) for name in names], tops)
            panels[1].set(xlabel="category pruned on", ylabel="category pruned on")
            panels[1].set_title("Overlap of two masks (Jaccard), %")
            panels[1].set_ylim(panels[0].get_ylim())  # the rows of both panels stand side by side

    return Plot(
        name="transfer",
        title="Pruned on one category of harm, tested on all",
        caption="Each row is one mask, made from the harmful examples of a single category"
        + ("; the last row is the model without pruning." if unpruned else ".")
        + (" Overlap is the number of weights that two masks share, over the number in either." if overlap else ""),
        reading="If harm is one shared mechanism, a row of the first map stays near 0 all along, "
        "not only in its outlined cell.",
        finding=transfer_finding(record),
        draw=draw,
        size=(WIDE if overlap else 6.0, height),
        table=Table(
            ["pruned on \\ tested on", *(f"{name}, %" for name in names)],
            [[name, *(rate_cell(v) for v in row)] for name, row in zip(row_names, harm, strict=True)]
            + ([["held-out prompts", *map(count, sizes)], [HALF, *map(_half, sizes)]] if sizes else []),
        ),
    )


def _cells(
    axes: Axes,
    values: Grid,
    top: float,
    ramp: str,
    words: Callable[[int, int], str],
    gap_after: int | None = None,
) -> None:
    """Fill axes with one rectangle per value; rows from ``gap_after`` on are set apart."""
    from matplotlib.patches import Rectangle

    for row, line in enumerate(values):
        y = row + (GAP if gap_after is not None and row >= gap_after else 0)
        for column, value in enumerate(line):
            fill, ink = ("none", LIGHT["muted"]) if missing(value) else shade(ramp, value, top)
            axes.add_patch(Rectangle((column - 0.47, y - 0.47), 0.94, 0.94, facecolor=fill, edgecolor="none"))
            axes.text(column, y, words(row, column), ha="center", va="center", color=ink, fontsize=TEXT).set_in_layout(
                False
            )
    bottom = len(values) - 0.5 + (GAP if gap_after is not None and len(values) > gap_after else 0)
    axes.set(xlim=(-0.5, len(values[0]) - 0.5), ylim=(bottom, -0.5))
    for spine in axes.spines.values():
        spine.set_visible(False)


def _labels(axes: Axes, rows: Sequence[str], columns: Sequence[str], gap_after: int | None = None) -> None:
    """Names at the left and on top, as in a table."""
    at = range(0, len(rows), 1 if len(rows) <= 32 else 4)
    places = [place + (GAP if gap_after is not None and place >= gap_after else 0) for place in at]
    axes.set_yticks(places, [rows[place] for place in at])
    crowded = max(map(len, columns)) > 9
    turn: dict[str, Any] = {"rotation": 40, "ha": "left", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(range(len(columns)), columns, **turn)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)


def _outline_diagonal(axes: Axes, n: int) -> None:
    from matplotlib.patches import Rectangle

    for i in range(n):
        axes.add_patch(
            Rectangle((i - 0.47, i - 0.47), 0.94, 0.94, facecolor="none", edgecolor=LIGHT["ink"], linewidth=1.4)
        )


def _scale(axes: Axes, cell: float, top: str) -> None:
    """The colors in order under the last row, with both ends of the scale; a row is ``cell`` inches high."""
    from matplotlib.patches import Rectangle

    (left, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    start, width = left + 0.035 * (right - left), 0.035 * (right - left)
    high, gap = 0.16 / cell, 0.14 / cell
    middle = bottom + gap + high / 2
    for step in range(STEPS):
        fill, _ = shade("weights", step + 0.5, STEPS)
        axes.add_patch(Rectangle((start + step * width, bottom + gap), width, high, facecolor=fill, edgecolor="none"))
    for x, words, side in (
        (start - 0.2 * width, "0", "right"),
        (start + (STEPS + 0.3) * width, top, "left"),
    ):
        axes.text(x, middle, words, ha=side, va="center", color=LIGHT["muted"], fontsize=TEXT)
    axes.set_ylim(bottom + gap + high, axes.get_ylim()[1])


def _half(n: int | None) -> str:
    return DASH if missing(n) or not n else f"± {points(n)}"


def _counted(n: int | None, size: int | None) -> str:
    return count(n) if missing(size) or missing(n) else f"{count(n)} of {count(size)}"


def _without_common_ending(names: list[str]) -> tuple[list[str], str]:
    """``q_proj, k_proj`` as ``q, k`` and ``_proj``: an ending that all names share tells nothing."""
    endings = {name[name.rfind("_") :] if "_" in name else "" for name in names}
    ending = endings.pop() if len(endings) == 1 and len(names) > 1 else ""
    if not ending or any(len(name) <= len(ending) for name in names):
        return names, ""
    return [name[: -len(ending)] for name in names], f"…{ending}"
