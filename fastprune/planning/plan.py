"""The choice of a plan: how many segments a pass is cut into, and where the hidden states between them are kept.

In: a model or its config, the size of the calibration data, budgets of memory. Out: the
:class:`~fastprune.planning.estimate.Plan` with the fewest segments that fits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from fastprune.checkpoint.built_size import build_on_meta
from fastprune.checkpoint.load import load_config
from fastprune.checkpoint.streamed import Streamed
from fastprune.errors import ArgumentError, setting
from fastprune.model.anatomy import Anatomy
from fastprune.model.weights import Resident, Weights
from fastprune.planning.estimate import Estimate, Plan, human
from fastprune.planning.segments import OFFLOADS

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
# Limit and use of a container's memory, of both versions of Linux' control groups.
_CONTAINER = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# Share of the free memory that a pass may plan with; the rest is for fragmentation and temporaries, and on a CPU for
# other work of the machine.
_USABLE = {"cpu": 0.8, "cuda": 0.9}


def parse_bytes(argument: str, value: int | str) -> int:
    """``"80GiB"``, ``"3.5 GB"`` or a number of bytes, as bytes.

    Raises:
        ArgumentError: Not a size, or not positive.
    """
    expected = "expected a size such as '80GiB' or '80GB' (with K, M, G or T), or a positive number of bytes"
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)?\s*", value, re.IGNORECASE)
        if match is None:
            raise ArgumentError(f"{expected}, got {value!r}", argument=argument)
        value = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ArgumentError(f"{expected}, got {value!r}", argument=argument)
    return value


def _available(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        # Memory that torch has reserved and no tensor uses is free, too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: half of the physical memory is a cautious guess
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return int(min([free, *(_left_of(*names) for names in _CONTAINER)]))


def _left_of(limit: str, used: str) -> float:
    """Bytes that the limit of a container leaves, its file cache counted as free; infinite outside a container."""
    try:
        folder = Path("/sys/fs/cgroup")
        lines = dict(line.split() for line in (folder / used).with_name("memory.stat").read_text().splitlines())
        cached = int(lines.get("inactive_file", 0))
        return int((folder / limit).read_text()) - int((folder / used).read_text()) + cached
    except (OSError, ValueError):  # no such file, or the word "max"
        return math.inf


def plan(
    model_or_config: object,
    n_examples: int,
    n_tokens: int,
    *,
    memory: int | str | None = None,
    host_memory: int | str | None = None,
    segments: int | None = None,
    offload: str | None = None,
    statistics: int = 1,
    micro_batch: tuple[int, int, int] | None = None,
    padded_tokens: Sequence[int] | None = None,
    processes: int = 1,
    flops_per_second: float | None = None,
    read_bytes_per_second: float | None = None,
) -> Plan:
    """Choose the number of segments for a budget and estimate what a pass takes.

    Args:
        model_or_config: A causal LM, whose weights are all in memory; or, for a pass that streams them from disk, the
            folder of a checkpoint or its ``config.json``, a Hugging Face config (no weights are read or made), or
            :class:`~fastprune.checkpoint.streamed.Streamed` weights.
        n_examples: Examples of both sets together.
        n_tokens: Mean tokens of an example.
        memory: Device memory budget, weights included, in bytes or as ``"80GiB"``; ``None``: the model and four fifths
            (on a GPU nine tenths) of the memory that is still free, or no limit for a config.
        host_memory: Host memory budget if the model's device is a GPU; ``None``: four fifths of what is free, no limit
            for a config. Given with a config, it means that the device is a GPU.
        segments: Fix the number instead of choosing the smallest that fits.
        offload: Fix where hidden states between segments are kept (``"device"``, ``"host"``, ``"disk"``) instead of
            choosing the first that fits.
        statistics: Accumulators live at the same time for one weight (the larger of the two sets' counts).
        micro_batch: Rows, tokens of each and scored tokens of the largest micro-batch, if the data are known.
        padded_tokens: Tokens of every micro-batch, if the data are known.
        processes: Number of processes that share the free memory of the device, each with a pass like this one.
        flops_per_second: Rate of matrix products, for the time.
        read_bytes_per_second: Rate of the disk, for the time; without it reading counts as free.

    Returns:
        The plan; ``print`` it.

    Raises:
        ArgumentError: ``model_or_config`` is none of these, a number is not positive, ``segments`` is not in 1 … L, or
            no number of segments fits the budget; the message says how much would be needed.
        NotFoundError: The folder does not exist.
        ModelError: The folder's weights are quantized, its config has an invalid key, or transformers cannot build this
            kind of model.
    """
    for argument, value in (("n_examples", n_examples), ("n_tokens", n_tokens)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ArgumentError(f"expected a positive integer, got {value!r}", argument=argument)
    n_examples, n_tokens = int(n_examples), int(n_tokens)  # NumPy's numbers overflow
    for argument, rate in (("flops_per_second", flops_per_second), ("read_bytes_per_second", read_bytes_per_second)):
        if rate is not None and not rate > 0:
            raise ArgumentError(f"expected a positive rate, got {rate!r}", argument=argument)
    if offload is not None and offload not in OFFLOADS:
        raise ArgumentError(f"expected one of {', '.join(OFFLOADS)}, got {offload!r}", argument="offload")
    source = _source(model_or_config)
    streamed = not isinstance(source, nn.Module) and not isinstance(source, Resident)
    # If a model is on several devices, all that a segment needs may fall on the one with the least memory.
    devices = _devices_of(source)
    estimate = Estimate(
        _anatomy_of(source),
        streamed=streamed,
        on_cpu=all(device.type == "cpu" for device in devices) if devices else host_memory is None,
        tokens=n_examples * n_tokens,
        # If the data are unknown: two equal sets, and every token scored.
        micro_batch=micro_batch or _micro_batch(math.ceil(n_examples / 2), n_tokens),
        padded_tokens=padded_tokens,
        statistics=statistics,
        rates=(flops_per_second, read_bytes_per_second),
    )
    n_blocks = len(estimate.sizes.block_bytes)
    if segments is not None and (
        isinstance(segments, bool) or not isinstance(segments, int) or not 1 <= segments <= n_blocks
    ):
        raise ArgumentError(
            f"expected 1 … {n_blocks} (the model has {n_blocks} decoder blocks), got {segments!r}", argument="segments"
        )
    budget = parse_bytes("memory", memory) if memory is not None else None
    if budget is None and devices:
        held = 0 if streamed else estimate.sizes.weight_bytes
        free = min(_USABLE.get(device.type, _USABLE["cpu"]) * _available(device) for device in devices)
        budget = held + int(free / processes)
    host_budget = parse_bytes("host_memory", host_memory) if host_memory is not None else None
    if host_budget is None and devices and not estimate.on_cpu:
        host_budget = int(_USABLE["cpu"] * _available(torch.device("cpu")) / processes)
    return _choose(estimate, segments, offload, budget, host_budget, stated=memory is not None)


def _source(model_or_config: object) -> object:
    """A model, streamed weights or a config; that of the checkpoint where a folder is given."""
    if isinstance(model_or_config, str | os.PathLike):
        return load_config(os.fspath(model_or_config))
    known = isinstance(model_or_config, nn.Module | Weights) or hasattr(model_or_config, "get_text_config")
    if not known or isinstance(model_or_config, type):
        raise ArgumentError(
            "expected a causal language model, a Hugging Face config or the folder of a checkpoint, "
            f"got {model_or_config if isinstance(model_or_config, type) else type(model_or_config).__name__}",
            argument="model_or_config",
        )
    return model_or_config


def _micro_batch(examples: int, length: int) -> tuple[int, int, int]:
    rows = min(examples, max(1, MICRO_BATCH_TOKENS // length))
    return rows, length, rows * length


def _anatomy_of(source: object) -> Anatomy:
    if isinstance(source, Weights):
        return source.anatomy
    return Anatomy.of(source if isinstance(source, nn.Module) else build_on_meta(source), allow_meta=True)


def _devices_of(source: object) -> set[torch.device]:
    """Where the weights are, or will be; nowhere, for a config."""
    if isinstance(source, Streamed):
        return {source.device}
    model = source.model if isinstance(source, Resident) else source
    return {parameter.device for parameter in model.parameters()} if isinstance(model, nn.Module) else set()


def _choose(
    estimate: Estimate,
    segments: int | None,
    offload: str | None,
    budget: int | None,
    host_budget: int | None,
    *,
    stated: bool,
) -> Plan:
    """The fewest segments that fit, with the fastest tier that fits for the hidden states."""
    n_blocks = len(estimate.sizes.block_bytes)
    tiers = (offload,) if offload is not None else ("device", "disk") if estimate.on_cpu else OFFLOADS
    # The bound is quick, and enough where memory is plentiful; the exact count takes some tenths of a second.
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
        if not exact and budget is None and host_budget is None and segments is None:
            return estimate.plan(1, tiers[0])
    smallest = min((estimate.plan(segments or n_blocks, tier) for tier in tiers), key=lambda made: made.device_bytes)
    if budget is not None and smallest.device_bytes > budget:
        # The caller has fixed the number of segments at their own risk: only a stated budget is refused.
        if segments is not None and not stated:
            return estimate.plan(segments, tiers[0])
        raise ArgumentError(
            f"{human(budget)} is not enough: {smallest.segments} segments of {n_blocks} blocks need "
            f"{human(smallest.device_bytes)} ({human(smallest.weight_bytes)} of it weights); give more memory or fewer "
            "examples",
            argument="memory",
        )
    assert host_budget is not None  # nothing else is left that can be too small
    raise ArgumentError(
        f"{human(host_budget)} is not enough: {human(smallest.host_bytes)} are needed, of which "
        f"{human(smallest.boundary_bytes)} for hidden states between segments; give more, or "
        f"{setting('offload', 'disk')}",
        argument="host_memory",
    )
