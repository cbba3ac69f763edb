"""Words and number formats that page, plots, Markdown and terminal share.

In: names and values of a record. Out: text without markup; each renderer escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastprune.evaluation.attacks import ATTACKS
from fastprune.evaluation.judges import JUDGES, HarmJudge
from fastprune.reporting.record import RATES, missing

DASH = "–"
NBSP = "\u00a0"  # between a number and its unit

MODELS = {"base": "base", "sft": "SFT", "aligned": "aligned"}
MASKS = {
    "none": "not pruned",
    "btap": "B-TAP",
    "random": "random",
    "magnitude": "largest magnitude",
    "sign_flipped": "sign flipped",
    "unsigned": "unsigned",
    "no_set_difference": "no set difference",
    "recognition": "recognition pruned",
}
METRICS = {name: name for name in RATES}


def clean(text: object) -> str:
    """Any value as one line of printable text."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def short(text: object, limit: int = 24) -> str:
    """A name cut to ``limit`` characters, for places without room."""
    line = clean(text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def model_label(name: str) -> str:
    """Label of a model."""
    return MODELS.get(name, clean(name))


def ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The distinct names: known ones in their usual order, then the others in their given order."""
    seen = list(dict.fromkeys(names))
    first = [name for name in known if name in seen]
    return first + [name for name in seen if name not in first]


def listing(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def percent(value: float | None) -> str:
    """A rate in running text; only exactly 1 and 0 are 100 % and 0 %."""
    if missing(value):
        return DASH
    rounded = _rounded(value, 0) or _rounded(value, 1)
    return rounded or f"{'< 0.1' if value < 0.5 else '> 99.9'}{NBSP}%"


def percents(before: float, after: float) -> tuple[str, str]:
    """Two rates to compare, with the same number of decimals, enough to show that they differ.

    Returns:
        The two texts, which are equal for rates that agree to a hundredth of a percent.
    """
    for decimals in (0, 1, 2):
        old, new = _rounded(before, decimals), _rounded(after, decimals)
        if old and new and (old != new or before == after):
            return old, new
    return percent(before), percent(after)


def _rounded(value: float, decimals: int) -> str | None:
    """``None`` if rounding would make another rate 0 % or 100 %."""
    if value in (0, 1):
        return f"{100 * value:.0f}{NBSP}%"
    text = f"{100 * value:.{decimals}f}"
    return None if float(text) in (0, 100) else f"{text}{NBSP}%"


def figure_of(value: float | None) -> str:
    """:func:`percent` without the sign, for cells and bars whose head has it."""
    return percent(value).removesuffix(f"{NBSP}%")


def rate_cell(value: float | None) -> str:
    """A rate in a table whose head has the percent sign: always one decimal."""
    return DASH if missing(value) else f"{100 * value:.1f}"


def count(value: int | None) -> str:
    """A whole number with thousands separators."""
    return DASH if missing(value) else f"{value:,}"


def number(value: float | None) -> str:
    """Any other number: four significant digits, without an exponent if possible."""
    if missing(value):
        return DASH
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def check_value(value: float | None) -> str:
    """The measured value of a check, with three decimals so that a column of rates is aligned."""
    if missing(value) or not (value == 0 or 1e-3 <= abs(value) < 1000):
        return number(value)
    return f"{value:.3f}"


def share(part: float | None, whole: float | None = 1) -> str:
    """A share of many weights in percent, never with an exponent (0.0005 %)."""
    if missing(part) or missing(whole) or not whole:
        return DASH
    text = _significant(100 * part / whole)
    return (text.rstrip("0").rstrip(".") if "." in text else text) + f"{NBSP}%"


def per_mille(part: float, whole: float) -> str:
    """A share of one matrix in thousandths, without the sign."""
    return _significant(1000 * part / whole)


def _significant(value: float) -> str:
    """One decimal from 1 on, two significant digits below."""
    if value == 0:
        return "0"
    return f"{value:.{1 if value >= 1 else min(12, 1 - math.floor(math.log10(value)))}f}"


def seconds(value: float | None) -> str:
    """A duration with two or three digits."""
    if missing(value):
        return DASH
    if value >= 120:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes}{NBSP}min {rest:02d}{NBSP}s"
    return f"{value:.0f}{NBSP}s" if value >= 10 else f"{value:.2g}{NBSP}s"


def attack_phrase(record: Mapping[str, Any]) -> str:
    """`` under prefilling``, from the settings; empty where no attack is named."""
    name = (record.get("settings") or {}).get("attack")
    if not isinstance(name, str) or not name.strip():
        return ""
    phrase = ATTACKS[name].phrase if name in ATTACKS else f"under {clean(name)}"
    return f" {phrase}" if phrase else ""


def harm_judge(record: Mapping[str, Any]) -> HarmJudge:
    """The judge of harm that the settings name, else the one that compares with the reference."""
    name = (record.get("settings") or {}).get("judge")
    return JUDGES[name if isinstance(name, str) and name in JUDGES else "exact"]


def harm_terms(record: Mapping[str, Any]) -> str:
    """What qualifies the harm rate: `` under prefilling``, and the judge where it reads no more than keywords."""
    qualifier = harm_judge(record).qualifier
    return attack_phrase(record) + (f" {qualifier}" if qualifier else "")


def result_rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows of rates: ``results``, and ``dissociation`` (recognition pruned instead of harm)."""
    return [*(record.get("results") or ()), *(record.get("dissociation") or ())]


def grouped(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Rows by model (aligned, SFT, base, others), and within a model by mask in the usual order."""
    groups = []
    # the model of the findings first, then its controls
    for model in ordered((row["model"] for row in rows), reversed(MODELS)):
        mine = [row for row in rows if row["model"] == model]
        masks = ordered((row["mask"] for row in mine), MASKS)
        groups.append((model, [row for mask in masks for row in mine if row["mask"] == mask]))
    return groups


def measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The rates that at least one row has."""
    rows = list(rows)
    return [name for name in RATES if any(not missing(row.get(name)) for row in rows)]


def bound(text: str | None) -> str:
    """The bound of a check, with typographic signs."""
    return clean(text or DASH).replace(">=", "≥").replace("<=", "≤")


def find(rows: Sequence[Mapping[str, Any]] | None, model: str | None, mask: str) -> Mapping[str, Any] | None:
    """The first row of that model and mask."""
    return next((row for row in rows or () if row["model"] == model and row["mask"] == mask), None)


def extra_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns outside the schema (such as a perplexity), in their order."""
    known = {"model", "mask", "pruned", *RATES}
    return list(dict.fromkeys(key for row in rows for key in row if key not in known))


def cell(value: Any) -> str:
    """A value of any kind: number, truth value, text, or a short list of these."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{clean(key)}: {cell(item)}" for key, item in value.items()) or DASH
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item) for item in value) or DASH
    return clean(value) or DASH
