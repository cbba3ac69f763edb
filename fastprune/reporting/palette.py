"""The colours of the report: one name per meaning, one value for light and one for dark.

Plots are drawn in the light values; an SVG then refers to them by name (``var(--harm)``), so that one picture serves
both modes. Models are near-black, orange and blue, metrics magenta (harm: should fall) and green (abilities: should
stay): pairs that stay apart for red-green blind readers, and never the only mark, since markers, labels and panels
differ too.
All light values are distinct, or a colour could not be traced back to its name.
"""

from __future__ import annotations

import re

STEPS = 9  # shades of a heat map


def _ramp(name: str, shades: str) -> dict[str, str]:
    return {f"{name}-{step}": colour for step, colour in enumerate(shades.split())}


LIGHT = {
    "surface": "#fffffe",
    "ink": "#1c1b1a",
    "muted": "#5c5a55",
    "axis": "#a9a69e",
    "grid": "#e6e4df",
    "base": "#3f3d3a",
    "sft": "#b45f00",
    "aligned": "#0066b3",
    "other-1": "#7b4aa8",
    "other-2": "#00796f",
    "other-3": "#8a6d00",
    "harm": "#ad2a6b",
    "harm-tint": "#e6b8cf",
    "kept": "#00755a",
    "kept-tint": "#a9d6c8",
    "on-low": "#1d1c1b",
    "on-high": "#fefefe",
    **_ramp("weights", "#f1f5f9 #dce8f3 #c3d9ec #a5c8e4 #82b3da #3677ad #2a6aa3 #17548c #0b3e6d"),
    **_ramp("rate", "#f8f2f5 #f3e0ea #ecc9da #e3adc8 #d88fb3 #b04a80 #99306a #7f1e55 #62103f"),
}

DARK = {
    "surface": "#161719",
    "ink": "#ecebe7",
    "muted": "#a8a6a0",
    "axis": "#6a6964",
    "grid": "#303134",
    "base": "#d9d6cf",
    "sft": "#f0a04b",
    "aligned": "#5db3f5",
    "other-1": "#b895e6",
    "other-2": "#52c4b6",
    "other-3": "#cdb04a",
    "harm": "#ef7fb4",
    "harm-tint": "#6d3652",
    "kept": "#4fc6a2",
    "kept-tint": "#22574a",
    "on-low": "#ecebe7",
    "on-high": "#101113",
    **_ramp("weights", "#1d2228 #1f2d3a #21394e #244663 #265479 #5b9fd6 #78b4e4 #97c8ef #b9dcf8"),
    **_ramp("rate", "#251e22 #39212e #4d263b #622b49 #773157 #d4739f #e28eb3 #eea9c6 #f8c6da"),
}

_NAMES = {value: name for name, value in LIGHT.items()}
_PAINT = re.compile(r"\b(fill|stroke): (#[0-9a-f]{6})\b")


def shade(ramp: str, value: float, top: float) -> tuple[str, str]:
    """Cell and text colour of a heat map for ``value`` on a scale from 0 to ``top``; light half, dark half."""
    step = 0 if top <= 0 else min(STEPS - 1, int(STEPS * value / top))
    return LIGHT[f"{ramp}-{step}"], LIGHT["on-low" if step <= STEPS // 2 else "on-high"]


def model_colours(names: list[str]) -> dict[str, str]:
    """Colour of each model; the three known ones always have their own."""
    others = iter([LIGHT[f"other-{i}"] for i in (1, 2, 3)])
    return {name: LIGHT[name] if name in ("base", "sft", "aligned") else next(others, LIGHT["muted"]) for name in names}


def with_variables(svg: str) -> str:
    """Replace each palette colour of an SVG by a reference to its CSS variable."""
    return _PAINT.sub(lambda m: f"{m[1]}: var(--{_NAMES[m[2]]})" if m[2] in _NAMES else m[0], svg)


def variables(dark: bool) -> str:
    """The CSS declarations of one mode."""
    return "".join(f"--{name}:{value};" for name, value in (DARK if dark else LIGHT).items())
