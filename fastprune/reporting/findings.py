"""Sentences that are computed from a record: the headline, and what each plot shows.

In: a checked record. Out: text without markup. A sentence says what the numbers say, also where the effect is absent,
where a control does as much, and where an ability was lost. Must not know how text is shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastprune.reporting.record import RATES, missing
from fastprune.reporting.wording import (
    MASKS,
    METRICS,
    MODELS,
    attack_phrase,
    clean,
    count,
    find,
    mask_label,
    model_label,
    ordered,
    per_mille,
    percent,
    share,
)

# Two rates closer than this are called the same: with 64 prompts one answer is 0.016 and the 95 % interval of a rate
# of 0.98 is about 0.05 wide.
SAME = 0.05
# A smaller fall of the harm rate than this is not called an effect.
EFFECT = 0.10


@dataclass(frozen=True)
class Comparison:
    """The rows that the headline is about; ``before`` or ``random`` may be absent."""

    model: str
    after: Mapping[str, Any]
    before: Mapping[str, Any] | None
    random: Mapping[str, Any] | None


def subject(record: Mapping[str, Any]) -> str | None:
    """The model that headline and controls speak of: the aligned one, else the one with the most masks."""
    rows = record.get("results") or ()
    models = ordered((row["model"] for row in rows), ("aligned",))
    if not models or models[0] == "aligned":
        return models[0] if models else None
    return max(models, key=lambda model: sum(row["model"] == model for row in rows))


def comparison(record: Mapping[str, Any]) -> Comparison | None:
    """Pick pruned, unpruned and random rows of the subject; ``None`` when nothing was pruned."""
    model = subject(record)
    rows = [row for row in record.get("results") or () if row["model"] == model]
    pruned = [row for row in rows if row["mask"] != "none"]
    after = find(pruned, model, "btap") or next((row for row in pruned if row["mask"] not in MASKS), None)
    after = after or (pruned[0] if len(pruned) == 1 else None)
    if after is None:
        return None
    random = find(rows, model, "random")
    return Comparison(model, after, find(rows, model, "none"), None if random is after else random)


def headline(record: Mapping[str, Any]) -> str:
    """The main finding in one to three sentences; empty without results."""
    rows = record.get("results") or ()
    attack = attack_phrase(record)
    found = comparison(record)
    if found is None:
        row = find(rows, subject(record), "none") if rows else None
        if row is None or missing(row.get("harm")):
            return ""
        utility = "" if missing(row.get("utility")) else f" and utility is {percent(row['utility'])}"
        return f"Without pruning, the harm rate{attack} is {percent(row['harm'])}{utility}."
    sentences = [f"{_removing(record, found.after)} {_harm_clause(found, attack)}{_utility_clause(found)}."]
    before = found.before or {}
    lost = [
        f"{METRICS[name]} falls from {percent(before[name])} to {percent(found.after[name])}"
        for name in ("neighbour", "recognition", "refusal")
        if _fell(before, found.after, name)
    ]
    if lost:
        sentences.append(f"But {_listing(lost)}.")
    random = _random_sentence(found)
    if random:
        sentences.append(random)
    return " ".join(sentences)


def _removing(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    total = (record.get("model") or {}).get("parameters")
    known = not missing(row.get("pruned"))
    facts = [f"{share(row['pruned'], total)} of the model"] if known and not missing(total) and total else []
    if row["mask"] != "btap":
        facts.append(mask_label(row["mask"]))
    start = f"Removing {count(row['pruned'])} weights" if known else "Pruning"
    return f"{start} ({', '.join(facts)})" if facts else start


def _harm_clause(found: Comparison, attack: str) -> str:
    after = found.after.get("harm")
    before = None if found.before is None else found.before.get("harm")
    if missing(after):
        return "was not tested for harm"
    if missing(before):
        return f"gives a harm rate{attack} of {percent(after)} (the unpruned level is not in this record)"
    if before < EFFECT:
        unpruned = f"{percent(before)} without pruning"
        return f"leaves little to see: the harm rate{attack} is {unpruned} and {percent(after)} with it"
    if before - after >= EFFECT:
        return f"takes the harm rate{attack} from {percent(before)} to {percent(after)}"
    if after - before > SAME:
        change = f"raises the harm rate{attack} from {percent(before)} to {percent(after)}"
    elif percent(before) == percent(after):
        change = f"leaves the harm rate{attack} at {percent(after)}"
    else:
        change = f"hardly changes the harm rate{attack} ({percent(before)} before, {percent(after)} after)"
    return f"{change}: no harm was removed in this run"


def _utility_clause(found: Comparison) -> str:
    after = found.after.get("utility")
    before = None if found.before is None else found.before.get("utility")
    if missing(after):
        return ""
    if missing(before):
        return f"; utility is {percent(after)}"
    if abs(after - before) <= 0.02:
        return f"; utility stays at {percent(after)}"
    return f"; utility {'falls' if after < before else 'rises'} from {percent(before)} to {percent(after)}"


def _fell(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    old, new = before.get(name), after.get(name)
    return not missing(old) and not missing(new) and old - new > EFFECT


def _random_sentence(found: Comparison) -> str:
    if found.random is None or found.before is None:
        return ""
    before, after, harm = found.before.get("harm"), found.after.get("harm"), found.random.get("harm")
    if missing(before) or missing(harm):
        return ""
    n = found.random.get("pruned")
    same_count = not missing(n) and n == found.after.get("pruned")
    start = "Removing as many random weights" if same_count else f"Removing {count(n)} random weights"
    if missing(n):
        start = "Removing random weights"
    if abs(before - harm) <= SAME:
        u0, u1 = found.before.get("utility"), found.random.get("utility")
        if missing(u0) or missing(u1) or abs(u0 - u1) <= SAME:
            return f"{start} changes nothing (harm rate {percent(harm)})."
        return f"{start} leaves the harm rate at {percent(harm)} and takes utility from {percent(u0)} to {percent(u1)}."
    if harm > before:
        return f"{start} raises the harm rate to {percent(harm)}."
    fall = before - after if not missing(after) else 0
    also = ", so the fall is not special to the chosen weights" if fall >= EFFECT and before - harm >= fall / 2 else ""
    return f"{start} takes the harm rate from {percent(before)} to {percent(harm)}{also}."


def controls_finding(record: Mapping[str, Any]) -> str:
    """Which controls lower harm as well, and what that costs; empty without controls or without the unpruned level."""
    model = subject(record)
    found = comparison(record)
    rows = [row for row in record.get("results") or () if row["model"] == model and not missing(row.get("harm"))]
    before = find(rows, model, "none")
    controls = [row for row in rows if row is not before and (found is None or row is not found.after)]
    if before is None or not controls:
        return ""
    also = [row for row in controls if before["harm"] - row["harm"] >= EFFECT]
    points = f"by {100 * EFFECT:.0f} points or more"
    instead = "".join(f" {sentence}" for sentence in _dissociation(record, before))
    if not also:
        only = "The control does not lower" if len(controls) == 1 else f"None of the {len(controls)} controls lowers"
        return f"{only} harm {points}.{instead}"
    parts = []
    for row in also:
        lost = [
            f"{METRICS[name]} {percent(row[name])}" for name in RATES if name != "harm" and _fell(before, row, name)
        ]
        price = f", but {_listing(lost)}" if lost else ""
        parts.append(f"{mask_label(row['mask'])} (harm {percent(row['harm'])}{price})")
    verb = "lower" if len(also) > 1 else "lowers"
    return f"{len(also)} of {len(controls)} controls {verb} harm {points}: {_listing(parts)}.{instead}"


def _dissociation(record: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What happens where the recognition of harm is pruned in the place of harm."""
    sentences = []
    for row in record.get("dissociation") or ():
        if row["model"] != before["model"] or row["mask"] != "recognition":
            continue
        parts = [
            f"{METRICS[name]} from {percent(before[name])} to {percent(row[name])}"
            for name in ("recognition", "harm")
            if not missing(before.get(name)) and not missing(row.get(name))
        ]
        if parts:
            sentences.append(f"Pruning recognition instead takes {_listing(parts)}.")
    return sentences


