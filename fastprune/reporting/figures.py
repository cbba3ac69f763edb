"""A plot as files: PNG to look at alone, SVG for the page, wide for a desk and narrow for a phone.

In: a function that draws on a matplotlib Figure. Out: :class:`Plot`. Works on Figure objects inside an
``rc_context`` that starts from matplotlib's defaults: neither pyplot's state nor the user's style is read or left
changed. Must not know what is drawn.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastprune.errors import require
from fastprune.reporting.palette import LIGHT, with_variables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 10.0, 4.0  # inches; at 96 CSS pixels per inch the type of an SVG has its nominal size
SMALL, TEXT, HEAD = 7.5, 8.5, 10.0  # points

_STYLE = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same widths on every machine
    "font.size": TEXT,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a "$" in somebody's category name is a dollar sign
    "axes.edgecolor": LIGHT["axis"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": TEXT,
    "axes.titlesize": HEAD,
    "axes.titlelocation": "left",
    "axes.titlecolor": LIGHT["ink"],
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": LIGHT["axis"],
    "ytick.color": LIGHT["axis"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "svg.fonttype": "none",  # real text: sharp, searchable, and in the page's own typeface
}


@dataclass(frozen=True)
class Table:
    """The numbers behind a plot: heads and rows of text, the first column being names."""

    heads: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Plot:
    """One plot with its words. ``draw(figure, narrow)`` fills an empty figure of ``size(narrow)`` inches.

    ``caption`` says what is shown, ``reading`` in one sentence how to read it, ``finding`` what it says here.
    """

    name: str
    title: str
    caption: str
    reading: str
    finding: str
    draw: Callable[[Figure, bool], None]
    size: Callable[[bool], tuple[float, float]]
    table: Table = field(default_factory=lambda: Table([], []))

    def png(self) -> bytes:
        """The wide picture at 160 dots per inch, light, with title and caption in it."""
        width, height = self.size(False)
        words = textwrap.wrap(" ".join(part for part in (self.finding, self.reading) if part), int(width * 15.5))
        with _style(self.name):
            figure = _figure(width, height + 0.45 + 0.16 * (len(words) + 1))
            self.draw(figure, False)
            figure.suptitle(self.title, x=0.01, ha="left", fontsize=HEAD + 3, fontweight="bold")
            figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=TEXT, color=LIGHT["muted"], linespacing=1.4)
            figure.set(dpi=160, facecolor=LIGHT["surface"])
            return _printed(figure, "agg", "png", {"Title": self.title})

    def svg(self, narrow: bool) -> str:
        """An ``<svg>`` element for HTML: no size, no links, colours by CSS variables, identifiers of its own."""
        with _style(f"{self.name}-{'narrow' if narrow else 'wide'}"):
            figure = _figure(*self.size(narrow))
            self.draw(figure, narrow)
            text = _printed(figure, "svg", "svg", dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode("utf-8")
        # Its style sheet would rule the whole page, where an inline picture has no scope of its own.
        text = re.sub(r"<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
        head, body = text.split(">", 1)
        view_box = re.search(r'viewBox="[^"]*"', head)
        body = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--type)", body)
        return with_variables(f'<svg {view_box[0] if view_box else ""} aria-hidden="true">{body}').strip()


@contextmanager
def _style(salt: str) -> Iterator[None]:
    matplotlib = require("matplotlib", "report")
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(rc={**defaults, **_STYLE, "svg.hashsalt": salt}):
        yield


def _figure(width: float, height: float) -> Figure:
    figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
    return figure


def _printed(figure: Figure, backend: str, kind: str, metadata: dict[str, Any]) -> bytes:
    """Draw by the backend's canvas itself: ``savefig`` would draw everything twice to lay it out."""
    module = require(f"matplotlib.backends.backend_{backend}", "report")
    canvas = getattr(module, f"FigureCanvas{backend.capitalize() if backend == 'agg' else backend.upper()}")(figure)
    buffer = io.BytesIO()
    getattr(canvas, f"print_{kind}")(buffer, metadata=metadata)
    return buffer.getvalue()


def panel_title(axes: Axes, title: str, subtitle: str = "") -> None:
    """A bold title with a quiet second line."""
    axes.set_title(title, pad=18 if subtitle else 6)
    if subtitle:
        axes.annotate(
            subtitle, (0, 1), xytext=(0, 6), xycoords="axes fraction", textcoords="offset points",
            fontsize=TEXT, color=LIGHT["muted"], va="bottom",
        )  # fmt: skip


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions for labels, at least ``gap`` apart and within [low, high] if they fit.

    Labels that would touch form a crowd, centred on the mean of its values.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    crowds: list[list[int]] = []
    for index in order:
        crowds.append([index])
        while len(crowds) > 1:
            below, above = crowds[-2:]
            if _bottom(values, above, gap) >= _bottom(values, below, gap) + gap * len(below):
                break
            crowds[-2:] = [below + above]
    placed = [_bottom(values, crowd, gap) + gap * step for crowd in crowds for step in range(len(crowd))]
    for step in range(len(placed)):
        placed[step] = max(placed[step], placed[step - 1] + gap if step else low)
    for step in reversed(range(len(placed))):
        placed[step] = min(placed[step], placed[step + 1] - gap if step + 1 < len(placed) else high)
    return [placed[order.index(index)] for index in range(len(values))]


def _bottom(values: list[float], crowd: list[int], gap: float) -> float:
    return sum(values[index] for index in crowd) / len(crowd) - gap * (len(crowd) - 1) / 2
