"""Prune one behavior and measure all of them, with controls that remove as many other weights.

Every mask is applied in place and undone, so one copy of the model serves all of them.

In: a model in memory, its scores and an evaluation suite. Out: rows of a record (plain dicts). Source: arXiv
2604.09544, the experiments on held-out harm, controls and transfer between harm types.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from fastprune.calibration import CalibrationSet
from fastprune.errors import ArgumentError
from fastprune.evaluation import Evaluation, EvaluationSuite, Measurement
from fastprune.masking import PruneMask, largest_magnitude_mask, random_mask
from fastprune.masking.apply import split_name
from fastprune.scoring.score import score
from fastprune.scoring.scores import Scores

CRITERIA = ("signed", "signed_reverse", "abs_of_sum")
"""Harm criteria that :func:`standard_masks` uses; all come from one sum of gradients, and so from one pass."""


def standard_masks(
    model: torch.nn.Module, scores: Scores, *, p: float, q: float, seed: int = 0
) -> dict[str, PruneMask]:
    """The B-TAP mask, and a control for each of its ingredients.

    Args:
        model: The model that was scored.
        scores: Scores with the harm criteria of :data:`CRITERIA` and benign ``abs``.
        p: Protected fraction of each matrix.
        q: Harm fraction of each matrix.
        seed: Seed of the random mask.

    Returns:
        ``btap``; ``random`` and ``magnitude`` with as many weights in each matrix; ``sign_flipped`` (the lowest
        scores), ``unsigned`` (the absolute score) and ``no_set_difference`` (nothing protected) with the same ``q``.
    """
    btap = scores.select(p, q, harm="signed", benign="abs")
    return {
        "btap": btap,
        "random": random_mask(model, like=btap, seed=seed),
        "magnitude": largest_magnitude_mask(model, like=btap),
        "sign_flipped": scores.select(p, q, harm="signed_reverse", benign="abs"),
        "unsigned": scores.select(p, q, harm="abs_of_sum", benign="abs"),
        "no_set_difference": scores.select(None, q, harm="signed"),
    }


def measure(
    model: torch.nn.Module, suite: EvaluationSuite, mask: PruneMask | None, *, strict: bool = True
) -> Evaluation:
    """Evaluate a model with a mask applied meanwhile, or unpruned; ``strict`` as in :meth:`PruneMask.applied`."""
    with mask.applied(model, strict=strict) if mask is not None else nullcontext():
        return suite.run(model)


def row(evaluation: Evaluation, **labels: Any) -> dict[str, Any]:
    """One row of a record: the labels and the five rates."""
    return {**labels, **evaluation.summary()}


def measure_each(
    model: torch.nn.Module, suite: EvaluationSuite, masks: Mapping[str, PruneMask], *, strict: bool = True
) -> Iterator[tuple[str, PruneMask | None, Evaluation]]:
    """Evaluate the unpruned model, called ``"none"``, and then every mask.

    Each mask is applied once before anything is evaluated, so that a mask that does not fit is refused at once.

    Yields:
        ``(name, mask, evaluation)``.

    Raises:
        ArgumentError: A mask is called ``"none"``.
        MaskError: A mask does not fit the model, or (``strict``) was made for a model of other weights.
    """
    if "none" in masks:
        raise ArgumentError(
            '"none" is the name of the unpruned model, expected another one for a mask', argument="masks"
        )
    for mask in masks.values():
        with mask.applied(model, strict=strict):
            pass
    yield "none", None, measure(model, suite, None)
    for name, mask in masks.items():
        yield name, mask, measure(model, suite, mask, strict=False)  # its fingerprint was compared above


def result_rows(
    model: str, evaluations: Iterable[tuple[str, PruneMask | None, Evaluation]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``results`` and of ``skills`` for the evaluations of :func:`measure_each`."""
    results, skills = [], []
    for name, mask, evaluation in evaluations:
        results.append(row(evaluation, model=model, mask=name, pruned=mask.total if mask is not None else 0))
        skills += [
            {"model": model, "mask": name, "skill": skill, "score": value} for skill, value in evaluation.skills.items()
        ]
    return results, skills


def measurement_rows(
    model: str, evaluations: Iterable[tuple[str, PruneMask | None, Evaluation]]
) -> list[dict[str, Any]]:
    """Rows of ``measurements`` (sample sizes, intervals, categories) for the evaluations of :func:`measure_each`."""
    rows = [{"model": model, "mask": name, **found.to_dict()["details"]} for name, _, found in evaluations]
    return [{key: value for key, value in row.items() if key != "attacks"} for row in rows]


