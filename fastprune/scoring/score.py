"""``fastprune.score``: from a model and two loaders to the best-scored weights of every matrix.

In: a causal LM and calibration data. Out: :class:`Scores`. This file validates, plans and wires; the pass itself is
:mod:`fastprune.scoring.engine`. How weights are removed is not known here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path

import torch

from fastprune.calibration import CalibrationSet, collect
from fastprune.checkpoint.streamed import Streamed
from fastprune.errors import ArgumentError, CalibrationError, FastpruneWarning
from fastprune.files import as_path
from fastprune.model.adapters import unwrap
from fastprune.model.block_view import BlockView
from fastprune.model.frozen import frozen_eval, model_lock
from fastprune.model.positions import rotary_conflict, table_size, trained_length
from fastprune.model.self_check import checked_view
from fastprune.model.vocabulary import predictable_tokens, readable_tokens
from fastprune.model.weights import EMBEDDING, HEAD, Resident, Weights
from fastprune.ops import dispatch
from fastprune.ops.devices import usable_device
from fastprune.planning.plan import MICRO_BATCH_TOKENS, Plan, plan
from fastprune.planning.segments import needs, split_blocks
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.collect import Collector
from fastprune.scoring.criteria import parse_criteria, statistics_of
from fastprune.scoring.engine import Pass, ScoringSet
from fastprune.scoring.journal import Journal
from fastprune.scoring.processes import Processes
from fastprune.scoring.provenance import inputs_of, provenance_of
from fastprune.scoring.scores import Scores

_STATISTICS_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_WEIGHT_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

# Share of a set's loss on end-of-turn tokens above which it is pointed out. Whole replies of an instruct model have a
# few percent there; replies of SmolLM2 that had been cut at 56 tokens had 69 %.
_LARGE_SHARE = 0.25


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
    host_memory: int | str | None = None,
    offload: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Scores:
    """Score every weight of the decoder blocks for harm and for benign use, in one pass over the model.

    The loss of an example is the mean over its scored tokens; examples count alike. Statistics are summed in float32
    and formed example by example where the criterion needs it. The model's weights are only read; its flags, config
    and hooks are the same after the call, also after an exception or Ctrl-C.

    Args:
        model: A Hugging Face causal LM of any float dtype, or the folder of a checkpoint, which is streamed: its
            weights are read as they are needed, twice in all, and are in memory together only if there is room. It
            has the bits of the model in memory, if BLAS rounds alike there (weights that transformers has mapped from a
            file begin at other addresses).
            With LoRA adapters (a ``PeftModel``), the base weights are scored under their plain names, adapters active.
        harm_loader: Iterable of mappings with ``input_ids`` and ``labels`` ``(rows, tokens)`` int64 (-100 = not
            scored) and optionally ``attention_mask``, padded left or right; each row is one example. It is read once.
            Or a CalibrationSet, or its ``loader()``.
        benign_loader: The same for benign use; without it ``Scores.select`` takes ``p=None`` only.
        harm: Criterion of the harm score, or several, all from this one pass: signed, signed_reverse, abs, abs_of_sum,
            fisher, wanda, magnitude. A score's last bits may depend on which others are asked for beside it.
        benign: The same for the benign score.
        p_max: Largest fraction of weights, in (0, 1], that a later ``select(p=…)`` can ask for.
        q_max: The same for ``q``.
        memory: Budget in bytes or ``"80GiB"`` on the model's device, weights included; decides the segments.
            ``None``: most of what is free.
        segments: Cut the blocks into this many runs, 1 … L: more take less memory and recompute each block once.
        resume: Folder of a journal, for a checkpoint folder. What a run finished there before it was killed is not done
            again, and the result is bit-identical to that of an uninterrupted run (on a GPU as far as two runs are: the
            backward pass of some attention kernels adds in any order). Remove the folder when the scores are saved.
        statistics_dtype: Of the sums: ``"float32"`` or ``"float64"``.
        backend: Backend of the ops; ``None`` takes the best available for each. A named one never falls back, so it has
            to serve them all: ``"torch"`` or, on the CPU, ``"cpp"``.
        progress: Show a progress bar when standard error is a terminal.
        host_memory: Budget in host memory beside a GPU, for hidden states between segments.
        offload: Where these lie: ``"device"``, ``"host"`` or ``"disk"``; ``None``: the first that has room, and
            ``"disk"`` for a run with a journal.
        device: Where a checkpoint folder's model runs; ``None``: a GPU if there is one (of several processes on a node,
            each its own), otherwise the CPU.
        dtype: Of a checkpoint folder's weights, e.g. ``"bfloat16"``; ``None`` keeps the one on disk.

    Under an initialised ``torch.distributed`` process group, each of its processes makes this call with the same model,
    data and settings; they share the examples between them, and each returns the same scores. Budgets are of each
    process; what nobody stated is shared by those on one device. On GPUs the group needs NCCL for the sums, and
    ``backend="cpu:gloo,cuda:nccl"`` is best: with NCCL alone, everything else goes through the current device, which
    ``torch.cuda.set_device`` has to have set, and a process that was killed is noticed only by the group's timeout.

    It does not matter whether gradients, inference mode or autocast are on where it is called: scores are formed in the
    dtype of the weights, and the caller's modes are as they were afterwards.

    Returns:
        The kept scores, on the CPU, with their provenance.

    Raises:
        ArgumentError: An argument is out of range.
        BackendError: The named backend cannot serve.
        CalibrationError: A loader yields nothing or something malformed.
        ModelError: The model cannot be driven or some weight cannot be reached.
        NotFoundError: The checkpoint folder or a file of it does not exist.
        ArtifactError: The checkpoint or the journal is damaged.
        ScoringError: A loss or gradient is not finite (names the example and the block), the disk is full, or another
            process of the run failed.

    Warns:
        FastpruneWarning: Both loaders hold the same examples, or the end-of-turn token carries more than a quarter of
            a set's loss.
    """
    ranks = Processes()
    with contextlib.ExitStack() as stack:
        # Whatever the caller has switched off or on: there are gradients here, in the dtype of the weights.
        for mode in (torch.inference_mode(False), torch.enable_grad(), *_without_autocast()):
            stack.enter_context(mode)
        stack.enter_context(ranks.together())
        criteria = {"harm": parse_criteria("harm", harm)}
        if benign_loader is not None or benign is not None:  # a name is checked whether or not it is needed
            criteria["benign"] = parse_criteria("benign", benign)
        if benign_loader is None:
            criteria.pop("benign", None)
        fractions = {"harm": _fraction("q_max", q_max), "benign": _fraction("p_max", p_max)}
        if statistics_dtype not in _STATISTICS_DTYPES:
            raise ArgumentError(
                f"statistics_dtype: expected one of {', '.join(_STATISTICS_DTYPES)}, got {statistics_dtype!r}"
            )
        needed = {name for names in criteria.values() for name in statistics_of(names)}
        dispatch.check_serves(backend, [*(f"accumulate_{name}" for name in sorted(needed)), "top_scores"])
        if harm_loader is None:
            raise ArgumentError("harm_loader: expected an iterable of batches, got None")
        if resume is not None:
            resume = as_path(resume, "resume")
            if not isinstance(model, str | os.PathLike):
                raise ArgumentError(
                    f"resume: expected a checkpoint folder as the model, got a {type(model).__name__} in memory; save "
                    "it with save_pretrained and score that folder"
                )
        weights = _weights(model, device, dtype)
        stack.callback(weights.close)
        stack.enter_context(model_lock(unwrap(weights.model)))
        # Refuses what cannot be scored before any data is read.
        matrices = weights.anatomy.matrices
        ranks.check_device(weights.device)
        sets = [
            _scoring_set(role, loader, criteria[role], weights.model)
            for role, loader in (("harm", harm_loader), ("benign", benign_loader))
            if loader is not None
        ]
        if len({group.examples.hash for group in sets}) < len(sets):
            message = "harm_loader and benign_loader hold the same examples, so what is protected is what is pruned"
            warnings.warn(message, FastpruneWarning, stacklevel=2)
        key = inputs_of(weights.model, matrices, sets, criteria, fractions, statistics_dtype, weights.device, backend)
        if ranks.size > 1 or resume is not None:
            key["weights"] = weights.identity()
        ranks.check_same({**key, "segments": segments, "resume": resume is not None})
        budgets = {"memory": memory, "host_memory": host_memory}
        if resume is not None and segments is None:
            segments = Journal.segments_of(resume, ranks)
        chosen = _plan(weights, sets, ranks, segments, _tier(offload, resume), budgets)
        stack.enter_context(frozen_eval(weights.model))
        parts = split_blocks(chosen.n_blocks, chosen.segments)
        examples = [example for group in sets for example in group.examples]
        if weights.streamed:
            first = (EMBEDDING, *needs(parts, 0, backward=len(parts) == 1))
            with weights.held((EMBEDDING, HEAD, *parts[0]), then=first):
                view = checked_view(weights, parts[:1], segments, examples)
        else:
            view = checked_view(weights, parts, segments, examples)
        parts = parts if isinstance(view, BlockView) else [range(view.n_blocks)]
        key["segments"] = len(parts)
        ranks.check_same({"segments": len(parts)})  # a check that fails on one of them alone
        journal = None
        if resume is not None:
            journal = Journal(resume, {**key, "files": weights.files()}, ranks)
            stack.callback(journal.close)
        hidden = ActivationStore(chosen.offload, weights.device, journal and journal.folder)
        stack.callback(hidden.close)
        gradients = hidden if journal is None else ActivationStore("disk", weights.device, journal.folder)
        collector = Collector(view.matrices, criteria, fractions, backend, journal)
        if journal is not None:
            for noted in journal.finished(journal.unfinished(len(parts)), gradients):
                collector.restore(noted)
        Pass(
            view,
            weights,
            sets,
            parts,
            dtype=_STATISTICS_DTYPES[statistics_dtype],
            offload=hidden,
            gradients=gradients,
            ranks=ranks,
            backend=backend,
            progress=progress,
        ).run(collector.add, journal, collector.add_losses)
        collector.merge(ranks)
        kept, shares = collector.lists(), collector.end_of_turn_shares()
        for group in sets:
            share = shares.get(group.role, 0.0)
            if share > _LARGE_SHARE and group.examples.finishes["unknown"]:
                warnings.warn(
                    f"{group.role}_loader: the end-of-turn token carries {share:.0%} of the loss, so the scores are "
                    'largely about ending the reply; for replies that were cut give finish="length" (or a column '
                    'finish), for whole ones finish="stop"',
                    FastpruneWarning,
                    stacklevel=2,
                )
        return Scores(
            harm=kept["harm"],
            benign=kept.get("benign", {}),
            shapes=collector.shapes,
            provenance=provenance_of(
                view.model, view.matrices, sets, criteria, statistics_dtype, collector.fingerprint(), shares
            ),
            p_max=fractions["benign"],
            q_max=fractions["harm"],
        )


def _plan(
    weights: Weights,
    sets: Sequence[ScoringSet],
    ranks: Processes,
    segments: int | None,
    offload: str | None,
    budgets: Mapping[str, int | str | None],
) -> Plan:
    """The plan for these sets; of several processes, with as many segments as the one with the least memory needs."""
    n_examples = sum(len(group.examples) for group in sets)
    n_tokens = sum(len(example) for group in sets for example in group.examples)
    plan_for = functools.partial(
        plan,
        weights,
        n_examples,
        max(1, n_tokens // n_examples),
        offload=offload,
        statistics=max(len(group.statistics) for group in sets),
        micro_batch=max(group.largest() for group in sets),
        padded_tokens=[tokens for group in sets for tokens in group.padded_tokens()],
        processes=ranks.sharing(weights.device),
        **budgets,
    )
    chosen = plan_for(segments=segments)
    most = max(ranks.all_gather(chosen.segments))
    return chosen if chosen.segments == most else plan_for(segments=most)


def _tier(offload: str | None, resume: str | Path | None) -> str | None:
    """Where hidden states lie unless the plan decides: what a journal names has to outlive the process."""
    return "disk" if offload is None and resume is not None else offload


def _weights(
    model: torch.nn.Module | str | Path, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Weights:
    if not isinstance(model, str | os.PathLike):
        for argument, value in (("device", device), ("dtype", dtype)):
            if value is not None:
                raise ArgumentError(f"{argument}: is for a checkpoint folder; move or cast the model itself instead")
        return Resident(unwrap(model))
    if isinstance(dtype, str):
        if dtype not in _WEIGHT_DTYPES:
            raise ArgumentError(f"dtype: expected one of {', '.join(_WEIGHT_DTYPES)}, got {dtype!r}")
        dtype = _WEIGHT_DTYPES[dtype]
    if device is None:
        # torchrun says which of a node's GPUs belongs to this process
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = usable_device(device)
    if device.type == "cuda" and device.index is None:
        # "cuda" is whichever device is a thread's current one, and the thread that reads the weights has its own.
        device = torch.device("cuda", torch.cuda.current_device())
    return Streamed(model, device, dtype)


def _without_autocast() -> list[torch.autocast]:
    return [torch.autocast(kind, enabled=False) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


def _fraction(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ArgumentError(f"{argument}: expected a fraction in (0, 1], got {value!r}")
    return float(value)


def _scoring_set(role: str, loader: Iterable, criteria: tuple[str, ...], model: torch.nn.Module) -> ScoringSet:
    accepted = inspect.signature(model.forward).parameters
    examples: CalibrationSet = collect(
        loader, f"{role}_loader", readable_tokens(model), predictable_tokens(model), accepted
    )
    _check_lengths(f"{role}_loader", examples, model)
    budget = getattr(loader, "batch_tokens", MICRO_BATCH_TOKENS)
    return ScoringSet(role, examples, budget, statistics_of(criteria))


def _check_lengths(name: str, examples: CalibrationSet, model: torch.nn.Module) -> None:
    """Refuse what the model has no positions for, or what would change the examples beside it."""
    limit = table_size(model)
    for index, example in enumerate(examples):
        if limit is not None and len(example) > limit:
            raise CalibrationError(
                f"{name}, example {index}: {len(example)} tokens, but the model has positions for {limit}; nothing is "
                "cut, shorten or drop it"
            )
    limit = trained_length(model)
    longer = [index for index, example in enumerate(examples) if limit is not None and len(example) > limit]
    if longer:
        warnings.warn(
            f"{name}: {len(longer)} examples, the first is example {longer[0]}, are longer than the {limit} tokens "
            "that the model was made for; they count like any other",
            FastpruneWarning,
            stacklevel=4,
        )
    conflict = rotary_conflict(model, [(len(example), len(example)) for example in examples])
    if conflict is not None:
        index, reason = conflict
        raise CalibrationError(
            f"{name}, example {index}: {len(examples.examples[index])} tokens; {reason}; load the set with a "
            "max_length, which drops such examples and counts them"
        )
