"""The colors of the report: one name per meaning, with a light value and, where the page uses it, a dark one.

Pictures stand on a light ground in both modes. Models are near-black, orange and blue, metrics magenta (harm: should
fall) and green (abilities: should stay): pairs that red-green blind readers can tell apart, and never the only mark,
since markers, labels and panels differ too.
"""

from __future__ import annotations

STEPS = 9  # shades of a heat map


def _ramp(name: str, shades: str) -> dict[str, str]:
    return {f"{name}-{step}": color for step, color in enumerate(shades.split())}


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
    "aligned": "#5db3f5",
    "harm": "#ef7fb4",
    "kept": "#4fc6a2",
    "kept-tint": "#22574a",
}


def shade(ramp: str, value: float, top: float) -> tuple[str, str]:
    """Cell and text color of a heat map for ``value`` on a scale from 0 to ``top``; light half, dark half."""
    step = 0 if top <= 0 else min(STEPS - 1, int(STEPS * value / top))
    return LIGHT[f"{ramp}-{step}"], LIGHT["on-low" if step <= STEPS // 2 else "on-high"]


def model_colors(names: list[str]) -> dict[str, str]:
    """Color of each model; the three known ones always have their own."""
    others = iter([LIGHT[f"other-{i}"] for i in (1, 2, 3)])
    return {name: LIGHT[name] if name in ("base", "sft", "aligned") else next(others, LIGHT["muted"]) for name in names}


def variables(dark: bool) -> str:
    """The CSS declarations of one mode: the colors of the page's text, rules and bars."""
    return "".join(f"--{name}:{(DARK if dark else LIGHT)[name]};" for name in DARK)
