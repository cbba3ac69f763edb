"""What one call of ``fastprune.score`` owns while it runs.

In: a request, and the processes that share it. Out: the model's weights, its checked view, the plan, the journal and
the store of hidden states. When the call ends, also by an exception or Ctrl-C, the model is as it was before.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fastprune.calibration import CalibrationLoader
from fastprune.checkpoint.streamed import Streamed
from fastprune.model.adapters import unwrap
from fastprune.model.block_view import BlockView
from fastprune.model.frozen import frozen_eval, model_lock
from fastprune.model.self_check import checked_view
from fastprune.model.weights import EMBEDDING, HEAD, Resident, Weights
from fastprune.model.whole_view import WholeView
from fastprune.ops.devices import usable_device
from fastprune.planning.estimate import human
from fastprune.planning.pace import seconds_of
from fastprune.planning.plan import Plan, plan
from fastprune.planning.segments import needs, split_blocks
from fastprune.progress import announce, duration
from fastprune.scoring.activation_store import ActivationStore
from fastprune.scoring.journal import Journal, NullJournal
from fastprune.scoring.processes import Processes
from fastprune.scoring.provenance import inputs_of
from fastprune.scoring.request import Request

_MOMENT = 20.0  # seconds of which nothing need be said


@contextlib.contextmanager
def own_modes() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, until the end of the context."""
    with contextlib.ExitStack() as autocast, torch.inference_mode(False), torch.enable_grad():
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                autocast.enter_context(torch.autocast(kind, enabled=False))
        yield


class Run:
    """Holds the model of a request for one pass, and keeps other threads from it.

    Args:
        request: What is asked for.
        processes: Those that share the examples.
        held: Gives back what the run holds when the call ends.

    Attributes:
        weights: The model, and where its weights come from.
        anatomy: The model taken apart.
        facts: Everything that the result depends on to the bit; complete after :meth:`view`.

    Raises:
        ModelError: Some weight cannot be scored, or another thread is scoring the model.
        NotFoundError, ArtifactError: The checkpoint folder does not exist or is damaged.
    """

    def __init__(self, request: Request, processes: Processes, held: contextlib.ExitStack) -> None:
        self._request, self._processes, self._held = request, processes, held
        self.weights = _weights(request)
        held.callback(self.weights.close)
        held.enter_context(model_lock(unwrap(self.weights.model)))
        self.anatomy = self.weights.anatomy
        processes.check_device(self.weights.device)
        self.facts: dict[str, Any] = {}

    def plan(self, loaders: Mapping[str, CalibrationLoader]) -> Plan:
        """The plan of the pass; several processes agree on that of the one with the least memory.

        Raises:
            ArgumentError: A budget is not enough, or the processes were not started alike.
        """
        request, processes = self._request, self._processes
        self.facts = inputs_of(request, self.anatomy, loaders, self.weights.device)
        if processes.size > 1 or request.resume is not None:
            self.facts["weights"] = self.weights.identity()
        processes.check_same({**self.facts, "segments": request.segments, "resume": request.resume is not None})
        segments = request.segments
        if segments is None and request.resume is not None:
            segments = Journal.segments_of(request.resume, processes)
        sharing = processes.sharing(self.weights.device)
        chosen = self._plan(loaders, segments, sharing)
        most = max(processes.all_gather(chosen.segments))
        return chosen if chosen.segments == most else self._plan(loaders, most, sharing)

    def _plan(self, loaders: Mapping[str, CalibrationLoader], segments: int | None, sharing: int) -> Plan:
        request = self._request
        n_examples = sum(len(loader.calibration) for loader in loaders.values())
        n_tokens = sum(len(example) for loader in loaders.values() for example in loader.calibration)
        return plan(
            self.weights,
            n_examples,
            max(1, n_tokens // n_examples),
            memory=request.memory,
            host_memory=request.host_memory,
            segments=segments,
            offload=request.offload,
            statistics=max(map(len, request.statistics.values())),
            micro_batch=max(map(_largest, loaders.values())),
            padded_tokens=[tokens for loader in loaders.values() for tokens in loader.padded_tokens],
            processes=sharing,
        )

    def announce(self, chosen: Plan, loaders: Mapping[str, CalibrationLoader]) -> None:
        """Say how long the pass will take, unless that is a moment."""
        matrix = max(self.anatomy.matrices, key=lambda matrix: matrix.weight.numel()).weight
        seconds = seconds_of(chosen, tuple(matrix.shape[-2:]), matrix.dtype, self.weights.device, self._processes.size)
        if seconds < _MOMENT:
            return
        examples = sum(len(loader.calibration) for loader in loaders.values())
        tokens = sum(sum(loader.padded_tokens) for loader in loaders.values())
        reading = f"; {human(chosen.read_bytes)} are read meanwhile" if chosen.streamed else ""
        announce(f"scoring takes about {duration(seconds)} for {examples} examples, {tokens:,} tokens{reading}")

    def view(self, chosen: Plan, loaders: Mapping[str, CalibrationLoader]) -> tuple[BlockView | WholeView, list[range]]:
        """The model as the pass drives it, frozen and checked, and its segments.

        Raises:
            ModelError: The model cannot be driven block by block although it has to be, or cannot be scored at all.
        """
        self._held.enter_context(frozen_eval(self.weights.model))
        weights, segments = self.weights, self._request.segments
        parts = split_blocks(chosen.n_blocks, chosen.segments)
        examples = [example for loader in loaders.values() for example in loader.calibration]
        if weights.streamed:
            first = (EMBEDDING, *needs(parts, 0, backward=len(parts) == 1))
            with weights.held((EMBEDDING, HEAD, *parts[0]), then=first):
                view = checked_view(weights, parts[:1], segments, examples)
        else:
            view = checked_view(weights, parts, segments, examples)
        parts = split_blocks(view.n_blocks, min(view.n_blocks, chosen.segments))  # a whole view has one block
        self.facts["segments"] = len(parts)
        self._processes.check_same({"segments": len(parts)})  # the check may have failed on one of them alone
        return view, parts

    def journal(self) -> Journal | NullJournal:
        """The journal of the request.

        Raises:
            ArgumentError: It is of other inputs or in use, or the folder holds other things.
            ArtifactError: Its first line is damaged or of another version.
        """
        if self._request.resume is None:
            return NullJournal()
        journal = Journal(self._request.resume, {**self.facts, "files": self.weights.files()}, self._processes)
        self._held.callback(journal.close)
        return journal

    def store(self, chosen: Plan, journal: Journal | NullJournal) -> ActivationStore:
        """The store of hidden states between segments."""
        store = ActivationStore(chosen.offload, self.weights.device, journal.folder)
        self._held.callback(store.close)
        return store


def _largest(loader: CalibrationLoader) -> tuple[int, int, int]:
    """Rows, tokens of each and scored tokens of the largest micro-batch."""
    batch = max(loader.micro_batches, key=lambda batch: batch.input_ids.numel())
    rows, tokens = batch.input_ids.shape
    return rows, tokens, len(batch.scored)


def _weights(request: Request) -> Weights:
    if not isinstance(request.model, str | os.PathLike):
        return Resident(unwrap(request.model))
    device = request.device
    if device is None:
        # torchrun says which of a node's GPUs belongs to this process
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = usable_device(device)
    if device.type == "cuda" and device.index is None:
        # "cuda" is whichever device is a thread's current one, and the thread that reads the weights has its own.
        device = torch.device("cuda", torch.cuda.current_device())
    return Streamed(request.model, device, request.dtype)
