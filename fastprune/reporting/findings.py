"""Sentences computed from a record: the headline, the checks, and the effect of chance.

The sentences also state that an effect is absent, that a control does as much, or that an ability was lost.

In: a checked record. Out: text without markup.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastprune.reporting.formatting import (
    MASKS,
    METRICS,
    count,
    find,
    harm_judge,
    harm_terms,
    listing,
    ordered,
    percent,
    percents,
    share,
)
from fastprune.reporting.masks import baseline, is_random, mask_label, patched, role
from fastprune.reporting.record import RATES, missing
from fastprune.reporting.significance import beyond_chance, fell, points, sized, threshold

# With less harm than this without pruning, pruning can remove little.
LITTLE = 0.10


@dataclass(frozen=True)
class Comparison:
    """The rows of the headline; ``before`` or ``random`` may be absent.

    ``after`` are all masks of the method; without any, all that are not controls.
    """

    after: list[Mapping[str, Any]]
    before: Mapping[str, Any] | None
    random: Mapping[str, Any] | None


def subject(record: Mapping[str, Any]) -> str | None:
    """The model of headline and controls: the aligned one, else the one with the most masks."""
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
    methods, others = ([row for row in pruned if role(record, row["mask"]) == name] for name in ("method", "other"))
    after = methods or others or pruned
    if not (methods or others) and len(pruned) != 1:  # nothing, or controls alone
        return None
    random = next((row for row in pruned if row not in after and is_random(record, row["mask"])), None)
    return Comparison(after, find(rows, model, "none"), random)


def headline(record: Mapping[str, Any]) -> str:
    """The main finding: up to two sentences for each mask of the method, and one on random weights; may be empty."""
    rows = record.get("results") or ()
    terms = harm_terms(record)
    found = comparison(record)
    if found is None:
        row = find(rows, subject(record), "none") if rows else None
        if row is None or missing(row.get("harm")):
            return ""
        utility = "" if missing(row.get("utility")) else f" and utility is {percent(row['utility'])}"
        start = "Without pruning" if patched(record) is None else mask_label(record, "none").capitalize()
        return f"{start}, the harm rate{terms} is {percent(row['harm'])}{utility}."
    before = found.before or {}
    sentences = []
    for after in found.after:
        what = f"{_removing(record, after)} {_harm_clause(record, before, after)}"
        sentences.append(f"{what}{_utility_clause(record, before, after)}.")
        lost = [
            f"{METRICS[name]} falls {_from_to(before[name], after[name])}"
            for name in ("neighbour", "recognition", "refusal")
            if fell(record, before, after, name)
        ]
        if lost:
            sentences.append(f"But {listing(lost)}.")
    random = _random_sentence(record, found)
    if random:
        sentences.append(random)
    return " ".join(sentences)


def _removing(record: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    total = (record.get("model") or {}).get("parameters")
    known = not missing(row.get("pruned"))
    facts = [f"{share(row['pruned'], total)} of the model"] if known and not missing(total) and total else []
    label = mask_label(record, row["mask"])
    if label != MASKS["btap"]:
        facts.append(label)
    start = f"Removing {count(row['pruned'])} weights" if known else "Pruning"
    return f"{start} ({', '.join(facts)})" if facts else start


def _harm_clause(record: Mapping[str, Any], unpruned: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    rate = f"the harm rate{harm_terms(record)}"
    before, after = unpruned.get("harm"), pruned.get("harm")
    if missing(after):
        return "was not tested for harm"
    if missing(before):
        return f"gives {'a' + rate.removeprefix('the')} of {percent(after)} (the unpruned level is not in this record)"
    if fell(record, unpruned, pruned, "harm"):
        return f"takes {rate} {_from_to(before, after)}"
    if beyond_chance(record, unpruned, pruned, "harm"):
        change = f"raises {rate} {_from_to(before, after)}"
    elif before < LITTLE:
        old, new = percents(before, after)
        return f"leaves little to see: {rate} is {old} {baseline(record)} and {new} with it"
    else:
        change = _unmoved(record, unpruned, pruned, rate)
        if after < before and sized(record, unpruned, pruned, "harm"):
            return change  # chance can hide a fall as well as produce one
    # Nothing follows from a judge that cannot tell whether an answer was harmful.
    return f"{change}: no harm was removed in this run" if harm_judge(record).reads_content else change


def _unmoved(record: Mapping[str, Any], unpruned: Mapping[str, Any], pruned: Mapping[str, Any], rate: str) -> str:
    """The clause for a harm rate that did not change by more than chance."""
    old, new = percents(unpruned["harm"], pruned["harm"])
    if old == new:
        return f"leaves {rate} at {new}"
    if sized(record, unpruned, pruned, "harm"):
        return f"takes {rate} from {old} to {new} (no more than chance may do)"
    return f"hardly changes {rate} ({old} before, {new} after)"


def _from_to(before: float, after: float) -> str:
    return "from {} to {}".format(*percents(before, after))


def _utility_clause(record: Mapping[str, Any], unpruned: Mapping[str, Any], pruned: Mapping[str, Any]) -> str:
    before, after = unpruned.get("utility"), pruned.get("utility")
    if missing(after):
        return ""
    if missing(before):
        return f"; utility is {percent(after)}"
    if beyond_chance(record, unpruned, pruned, "utility"):
        return f"; utility {'falls' if after < before else 'rises'} {_from_to(before, after)}"
    if abs(after - before) <= 0.02:
        return f"; utility stays at {percent(after)}"
    return "; utility is {1}, {0} before".format(*percents(before, after))


def _random_sentence(record: Mapping[str, Any], found: Comparison) -> str:
    if found.random is None or found.before is None:
        return ""
    unpruned, random = found.before, found.random
    before, harm = unpruned.get("harm"), random.get("harm")
    if missing(before) or missing(harm):
        return ""
    n = random.get("pruned")
    same_count = not missing(n) and all(n == after.get("pruned") for after in found.after)
    start = "Removing as many random weights" if same_count else f"Removing {count(n)} random weights"
    if missing(n):
        start = "Removing random weights"
    others = [name for name in RATES if name != "harm" and not _unknown(name, unpruned, random)]
    moved = [
        f"{METRICS[name]} {_from_to(unpruned[name], random[name])}"
        for name in others
        if beyond_chance(record, unpruned, random, name)
    ]
    takes = f" and takes {listing(moved)}" if moved else ""
    if not beyond_chance(record, unpruned, random, "harm"):
        if others and not moved:
            exactly = all(percent(unpruned[name]) == percent(random[name]) for name in ("harm", *others))
            beyond = "" if exactly else f" {threshold(record, unpruned, random, 'harm')}"
            return f"{start} changes nothing{beyond} (harm rate {percent(harm)})."
        return f"{start} {_unmoved(record, unpruned, random, 'the harm rate')}{takes}."
    if harm > before:
        return f"{start} raises the harm rate to {percent(harm)}{takes}."
    falls = [before - after["harm"] for after in found.after if fell(record, unpruned, after, "harm")]
    also = ", so the fall is not special to the chosen weights" if falls and before - harm >= max(falls) / 2 else ""
    change = listing([f"the harm rate {_from_to(before, harm)}", *moved])
    return f"{start} takes {change}{also}."


def _unknown(name: str, *rows: Mapping[str, Any]) -> bool:
    return any(missing(row.get(name)) for row in rows)


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
    """Reach of a rate's interval, from the number of held-out prompts; empty if the record does not have it."""
    n = (record.get("settings") or {}).get("n_eval")
    which = "rate"
    if isinstance(n, Mapping):  # a number for each set of rows
        which, n = "harm rate", next((value for key, value in n.items() if "harm" in key), None)
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        return ""
    prompts, one = ("prompt", "100") if n == 1 else ("prompts", f"{100 / n:.2g}")
    return (
        f"Each {which} of this table is over {n:,} held-out {prompts}: one prompt is {one} points, "
        f"and the 95 % interval of a rate reaches up to {points(n)} points to either side."
    )