def checks_summary(record: Mapping[str, Any]) -> str:
    """How many checks hold; empty without checks."""
    checks = record.get("checks") or ()
    if not checks:
        return ""
    held = sum(bool(check["holds"]) for check in checks)
    if held == len(checks):
        return f"All {held} checks hold." if held > 1 else "The one check holds."
    return f"{len(checks) - held} of {len(checks)} checks {'does' if len(checks) - held == 1 else 'do'} not hold."


def noise(record: Mapping[str, Any]) -> str:
    """How far a rate may be off by chance, from the number of held-out prompts; empty where that is not said."""
    n = (record.get("settings") or {}).get("n_eval")
    which = "rate"
    if isinstance(n, Mapping):  # one number for each set of rows
        which, n = "harm rate", next((value for key, value in n.items() if "harm" in key), None)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        return ""
    # 95 % interval of a binomial rate at its widest, p = 1/2.
    points = math.ceil(100 * 1.96 * math.sqrt(0.25 / n))
    return (
        f"Each {which} is over {n:,} held-out prompts: one prompt is {100 / n:.2g} points, "
        f"and chance alone can move a rate by up to ±{points} points."
    )


def sweep_finding(record: Mapping[str, Any]) -> str:
    """The harm left on each model at the q of the run (else the largest q of the sweep)."""
    rows = [row for row in record.get("sweep") or () if row["q"] > 0 and not missing(row.get("harm"))]
    if not rows:
        return ""
    q = (record.get("settings") or {}).get("q")
    if not any(row["q"] == q for row in rows):
        q = max(row["q"] for row in rows)
    at = {row["model"]: row["harm"] for row in rows if row["q"] == q}
    parts = [f"{percent(at[name])} on {model_label(name)}" for name in ordered(at, MODELS)]
    return f"At q = {share(q)} the harm rate is {_listing(parts)}."


