"""What a pass takes with a given number of segments: peaks of memory of every kind, work, reading, time.

In: the sizes of a model, the amount of data. Out: :class:`Plan`. The estimate follows the engine stage by stage, and
tests compare it with measured peaks. :mod:`fastprune.planning.plan` chooses among plans.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastprune.model.anatomy import Anatomy
from fastprune.model.block_view import tokens_per_chunk
from fastprune.planning.footprint import Footprint, activation_bound, activation_bytes, footprint
from fastprune.planning.list_lengths import kept_bytes
from fastprune.planning.segments import split_blocks

# On a CPU, what a pass over a tiny model takes: buffers of the matrix library, stacks of threads.
_WORKSPACE = 64 * 2**20
# Share that is free between pieces in use where weights are loaded and dropped; it varies by some 5 % between runs.
_FRAGMENTED = 0.05


def human(n_bytes: float) -> str:
    """A size in MiB or GiB, to be read."""
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
        offload: Where hidden states between segments are kept: ``"device"``, ``"host"`` or ``"disk"``.
        weight_bytes: Weights in memory at the peak.
        accumulator_bytes: Live statistics of the largest segment, fp32.
        activation_bytes: What autograd keeps of one segment for one micro-batch, and temporaries.
        boundary_bytes: Hidden states and gradients at segment boundaries, all examples.
        kept_bytes: The best-scored weights of every matrix, in host memory.
        device_bytes: Peak on the model's device; on a CPU it includes what is in host memory.
        host_bytes: Peak in host memory if the model is on a GPU.
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
    offload: str
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
        moved = f"{human(self.read_bytes)} read from disk" if self.streamed else "nothing read from disk"
        rows = [
            ("model", f"{self.parameters:,} parameters, {self.eligible:,} of them scored, {self.n_blocks} blocks"),
            ("segments", f"{self.segments} ({blocks} block{'s' * (blocks > 1)} at a time)"),
            ("micro-batch", f"{self.micro_batch_tokens:,} tokens"),
            (
                "weights",
                f"{human(self.weight_bytes)} at a time, {'streamed from disk' if self.streamed else 'all'}",
            ),
            ("accumulators", human(self.accumulator_bytes)),
            ("activations", human(self.activation_bytes)),
            ("hidden states", f"{human(self.boundary_bytes)} on the {self.offload}".replace("the disk", "disk")),
            ("kept scores", human(self.kept_bytes)),
            ("peak, device", human(self.device_bytes)),
            ("peak, host", human(self.host_bytes) if self.host_bytes else "(the device's)"),
            ("peak, disk", human(self.disk_bytes) if self.disk_bytes else "none"),
            ("work", f"{self.flops / 1e12:.1f} TFLOP, {moved}"),
            ("time", "give rates to have it" if self.seconds is None else f"{self.seconds:,.1f} s at the given rates"),
        ]
        return "\n".join(f"{name:<14}{text}" for name, text in rows)


class Estimate:
    """Forms plans of one model and data size."""

    def __init__(
        self,
        anatomy: Anatomy,
        *,
        streamed: bool,
        on_cpu: bool,
        tokens: int,
        micro_batch: tuple[int, int, int],
        padded_tokens: Sequence[int] | None,
        statistics: int,
        rates: tuple[float | None, float | None],
    ) -> None:
        self.sizes: Footprint = footprint(anatomy)
        self.on_cpu = on_cpu
        self._model, self._streamed, self._statistics, self._rates = anatomy.model, streamed, statistics, rates
        self._tokens = tokens
        self._rows, self._length, self._scored = micro_batch
        self._micro_batch = self._rows * self._length
        self._padded_tokens = padded_tokens or [self._micro_batch] * math.ceil(tokens / self._micro_batch)
        # The last segment goes backward first, so what is kept while a block runs is of it and of the blocks above it.
        matrices = [n for block in self.sizes.eligible for n in block]
        firsts = itertools.accumulate((len(block) for block in self.sizes.eligible[:-1]), initial=0)
        self._kept_from = [kept_bytes(matrices, first) for first in firsts]
        self._activations = activation_bound(anatomy) * self._micro_batch  # of one block
        # Masks and position tables that blocks are given, of one micro-batch.
        self._given = self._rows * self._length**2 + 4 * self._length * self.sizes.hidden

    def count_activations(self) -> None:
        """Replace the bound by a count, if the model allows."""
        counted = activation_bytes(self._model.config, self._rows, self._length)
        if counted is not None:
            self._activations, self._given = counted

    def plan(self, segments: int, tier: str) -> Plan:
        """What the pass takes with so many segments and with the hidden states in a tier."""
        sizes, parts = self.sizes, split_blocks(len(self.sizes.block_bytes), segments)
        boundary = self._tokens * sizes.hidden * sizes.element
        if tier == "host" and not self.on_cpu:
            # Pinned memory is allocated in powers of two, a piece for each micro-batch.
            pieces = (tokens * sizes.hidden * sizes.element for tokens in self._padded_tokens)
            boundary = sum(1 << (n_bytes - 1).bit_length() for n_bytes in pieces)
        # All lower boundaries, and the gradients above and below the segment that runs.
        hidden = [(number + 1 + min(2, segments - 1)) * boundary for number in range(segments)]
        accumulators = [4 * self._statistics * sum(sum(sizes.eligible[block]) for block in part) for part in parts]
        temporary = 4 * sizes.widest * self._micro_batch * max(4, sizes.element)
        stages = []
        for number, part in enumerate(parts):
            activations = len(part) * self._activations + temporary
            if number == segments - 1:
                activations = max(activations, len(part) * self._activations + self._head_bytes())
            kept = self._kept_from[part.start]
            stages.append((self._weights(parts, number), accumulators[number], activations, hidden[number], kept))
        on_device = tier == "device" or (tier == "host" and self.on_cpu)
        given = self._given * math.ceil(self._tokens / self._micro_batch)
        peak = max(w + acc + act + on_device * h + given + self.on_cpu * kept for w, acc, act, h, kept in stages)
        peak = max(peak, self._first_weights(parts))
        device = peak + self.on_cpu * (_WORKSPACE + self._streamed * int(_FRAGMENTED * peak))
        host = 0 if self.on_cpu else max(kept + (tier == "host") * h for *_, h, kept in stages)
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
            offload=tier,
            weight_bytes=max(stage[0] for stage in stages),
            accumulator_bytes=max(accumulators),
            activation_bytes=max(stage[2] for stage in stages),
            boundary_bytes=max(hidden),
            kept_bytes=self._kept_from[0],
            device_bytes=device,
            host_bytes=host,
            disk_bytes=max(hidden) if tier == "disk" else 0,
            read_bytes=read,
            flops=flops,
            seconds=self._seconds(flops, read),
        )

    def _weights(self, parts: Sequence[range], number: int) -> int:
        """Weights in memory while segment ``number`` goes backward: its own, and those that are read ahead."""
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
        vocabulary = self.sizes.vocabulary
        logits = min(tokens_per_chunk(vocabulary, on_gpu=not self.on_cpu), self._scored) * vocabulary
        return logits * (2 * self.sizes.element + 3 * 4)

    def _read_bytes(self, segments: int, parts: Sequence[range]) -> int:
        if not self._streamed:
            return 0
        if segments == 1:
            return self.sizes.weight_bytes
        # The last segment goes forward and backward without a break; the head runs in the self-check and at the end.
        twice = sum(self.sizes.block_bytes[: parts[-1].start]) + self.sizes.head_bytes
        return self.sizes.weight_bytes + twice

    def _seconds(self, flops: float, read: int) -> float | None:
        compute, disk = self._rates
        if compute is None:
            return None
        return max(flops / compute, read / disk if disk is not None else 0.0)
