"""How much a pass needs, how many segments it has to be cut into, and where the hidden states between them lie.

In: a model or its config, the size of the calibration data, budgets of memory. Out: :class:`Plan`. Estimates follow the
engine stage by stage and are compared with measured peaks in the tests.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastprune.errors import ArgumentError
from fastprune.model.view import LOGITS_PER_CHUNK
from fastprune.model.weights import Streamed
from fastprune.scoring.engine import split_blocks
from fastprune.scoring.footprint import Footprint, activation_bound, activation_bytes, footprint, skeleton_of
from fastprune.scoring.hidden import TIERS
from fastprune.scoring.keep import kept_bytes

_UNITS = {
    "": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
MICRO_BATCH_TOKENS = 4096
_USABLE = 0.8  # share of the free memory that a pass may plan with; the rest is for fragmentation and temporaries

# Buffers of the matrix library, threads' stacks, the allocator's slack: what a pass over a tiny model takes on a CPU.
_WORKSPACE = 64 * 2**20


def parse_bytes(argument: str, value: int | str) -> int:
    """``"80GiB"``, ``"3.5 GB"`` or a number of bytes, as bytes.

    Raises:
        ArgumentError: Not a size, or not positive.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", value, re.IGNORECASE)
        if match is None:
            raise ArgumentError(f"{argument}: expected a size such as '80GiB' or a number of bytes, got {value!r}")
        value = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ArgumentError(f"{argument}: expected a size such as '80GiB' or a positive number of bytes, got {value!r}")
    return value


