"""How much a pass needs, and how many segments it has to be cut into.

In: a model or its config, the size of the calibration data, a budget of memory. Out: :class:`Plan`. Estimates count
what dominates (weights, accumulators, activations of one segment, boundaries) and leave out what is small beside it.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import torch
from torch import nn

from fastprune.errors import ArgumentError
from fastprune.model.eligible import Matrix, decoder_blocks, eligible_matrices, unwrap

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
        weight_bytes: The model.
        accumulator_bytes: Live statistics of the largest segment, fp32.
        activation_bytes: What autograd keeps of one segment for one micro-batch (an estimate).
        boundary_bytes: Hidden states kept at segment boundaries, all examples.
        flops: Of the whole pass: forward, recompute, dX and dW.
    """

    segments: int
    micro_batch_tokens: int
    n_blocks: int
    eligible: int
    parameters: int
    weight_bytes: int
    accumulator_bytes: int
    activation_bytes: int
    boundary_bytes: int
    flops: float

    @property
    def peak_bytes(self) -> int:
        """Weights, accumulators, activations and boundaries together."""
        return self.weight_bytes + self.accumulator_bytes + self.activation_bytes + self.boundary_bytes

    def __str__(self) -> str:
        rows = (
            ("model", f"{self.parameters:,} parameters, {self.eligible:,} of them scored, {self.n_blocks} blocks"),
            ("segments", f"{self.segments} ({math.ceil(self.n_blocks / self.segments)} blocks at a time)"),
            ("micro-batch", f"{self.micro_batch_tokens:,} tokens"),
            ("weights", _show(self.weight_bytes)),
            ("accumulators", _show(self.accumulator_bytes)),
            ("activations", _show(self.activation_bytes)),
            ("boundaries", _show(self.boundary_bytes)),
            ("peak", _show(self.peak_bytes)),
            ("work", f"{self.flops / 1e12:.1f} TFLOP"),
        )
        return "\n".join(f"{name:<13}{text}" for name, text in rows)


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
    statistics: int = 1,
) -> Plan:
    """Choose the number of segments for a budget and estimate what a pass takes.

    Args:
        model_or_config: A causal LM, or a Hugging Face config (no weights are made).
        n_examples: Examples of both sets together.
        n_tokens: Mean tokens of an example.
        memory: Budget on the model's device, weights included, as bytes or ``"80GiB"``; ``None``: the model and four
            fifths of what is free beside it, or no limit for a config.
        host_memory: Further budget for the boundaries when ``memory`` is a GPU's; today everything of a pass lies on
            the model's device, so only a value that could not even hold the boundaries is refused.
        segments: Fix the number instead of choosing the smallest that fits.
        statistics: Accumulators live at the same time for one weight (the larger of the two sets' counts).

    Returns:
        The plan; ``print`` it.

    Raises:
        ArgumentError: A number is not positive, ``segments`` is not in 1 … L, or no number of segments fits the budget;
            the message says how much would be needed.
    """
    for argument, value in (("n_examples", n_examples), ("n_tokens", n_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{argument}: expected a positive integer, got {value!r}")
    if isinstance(model_or_config, nn.Module):
        model, on_meta = unwrap(model_or_config), False
    else:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model, on_meta = AutoModelForCausalLM.from_config(model_or_config), True
    budget = parse_bytes("memory", memory) if memory is not None else None
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if budget is None and not on_meta:
        budget = weight_bytes + int(_USABLE * _available(next(model.parameters()).device))
    n_blocks = len(decoder_blocks(model)[1])
    if segments is not None and (
        isinstance(segments, bool) or not isinstance(segments, int) or not 1 <= segments <= n_blocks
    ):
        raise ArgumentError(
            f"segments: expected 1 … {n_blocks} (the model has {n_blocks} decoder blocks), got {segments!r}"
        )
    choices = [segments] if segments is not None else range(1, n_blocks + 1)
    for choice in choices:
        result = _estimate(model, n_blocks, weight_bytes, n_examples * n_tokens, choice, statistics, on_meta)
        if budget is None or result.peak_bytes <= budget:
            break
    else:
        # A number of segments that the caller fixed is the caller's risk: only a stated budget is refused.
        if memory is not None or segments is None:
            raise ArgumentError(
                f"memory: {_show(budget)} is not enough: {result.segments} segments of {result.n_blocks} blocks need "
                f"{_show(result.peak_bytes)} (weights {_show(weight_bytes)}); give more memory or fewer examples"
            )
    if host_memory is not None and parse_bytes("host_memory", host_memory) < result.boundary_bytes:
        raise ArgumentError(
            f"host_memory: the boundaries alone need {_show(result.boundary_bytes)}, got {host_memory!r}"
        )
    return result


def _estimate(
    model: nn.Module, n_blocks: int, weight_bytes: int, tokens: int, segments: int, statistics: int, on_meta: bool
) -> Plan:
    matrices = eligible_matrices(model, allow_meta=on_meta)
    config = model.config.get_text_config()
    per_block = [0] * n_blocks
    widths = [0.0] * n_blocks
    products = 0.0  # multiplications by a weight for one token
    for matrix in matrices:
        shape, share = matrix.weight.shape, _share_of_tokens(matrix, config)
        per_block[matrix.block] += shape.numel()
        widths[matrix.block] += share * sum(shape)
        products += share * shape.numel()
    size = math.ceil(n_blocks / segments)
    element = matrices[0].weight.element_size()
    hidden = config.hidden_size
    micro_batch = min(MICRO_BATCH_TOKENS, tokens)
    # Autograd and the capture keep the input and output of each matrix, and fp32 copies inside the norms.
    activations = int(size * max(widths) * micro_batch * element) + size * 6 * hidden * micro_batch * 4
    recomputed = 1.0 if segments == 1 else 1.0 + (segments - 1) / segments
    return Plan(
        segments=segments,
        micro_batch_tokens=micro_batch,
        n_blocks=n_blocks,
        eligible=sum(per_block),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=weight_bytes,
        accumulator_bytes=4 * statistics * size * max(per_block),
        activation_bytes=activations,
        boundary_bytes=segments * tokens * hidden * element,
        flops=2.0 * products * tokens * (2 + recomputed),
    )


def _share_of_tokens(matrix: Matrix, config: object) -> float:
    """Which part of the tokens a matrix multiplies, on average; all of them where the config does not say."""
    if matrix.expert is None:
        return 1.0
    n_experts = len(matrix.parameter)
    return min(1.0, (getattr(config, "num_experts_per_tok", None) or n_experts) / n_experts)
