"""``fastprune.score``: from a model and two loaders to the best-scored weights of every matrix.

In: a causal LM and calibration data. Out: :class:`Scores`. The arguments are checked in
:mod:`fastprune.scoring.request`, the model is held in :mod:`fastprune.scoring.run`, and the pass itself is
:mod:`fastprune.scoring.engine`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fastprune.calibration import CalibrationSet
from fastprune.scoring.collect import Collector
from fastprune.scoring.engine import Pass
from fastprune.scoring.processes import Processes
from fastprune.scoring.provenance import provenance_of
from fastprune.scoring.request import Request
from fastprune.scoring.run import Run, own_modes
from fastprune.scoring.scores import Scores
from fastprune.scoring.sets import note_ends_of_turn, read_sets


def score(
    model: torch.nn.Module | str | Path,
    harm_loader: CalibrationSet | Iterable[Mapping[str, torch.Tensor]],
    benign_loader: CalibrationSet | Iterable[Mapping[str, torch.Tensor]] | None = None,
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
            weights are read as they are needed, twice in all, and are in memory together only if there is room. The
            scores are bit-identical to those of the model in memory if BLAS rounds alike (weights that transformers has
            mapped from a file begin at other addresses).
            With LoRA adapters (a ``PeftModel``), the base weights are scored under their plain names, adapters active.
        harm_loader: Iterable of mappings with ``input_ids`` and ``labels`` ``(rows, tokens)`` int64 (-100 = not
            scored) and optionally ``attention_mask``, padded left or right; each row is one example. It is read once.
            Or a CalibrationSet, or its ``loader()``.
        benign_loader: The same for benign use; without it ``Scores.select`` takes ``p=None`` only.
        harm: Criterion of the harm score, or several, all from this one pass: signed, signed_reverse, abs, abs_of_sum,
            fisher, wanda, magnitude. The last bits of a score may depend on which criteria are asked for together.
        benign: The same for the benign score.
        p_max: Largest fraction of weights, in (0, 1], that a later ``select(p=…)`` can ask for.
        q_max: The same for ``q``.
        memory: Device memory budget per process in bytes or as ``"80GiB"``, weights included; sets the number of
            segments. ``None``: most of what is free.
        segments: Cut the blocks into this many runs, 1 … L: more take less memory and recompute each block once.
        resume: Folder of a journal, for a checkpoint folder. What a run finished there before it was killed is not done
            again, and the result is bit-identical to that of an uninterrupted run (on a GPU as far as two runs are: the
            backward pass of some attention kernels adds in any order). Remove the folder when the scores are saved.
        statistics_dtype: Of the sums: ``"float32"`` or ``"float64"``.
        backend: Backend of the ops; ``None`` takes the best available for each. A named backend never falls back, so it
            has to serve them all: ``"torch"`` or, on the CPU, ``"cpp"``.
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.
        host_memory: Host memory budget per process when the model is on a GPU, for hidden states between segments.
        offload: Where these are kept: ``"device"``, ``"host"`` or ``"disk"``; ``None``: the first that has room, and
            ``"disk"`` for a run with a journal.
        device: Where a checkpoint folder's model runs; ``None``: CUDA if available (each process of a node takes its
            own device), otherwise the CPU.
        dtype: Of a checkpoint folder's weights, e.g. ``"bfloat16"``; ``None`` keeps the one on disk.

    Under an initialized ``torch.distributed`` process group, each of its processes makes this call with the same model,
    data and settings. The processes share the examples, and each returns the same scores. Budgets are per process;
    without one, the processes on a device share its free memory. On GPUs the group needs NCCL for the sums, and
    ``backend="cpu:gloo,cuda:nccl"`` is best: with NCCL alone, everything else goes through the current device, which
    ``torch.cuda.set_device`` has to have set, and only the group's timeout notices a process that was killed.

    The caller's gradient, inference and autocast modes do not matter and are restored: scores are formed in the dtype
    of the weights.

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
    processes = Processes()
    with own_modes(), processes.together(), contextlib.ExitStack() as held:
        request = Request(
            model,
            harm_loader,
            benign_loader,
            harm=harm,
            benign=benign,
            p_max=p_max,
            q_max=q_max,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            offload=offload,
            resume=resume,
            statistics_dtype=statistics_dtype,
            backend=backend,
            device=device,
            dtype=dtype,
            progress=progress,
        )
        return _scored(request, Run(request, processes, held), processes)


def _scored(request: Request, run: Run, processes: Processes) -> Scores:
    """The steps of the pass."""
    loaders = read_sets(request.sources, run.weights.model)
    plan = run.plan(loaders)
    view, parts = run.view(plan, loaders)
    journal = run.journal()
    boundaries = run.store(plan, journal)
    gradients = journal.gradient_store(boundaries)
    if request.progress and processes.rank == 0:
        run.announce(plan, loaders)
    collector = Collector(view.matrices, request.criteria, request.fractions, request.backend, journal)
    for noted in journal.finished(journal.unfinished(len(parts)), gradients):
        collector.restore(noted)
    Pass(
        view,
        run.weights,
        loaders,
        request.statistics,
        parts,
        dtype=request.sum_dtype,
        boundaries=boundaries,
        gradients=gradients,
        processes=processes,
        backend=request.backend,
        progress=request.progress,
    ).run(collector, journal)
    collector.merge(processes)
    kept, shares = collector.lists(), collector.end_of_turn_shares()
    note_ends_of_turn(loaders, shares)
    return Scores(
        harm=kept["harm"],
        benign=kept.get("benign", {}),
        shapes=collector.shapes,
        provenance=provenance_of(request, run.anatomy, loaders, collector.fingerprint(), shares),
        p_max=request.fractions["benign"],
        q_max=request.fractions["harm"],
    )