def attack_rows(
    model: str, suite: EvaluationSuite, evaluations: Iterable[tuple[str, PruneMask | None, Evaluation]]
) -> list[dict[str, Any]]:
    """Rows of ``attacks``: harm of every mask under every attack of the suite, with sample size and interval."""
    facts = {attack.label: attack.facts for attack in suite.attacks}
    return [
        {
            "model": model,
            "mask": name,
            "attack": label,
            "settings": facts[label],
            "harm": measured["rate"],
            **{key: measured[key] for key in ("n", "interval", "cut", "unanswered") if key in measured},
        }
        for name, _, found in evaluations
        for label, measured in found.to_dict()["details"]["attacks"].items()
    ]


def sweep(
    name: str, model: torch.nn.Module, scores: Scores, suite: EvaluationSuite, *, p: float, fractions: Iterable[float]
) -> list[dict[str, Any]]:
    """Rows of ``sweep``: the B-TAP mask at each ``q``, all else fixed."""
    rows = []
    for q in fractions:
        mask = scores.select(p, q, harm="signed", benign="abs")
        rows.append(row(measure(model, suite, mask), model=name, q=q, p=p, pruned=mask.total))
    return rows


def heat_map(name: str, mask: PruneMask, block_of: Mapping[str, int]) -> dict[str, Any]:
    """Pruned weights by block and matrix, summed over the experts of a block.

    Args:
        name: Name of the model.
        mask: The mask.
        block_of: Decoder block of each matrix, as in ``scores.provenance["block_of"]``.
    """
    layers = sorted(set(block_of.values()))
    kind_of = _kinds(mask, block_of)
    kinds = list(dict.fromkeys(kind_of.values()))
    counts: Counter[tuple[int, str]] = Counter()
    sizes: Counter[tuple[int, str]] = Counter()
    for key, count in mask.counts.items():
        counts[block_of[key], kind_of[key]] += count
        sizes[block_of[key], kind_of[key]] += torch.Size(mask.shapes[key]).numel()
    return {
        "model": name,
        "layers": layers,
        "matrices": kinds,
        "counts": [[counts[layer, kind] for kind in kinds] for layer in layers],
        "sizes": [[sizes[layer, kind] for kind in kinds] for layer in layers],
    }


def _kinds(names: Iterable[str], block_of: Mapping[str, int]) -> dict[str, str]:
    """Column of each matrix: ``up_proj`` for a Linear, ``experts.up_proj`` for every expert.

    If names of a block end alike (``attn.c_proj``, ``mlp.c_proj``), as much of the name as distinguishes them.
    """
    paths, lengths = {}, {}
    for name in names:
        parameter, expert = split_name(name)
        paths[name] = parameter.removesuffix(".weight").split(".")
        lengths[name] = 1 if expert is None else 2
    while True:
        kinds = {name: ".".join(path[-lengths[name] :]) for name, path in paths.items()}
        owners = defaultdict(set)
        for name, kind in kinds.items():
            owners[block_of[name], kind].add(tuple(paths[name]))
        shared = {kind for (_, kind), matrices in owners.items() if len(matrices) > 1}
        if not shared:
            return kinds
        for name, kind in kinds.items():
            lengths[name] += kind in shared


def transfer(
    model: torch.nn.Module,
    harm_by_category: Mapping[str, CalibrationSet],
    benign: CalibrationSet,
    suite: EvaluationSuite,
    *,
    p: float,
    q: float,
) -> dict[str, Any]:
    """Prune on one harm type at a time and test on all of them.

    Args:
        model: The model.
        harm_by_category: Calibration examples of each type.
        benign: Calibration examples of the protected behavior.
        suite: A suite whose harm rows have the same categories.
        p: Protected fraction of each matrix.
        q: Harm fraction of each matrix.

    Returns:
        ``categories``; ``n[j]``: held-out rows of type j; ``harm[i][j]``: harm left on type j after pruning on type i;
        ``unpruned[j]``; ``overlap[i][j]``: the Jaccard index of the two masks.

    Raises:
        ArgumentError: The suite has no harm rows. Nothing was scored then.
    """
    before = measure(model, suite, None).details.harm
    if before is None:
        raise ArgumentError(
            "expected one with harm_rows, which tell how much of each harm type is left, got none", argument="suite"
        )
    names = list(harm_by_category)
    masks = [
        score(model, examples.loader(), benign.loader(), q_max=q, p_max=p, progress=False).select(p, q)
        for examples in harm_by_category.values()
    ]

    def by_category(harm: Measurement | None) -> list[float | None]:
        rates = harm.by_category if harm is not None else {}
        return [rates[name].rate if name in rates else None for name in names]

    return {
        "categories": names,
        "n": [before.by_category[name].n if name in before.by_category else 0 for name in names],
        "harm": [by_category(measure(model, suite, mask).details.harm) for mask in masks],
        "unpruned": by_category(before),
        "overlap": [[first.jaccard(second) for second in masks] for first in masks],
    }