def heatmap_finding(record: Mapping[str, Any]) -> str:
    """Where the pruned weights sit most densely, and how many there are."""
    data = record["heatmap"]
    cells = []
    for row, layer in enumerate(data["layers"]):
        for column, name in enumerate(data["matrices"]):
            n = data["counts"][row][column]
            size = data["sizes"][row][column] if data.get("sizes") else None
            if not missing(n):
                cells.append((n / size if size else 0.0, n, layer, clean(name), size))
    total = sum(item[1] for item in cells)
    if not total:
        return "No weight was removed."
    most = max(cells, key=lambda item: item[:2])
    of_size = f" of {count(most[4])} weights ({per_mille(most[1], most[4])}\u00a0‰)" if most[4] else ""
    kind = "densest in" if most[4] else "most in"
    return f"{count(total)} weights in all, {kind} layer {most[2]}, {most[3]}: {count(most[1])}{of_size}."


def transfer_finding(record: Mapping[str, Any]) -> str:
    """Mean harm on the category that was pruned on, on the other ones, and without pruning."""
    data = record["transfer"]
    n = len(data["categories"])
    own = _mean(data["harm"][i][i] for i in range(n))
    other = _mean(data["harm"][i][j] for i in range(n) for j in range(n) if i != j)
    before = _mean(data.get("unpruned") or ())
    parts = [
        f"{percent(value)} {where}"
        for value, where in ((own, "on the same category"), (other, "on the others"), (before, "without pruning"))
        if value is not None
    ]
    masks = data.get("overlap") or [[None] * n] * n
    overlap = _mean(masks[i][j] for i in range(n) for j in range(n) if i != j)
    shared = "" if overlap is None else f" Two masks overlap by {percent(overlap)} on average (shared weights / union)."
    return f"Mean harm rate: {_listing(parts)}.{shared}" if parts else shared.strip()


def _mean(values: Any) -> float | None:
    kept = [value for value in values if not missing(value)]
    return sum(kept) / len(kept) if kept else None


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
