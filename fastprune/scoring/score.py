"""``fastprune.score``: from a model and two loaders to the best-scored weights of every matrix.

In: a causal LM and calibration data. Out: :class:`Scores`. This file validates, plans and wires; the pass itself is
:mod:`fastprune.scoring.engine`. How weights are removed is not known here.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import fastprune
from fastprune import backends
from fastprune.calibration import CalibrationSet, collect
from fastprune.errors import ArgumentError
from fastprune.model.checkpoint import load_model
from fastprune.model.eligible import Matrix, eligible_matrices, unwrap
from fastprune.model.fingerprint import fingerprint
from fastprune.model.selfcheck import checked_view
from fastprune.model.state import quiet
from fastprune.model.view import BlockView, WholeView
from fastprune.scoring.criteria import STATISTIC, parse_criteria, statistics_of
from fastprune.scoring.engine import ScoringSet, run_pass
from fastprune.scoring.keep import Keeper
from fastprune.scoring.plan import MICRO_BATCH_TOKENS, plan
from fastprune.scoring.scores import Scores

_STATISTICS_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def score(
    model: torch.nn.Module | str | Path,
    harm_loader: Iterable[Mapping[str, torch.Tensor]],
    benign_loader: Iterable[Mapping[str, torch.Tensor]] | None = None,
    *,
    harm: str | tuple[str, ...] = "signed",
    benign: str | tuple[str, ...] = "abs",
    p_max: float = 1e-3,
    q_max: float = 1e-3,
    memory: int | str | None = None,
    segments: int | None = None,
    resume: str | Path | None = None,
    statistics_dtype: str = "float32",
    backend: str | None = None,
    progress: bool = True,
) -> Scores:
    """Score every weight of the decoder blocks for harm and for benign use, in one pass over the model.

    The loss of an example is the mean over its scored tokens; examples count alike. Statistics are summed in float32
    and formed example by example where the criterion needs it. The model's weights are only read; its flags, config
    and hooks are the same after the call, also after an exception or Ctrl-C.

    Args:
        model: A Hugging Face causal LM of any float dtype, or the folder of a checkpoint, which is loaded into memory.
            With LoRA adapters (a ``PeftModel``), the base weights are scored under their plain names, adapters active.
        harm_loader: Iterable of mappings with ``input_ids`` and ``labels`` ``(rows, tokens)`` int64 (-100 = not
            scored) and optionally ``attention_mask``, padded left or right; each row is one example. It is read once.
            Or a CalibrationSet, or its ``loader()``.
        benign_loader: The same for benign use; without it ``Scores.select`` takes ``p=None`` only.
        harm: Criterion of the harm score, or several, all from this one pass: signed, signed_reverse, abs, abs_of_sum,
            fisher, wanda, magnitude.
        benign: The same for the benign score.
        p_max: Largest fraction of weights, in (0, 1], that a later ``select(p=…)`` can ask for.
        q_max: The same for ``q``.
        memory: Budget in bytes or ``"80GiB"`` on the model's device, weights included; decides the segments.
        segments: Cut the blocks into this many runs, 1 … L: more take less memory and recompute each block once.
        resume: Reserved for interrupted runs; has to be ``None``.
        statistics_dtype: ``"float32"`` or ``"float64"``. ``"bfloat16"`` is for comparison only: rounded gradients are
            added to rounded sums, one example at a time, as the published code does; sums of absolute values come out
            too low, and other weights are chosen (docs/precision.md).
        backend: Backend of the ops; ``None`` takes the best available for each. A named one never falls back, so it has
            to serve them all: ``"torch"`` or, on the CPU, ``"cpp"``.
        progress: Show a progress bar when standard error is a terminal.

    Returns:
        The kept scores, on the CPU, with their provenance.

    Raises:
        ArgumentError: An argument is out of range.
        BackendError: The named backend cannot serve.
        CalibrationError: A loader yields nothing or something malformed.
        ModelError: The model cannot be driven or some weight cannot be reached.
        ScoringError: A loss or gradient is not finite; names the example and the block.
    """
    criteria = {"harm": parse_criteria("harm", harm)}
    if benign_loader is not None:
        criteria["benign"] = parse_criteria("benign", benign)
    fractions = {"harm": _fraction("q_max", q_max), "benign": _fraction("p_max", p_max)}
    if statistics_dtype not in _STATISTICS_DTYPES:
        raise ArgumentError(
            f"statistics_dtype: expected one of {', '.join(_STATISTICS_DTYPES)}, got {statistics_dtype!r}"
        )
    needed = {name for names in criteria.values() for name in statistics_of(names)}
    backends.check_serves(backend, [*(f"accumulate_{name}" for name in sorted(needed)), "top_scores"])
    if harm_loader is None:
        raise ArgumentError("harm_loader: expected an iterable of batches, got None")
    if resume is not None:
        raise ArgumentError(f"resume: runs cannot be resumed yet; expected None, got {resume!r}")
    if isinstance(model, str | os.PathLike):
        model = load_model(model)
    model = unwrap(model)
    eligible_matrices(model)  # refuses what cannot be scored before any data is read
    sets = [
        _scoring_set(role, loader, criteria[role], model)
        for role, loader in (("harm", harm_loader), ("benign", benign_loader))
        if loader is not None
    ]
    n_examples = sum(len(group.examples) for group in sets)
    n_tokens = sum(len(example) for group in sets for example in group.examples)
    chosen = plan(
        model,
        n_examples,
        max(1, n_tokens // n_examples),
        memory=memory,
        segments=segments,
        statistics=max(len(group.statistics) for group in sets),
    )
    with quiet(model):
        view = checked_view(model, segments)
        keepers = _keepers(view, criteria, fractions, backend)

        def keep(role: str, matrix: Matrix, statistics: dict[str, torch.Tensor]) -> None:
            for criterion in criteria[role]:
                values = statistics[STATISTIC[criterion]] if STATISTIC[criterion] is not None else None
                if criterion == "wanda" and matrix.input_major:
                    values = values.unsqueeze(1)
                keepers[role, criterion].add(matrix.name, matrix.weight, values, criterion)

        run_pass(
            view,
            sets,
            segments=min(chosen.segments, view.n_blocks),
            dtype=_STATISTICS_DTYPES[statistics_dtype],
            on_final=keep,
            backend=backend,
            progress=progress,
        )
    kept = {
        role: {criterion: keepers[role, criterion].finish() for criterion in names} for role, names in criteria.items()
    }
    return Scores(
        harm=kept["harm"],
        benign=kept.get("benign", {}),
        shapes={matrix.name: tuple(matrix.weight.shape) for matrix in view.matrices},
        provenance=_provenance(view, sets, criteria, statistics_dtype),
        p_max=p_max,
        q_max=q_max,
    )


def _fraction(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ArgumentError(f"{argument}: expected a fraction in (0, 1], got {value!r}")
    return float(value)


def _scoring_set(role: str, loader: Iterable, criteria: tuple[str, ...], model: torch.nn.Module) -> ScoringSet:
    vocab_size = model.get_input_embeddings().weight.shape[0]
    examples: CalibrationSet = collect(loader, f"{role}_loader", vocab_size)
    budget = getattr(loader, "batch_tokens", MICRO_BATCH_TOKENS)
    return ScoringSet(role, examples, budget, statistics_of(criteria))


def _keepers(
    view: BlockView | WholeView, criteria: dict[str, tuple[str, ...]], fractions: dict[str, float], backend: str | None
) -> dict[tuple[str, str], Keeper]:
    sizes = {matrix.name: matrix.weight.numel() for matrix in view.matrices}
    n_lists = sum(len(names) for names in criteria.values())
    return {
        (role, criterion): Keeper(sizes, fractions[role], n_lists, backend)
        for role, names in criteria.items()
        for criterion in names
    }


def _provenance(
    view: BlockView | WholeView,
    sets: list[ScoringSet],
    criteria: dict[str, tuple[str, ...]],
    statistics_dtype: str,
) -> dict[str, Any]:
    """What a reader of the scores needs to know to form them again; no times, so that equal runs give equal files."""
    config = view.model.config
    return {
        "model": {
            "id": getattr(config, "_name_or_path", "") or type(view.model).__name__,
            "revision": getattr(config, "_commit_hash", None),
            "architecture": type(view.model).__name__,
            "fingerprint": fingerprint({matrix.name: matrix.weight for matrix in view.matrices}),
            "dtype": str(view.matrices[0].weight.dtype).removeprefix("torch."),
        },
        "criteria": {role: list(names) for role, names in criteria.items()},
        "calibration": {
            group.role: {
                "hash": group.examples.hash,
                "n_examples": len(group.examples),
                "n_tokens": sum(len(example) for example in group.examples),
                "n_scored_tokens": sum(example.scored for example in group.examples),
            }
            for group in sets
        },
        "block_of": {matrix.name: matrix.block for matrix in view.matrices},
        "statistics_dtype": statistics_dtype,
        "versions": {
            "fastprune": fastprune.__version__,
            "torch": torch.__version__,
            "transformers": importlib.metadata.version("transformers"),
        },
    }