def _show(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Plan:
    """What one pass over both sets takes.

    Attributes:
        segments: Runs of blocks; 1 keeps every accumulator at once, ``n_blocks`` the fewest.
        micro_batch_tokens: Padded tokens of a micro-batch.
        n_blocks: Decoder blocks.
        eligible: Weights that are scored.
        parameters: All parameters of the model.
        streamed: Whether weights are read from disk as they are needed.
        boundaries: Where hidden states between segments lie: ``"device"``, ``"host"`` or ``"disk"``.
        weight_bytes: Weights in memory at the peak.
        accumulator_bytes: Live statistics of the largest segment, fp32.
        activation_bytes: What autograd keeps of one segment for one micro-batch, and temporaries.
        boundary_bytes: Hidden states and gradients at segment boundaries, all examples.
        kept_bytes: The best-scored weights of every matrix, in host memory.
        device_bytes: Peak on the model's device; on a CPU it includes what is in host memory.
        host_bytes: Peak in host memory beside a GPU.
        disk_bytes: Peak of temporary files.
        read_bytes: Read from disk in all.
        flops: Of the whole pass: forward, recompute, dX and dW.
        seconds: At the given rates, computing and reading at the same time; ``None`` without them.
    """

    segments: int
    micro_batch_tokens: int
    n_blocks: int
    eligible: int
    parameters: int
    streamed: bool
    boundaries: str
    weight_bytes: int
    accumulator_bytes: int
    activation_bytes: int
    boundary_bytes: int
    kept_bytes: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    read_bytes: int
    flops: float
    seconds: float | None = None

    @property
    def peak_bytes(self) -> int:
        """The peak on the model's device."""
        return self.device_bytes

    def __str__(self) -> str:
        blocks = math.ceil(self.n_blocks / self.segments)
        moved = f"{_show(self.read_bytes)} read from disk" if self.streamed else "nothing read from disk"
        rows = [
            ("model", f"{self.parameters:,} parameters, {self.eligible:,} of them scored, {self.n_blocks} blocks"),
            ("segments", f"{self.segments} ({blocks} block{'s' * (blocks > 1)} at a time)"),
            ("micro-batch", f"{self.micro_batch_tokens:,} tokens"),
            ("weights", f"{_show(self.weight_bytes)} at a time, {'streamed from disk' if self.streamed else 'all'}"),
            ("accumulators", _show(self.accumulator_bytes)),
            ("activations", _show(self.activation_bytes)),
            ("boundaries", f"{_show(self.boundary_bytes)} on the {self.boundaries}".replace("the disk", "disk")),
            ("kept scores", _show(self.kept_bytes)),
            ("peak, device", _show(self.device_bytes)),
            ("peak, host", _show(self.host_bytes) if self.host_bytes else "(the device's)"),
            ("peak, disk", _show(self.disk_bytes) if self.disk_bytes else "none"),
            ("work", f"{self.flops / 1e12:.1f} TFLOP, {moved}"),
            ("time", "give rates to have it" if self.seconds is None else f"{self.seconds:,.1f} s at the given rates"),
        ]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


def _available(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the physical memory is a cautious guess
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def plan(
    model_or_config: object,
    n_examples: int,
    n_tokens: int,
    *,
    memory: int | str | None = None,
    host_memory: int | str | None = None,
    segments: int | None = None,
    boundaries: str | None = None,
    statistics: int = 1,
    micro_batch: tuple[int, int, int] | None = None,
    processes: int = 1,
    flops_per_second: float | None = None,
    read_bytes_per_second: float | None = None,
) -> Plan:
    """Choose the number of segments for a budget and estimate what a pass takes.

    Args:
        model_or_config: A causal LM, whose weights are all in memory; or a Hugging Face config (no weights are made) or
            :class:`~fastprune.model.weights.Streamed` weights, for a pass that streams them from disk.
        n_examples: Examples of both sets together.
        n_tokens: Mean tokens of an example.
        memory: Budget on the model's device, weights included, as bytes or ``"80GiB"``; ``None``: the model and four
            fifths of what is free beside it, or no limit for a config.
        host_memory: Budget in host memory when the model's device is a GPU; ``None``: no limit. Beside a config it says
            that the device is one; without it the pass is planned for a CPU.
        segments: Fix the number instead of choosing the smallest that fits.
        boundaries: Fix where hidden states between segments lie (``"device"``, ``"host"``, ``"disk"``) instead of
            choosing the first that fits.
        statistics: Accumulators live at the same time for one weight (the larger of the two sets' counts).
        micro_batch: Rows, tokens of each and scored tokens of the largest micro-batch, if the data are known.
        processes: How many of them share the device's free memory, each with a pass like this one.
        flops_per_second: Rate of matrix products, for the time.
        read_bytes_per_second: Rate of the disk, for the time; without it reading counts as free.

    Returns:
        The plan; ``print`` it.

    Raises:
        ArgumentError: A number is not positive, ``segments`` is not in 1 … L, or no number of segments fits the budget;
            the message says how much would be needed.
    """
    for argument, value in (("n_examples", n_examples), ("n_tokens", n_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{argument}: expected a positive integer, got {value!r}")
    for argument, rate in (("flops_per_second", flops_per_second), ("read_bytes_per_second", read_bytes_per_second)):
        if rate is not None and not rate > 0:
            raise ArgumentError(f"{argument}: expected a positive rate, got {rate!r}")
    if boundaries is not None and boundaries not in TIERS:
        raise ArgumentError(f"boundaries: expected one of {', '.join(TIERS)}, got {boundaries!r}")
    source = model_or_config
    model = source if isinstance(source, nn.Module) else source.model if isinstance(source, Streamed) else None
    # Of a model on several devices, all that a segment needs may fall to the one with the least room.
    devices = {source.device} if isinstance(source, Streamed) else _devices_of(model)
    estimate = _Estimate(
        model if model is not None else skeleton_of(source),
        streamed=not isinstance(source, nn.Module),
        on_cpu=all(device.type == "cpu" for device in devices) if devices else host_memory is None,
        tokens=n_examples * n_tokens,
        # Of unknown data: two sets alike, and every token scored.
        micro_batch=micro_batch or _micro_batch(math.ceil(n_examples / 2), n_tokens),
        statistics=statistics,
        rates=(flops_per_second, read_bytes_per_second),
    )
    n_blocks = len(estimate.sizes.block_bytes)
    if segments is not None and (
        isinstance(segments, bool) or not isinstance(segments, int) or not 1 <= segments <= n_blocks
    ):
        raise ArgumentError(
            f"segments: expected 1 … {n_blocks} (the model has {n_blocks} decoder blocks), got {segments!r}"
        )
    budget = parse_bytes("memory", memory) if memory is not None else None
    if budget is None and devices:
        held = 0 if isinstance(source, Streamed) else estimate.sizes.weight_bytes
        budget = held + int(_USABLE * min(map(_available, devices)) / processes)
    host_budget = parse_bytes("host_memory", host_memory) if host_memory is not None else None
    return _choose(estimate, segments, boundaries, budget, host_budget, stated=memory is not None)


def _micro_batch(examples: int, length: int) -> tuple[int, int, int]:
    rows = min(examples, max(1, MICRO_BATCH_TOKENS // length))
    return rows, length, rows * length


def _devices_of(model: nn.Module | None) -> set[torch.device]:
    return set() if model is None else {parameter.device for parameter in model.parameters()}


def _choose(
    estimate: _Estimate,
    segments: int | None,
    boundaries: str | None,
    budget: int | None,
    host_budget: int | None,
    *,
    stated: bool,
) -> Plan:
    """The fewest segments that fit, and of these the fastest place for the hidden states."""
    n_blocks = len(estimate.sizes.block_bytes)
    tiers = (boundaries,) if boundaries is not None else ("device", "disk") if estimate.on_cpu else TIERS
    # The bound is quick, and enough wherever memory is plenty; the exact count takes some tenths of a second.
    for exact in (False, True):
        if exact:
            estimate.count_activations()
        for choice in [segments] if segments is not None else range(1, n_blocks + 1):
            for tier in tiers:
                result = estimate.plan(choice, tier)
                fits = budget is None or result.device_bytes <= budget
                enough = fits and (host_budget is None or result.host_bytes <= host_budget)
                if enough and (exact or choice in (1, segments)):
                    return result
        if not exact and budget is None and segments is None:
            return estimate.plan(1, tiers[0])
    smallest = min((estimate.plan(segments or n_blocks, tier) for tier in tiers), key=lambda made: made.device_bytes)
    if budget is not None and smallest.device_bytes > budget:
        # A number of segments that the caller fixed is the caller's risk: only a stated budget is refused.
        if segments is not None and not stated:
            return estimate.plan(segments, tiers[0])
        raise ArgumentError(
            f"memory: {_show(budget)} is not enough: {smallest.segments} segments of {n_blocks} blocks need "
            f"{_show(smallest.device_bytes)} ({_show(smallest.weight_bytes)} of it weights); give more memory or fewer "
            "examples"
        )
    raise ArgumentError(
        f"host_memory: {_show(host_budget)} is not enough: {_show(smallest.host_bytes)} are needed, of which "
        f"{_show(smallest.boundary_bytes)} for hidden states between segments; give more, or boundaries='disk'"
    )


class _Estimate:
    """Forms plans of one model and data size."""

    def __init__(
        self,
        model: nn.Module,
        *,
        streamed: bool,
        on_cpu: bool,
        tokens: int,
        micro_batch: tuple[int, int, int],
        statistics: int,
        rates: tuple[float | None, float | None],
    ) -> None:
        self.sizes: Footprint = footprint(model)
        self.on_cpu = on_cpu
        self._model, self._streamed, self._statistics, self._rates = model, streamed, statistics, rates
        self._tokens = tokens
        self._rows, self._length, self._scored = micro_batch
        self._micro_batch = self._rows * self._length
        self._activations = activation_bound(model) * self._micro_batch  # of one block

    def count_activations(self) -> None:
        """Replace the bound by a count, if the model allows."""
        counted = activation_bytes(self._model.config, self._rows, self._length)
        self._activations = self._activations if counted is None else counted

    def plan(self, segments: int, tier: str) -> Plan:
        """What the pass takes with so many segments and the hidden states there."""
        sizes, parts = self.sizes, split_blocks(len(self.sizes.block_bytes), segments)
        boundary = self._tokens * sizes.hidden * sizes.element
        # All lower boundaries, and the gradients above and below the segment at work.
        hidden = [(number + 1 + min(2, segments - 1)) * boundary for number in range(segments)]
        accumulators = [4 * self._statistics * sum(sum(sizes.eligible[block]) for block in part) for part in parts]
        temporary = 4 * sizes.widest * self._micro_batch * max(4, sizes.element)
        kept = kept_bytes([n for block in sizes.eligible for n in block])
        stages = []
        for number, part in enumerate(parts):
            activations = len(part) * self._activations + temporary
            if number == segments - 1:
                activations = max(activations, len(part) * self._activations + self._head_bytes())
            stages.append((self._weights(parts, number), accumulators[number], activations, hidden[number]))
        on_device = 1 if tier == "device" or (tier == "host" and self.on_cpu) else 0
        peak = max(w + acc + act + on_device * h for w, acc, act, h in stages)
        peak = max(peak, self._first_weights(parts))
        device = peak + (kept + _WORKSPACE if self.on_cpu else 0)
        host = 0 if self.on_cpu else kept + (hidden[-1] if tier == "host" else 0)
        recomputed = 1.0 + (segments - 1) / segments if segments > 1 else 1.0
        flops = 2.0 * sizes.active * self._tokens * (2 + recomputed)
        read = self._read_bytes(segments, parts)
        return Plan(
            segments=segments,
            micro_batch_tokens=self._micro_batch,
            n_blocks=len(sizes.block_bytes),
            eligible=sizes.n_eligible,
            parameters=sizes.parameters,
            streamed=self._streamed,
            boundaries=tier,
            weight_bytes=max(stage[0] for stage in stages),
            accumulator_bytes=max(accumulators),
            activation_bytes=max(stage[2] for stage in stages),
            boundary_bytes=max(hidden),
            kept_bytes=kept,
            device_bytes=device,
            host_bytes=host,
            disk_bytes=max(hidden) if tier == "disk" else 0,
            read_bytes=read,
            flops=flops,
            seconds=self._seconds(flops, read),
        )

    def _weights(self, parts: Sequence[range], number: int) -> int:
        """Weights in memory while segment ``number`` goes backward: its own, and the next ones on their way."""
        sizes = self.sizes
        if not self._streamed:
            return sizes.weight_bytes
        held = [*parts[number], *(parts[number - 1] if number else ())]
        head = sizes.head_bytes if number == len(parts) - 1 else 0
        return sizes.rest_bytes + head + sum(sizes.block_bytes[block] for block in held)

    def _first_weights(self, parts: Sequence[range]) -> int:
        """Weights in memory during the self-check."""
        sizes = self.sizes
        if not self._streamed:
            return sizes.weight_bytes
        ends = sizes.embedding_bytes + (0 if sizes.tied else sizes.head_bytes)
        return sizes.rest_bytes + ends + sum(sizes.block_bytes[block] for block in parts[0])

    def _head_bytes(self) -> int:
        """Logits of one chunk of scored tokens: as they are, in fp32, their softmax and their gradient."""
        logits = min(LOGITS_PER_CHUNK, self._scored * self.sizes.vocabulary)
        return logits * (2 * self.sizes.element + 3 * 4)

    def _read_bytes(self, segments: int, parts: Sequence[range]) -> int:
        if not self._streamed:
            return 0
        if segments == 1:
            return self.sizes.weight_bytes
        # The last segment goes forward and backward in one; the head runs in the self-check and at the end.
        twice = sum(self.sizes.block_bytes[: parts[-1].start]) + self.sizes.head_bytes
        return self.sizes.weight_bytes + twice

    def _seconds(self, flops: float, read: int) -> float | None:
        compute, disk = self._rates
        if compute is None:
            return None
        return max(flops / compute, read / disk if disk is not None else 0.0)
