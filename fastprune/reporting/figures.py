"""A plot as files: PNG to look at alone, SVG for the page.

In: a function that draws on a matplotlib Figure. Out: :class:`Plot`. Figures are made inside an ``rc_context`` that
starts from matplotlib's defaults, so pyplot's state and the user's style are neither read nor changed.
"""

from __future__ import annotations

import importlib
import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastprune.reporting.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

WIDE = 10.0  # inches; at 96 CSS pixels per inch the type of an SVG has its nominal size
TEXT, HEAD = 8.5, 10.0  # points

_STYLE: dict[RcKeyType, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same widths on every machine
    "font.size": TEXT,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a "$" in a category name is a dollar sign
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
    "figure.facecolor": LIGHT["surface"],
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
    """One plot with its words. ``draw(figure)`` fills an empty figure of ``size`` (width, height) inches.

    ``caption`` says what is shown, ``reading`` in one sentence how to read it, ``finding`` what it says here.
    """

    name: str
    title: str
    caption: str
    reading: str
    finding: str
    draw: Callable[[Figure], None]
    size: tuple[float, float]
    table: Table = field(default_factory=lambda: Table([], []))

    def png(self) -> bytes:
        """The picture at 160 dots per inch, with title and findings in it."""
        width, height = self.size
        words = textwrap.wrap(" ".join(part for part in (self.finding, self.reading) if part), int(width * 15.5))
        with _style(self.name):
            figure = _figure(width, height + 0.45 + 0.16 * (len(words) + 1))
            self.draw(figure)
            figure.suptitle(self.title, x=0.01, ha="left", fontsize=HEAD + 3, fontweight="bold")
            figure.supxlabel("\n".join(words), x=0.01, ha="left", fontsize=TEXT, color=LIGHT["muted"], linespacing=1.4)
            figure.set(dpi=160)
            return _printed(figure, "agg", "png", {"Title": self.title})

    def svg(self) -> str:
        """An ``<svg>`` element for HTML, without a size of its own and without links."""
        width, height = self.size
        with _style(self.name):
            figure = _figure(width, height)
            self.draw(figure)
            text = _printed(figure, "svg", "svg", dict.fromkeys(("Date", "Creator", "Format", "Type"))).decode("utf-8")
        # Inside HTML the element needs neither prolog nor namespaces; its unit is a point.
        content = text.partition("<svg")[2].partition(">")[2]
        return f'<svg viewBox="0 0 {72 * width:g} {72 * height:g}" aria-hidden="true">{content}'.strip()


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context(rc={**defaults, **_STYLE, "svg.hashsalt": salt}):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04, hspace=0.06)
    return Figure(figsize=(width, height), layout=engine)


def _printed(figure: Figure, backend: str, kind: str, metadata: dict[str, Any]) -> bytes:
    """Draw by the backend's canvas itself: ``savefig`` would draw everything twice to lay it out."""
    module = importlib.import_module(f"matplotlib.backends.backend_{backend}")
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
