"""Fingerprint of a model's weights, from fixed samples of its matrices.

In: named matrices, or samples of them read from disk. Out: a hash that is equal for one model in float32 and bfloat16,
in memory and on disk, and different for another model. (A float16 copy may differ: it rounds tiny weights in its own
way.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from fastprune.errors import MaskError, ModelError, setting
from fastprune.model.adapters import plain_name

SAMPLES = 64  # per matrix; a 7-block model then has 3,000 of them, enough to tell fine-tuned copies apart

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# name -> (ascending flat indices, the values that stood there)
Overlay = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def sample_positions(numel: int) -> torch.Tensor:
    """Sampled flat positions of a matrix of ``numel`` weights: int64, evenly spread, all of them if there are few."""
    count = min(numel, SAMPLES)
    return torch.arange(count, dtype=torch.int64) * numel // max(count, 1)


def sample(matrix: torch.Tensor) -> torch.Tensor:
    """The values at :func:`sample_positions` of a matrix of any float dtype, device and stride: float32, on the CPU."""
    where = torch.unravel_index(sample_positions(matrix.numel()).to(matrix.device), matrix.shape)
    return matrix.detach()[where].to(device="cpu", dtype=torch.float32)


def fingerprint(matrices: Mapping[str, torch.Tensor], restored: Sequence[Overlay] = ()) -> str:
    """Hash of name, shape and samples of each matrix, rounded to bfloat16; -0 counts as 0. The order does not matter.

    Args:
        matrices: Parameter name to weight, of any float dtype, device and stride.
        restored: Values that masks have replaced, the latest mask first. They are put back over the samples before
            hashing, which gives the fingerprint of the model without these masks.

    Returns:
        64 hexadecimal digits.

    Raises:
        ModelError: A matrix is on the meta device.
    """
    samples = {}
    for name, matrix in matrices.items():
        if matrix.is_meta:
            raise ModelError(f"{name}: expected a weight with values, got one on the meta device; load the model first")
        values, positions = sample(matrix), sample_positions(matrix.numel())
        for overlay in restored:
            if name in overlay:
                _put_back(values, positions, *overlay[name])
        samples[name] = (tuple(matrix.shape), values)
    return fingerprint_of_samples(samples)


def fingerprint_of_samples(samples: Mapping[str, tuple[tuple[int, ...], torch.Tensor]]) -> str:
    """:func:`fingerprint` from ``{name: (shape, values at sample_positions)}``, for weights that are read from disk."""
    digest = hashlib.sha256(b"fastprune fingerprint 1")
    for name in sorted(samples):
        shape, values = samples[name]
        rounded = values.to(torch.float32).to(torch.bfloat16) + 0.0  # adding +0 turns -0 into +0
        rounded = torch.where(rounded.isnan(), torch.full_like(rounded, torch.nan), rounded)
        digest.update(f"{name}{list(shape)}".encode())
        digest.update(rounded.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def other_fingerprint(expected: str, found: str, whose: str) -> MaskError:
    """The error for a mask whose fingerprint is not that of the model.

    Args:
        expected: The mask's.
        found: The model's.
        whose: The model, for the message.
    """
    return MaskError(
        f"it was made for a model with the fingerprint {expected[:12]}…, {whose} has {found[:12]}…; "
        f"{setting('strict', False)} "
        "applies it all the same",
        argument="mask",
    )


def _put_back(values: torch.Tensor, positions: torch.Tensor, indices: torch.Tensor, old: torch.Tensor) -> None:
    if not len(indices):
        return
    slot = torch.searchsorted(indices.cpu(), positions).clamp(max=len(indices) - 1)
    hit = indices.cpu()[slot] == positions
    values[hit] = old.cpu()[slot[hit]].to(torch.float32)


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of all that a model's answers depend on in memory: name, shape, dtype and bits of every parameter.

    Unlike :func:`fingerprint` it reads every weight, so that it also tells a model from the same with a mask on it, in
    which a few weights are different; and float32 from bfloat16, which answer differently. Bits are summed, not hashed,
    on the device that they are on: at the rate of its memory.

    Args:
        model: A model in memory, wrapped by adapters or not; where each weight lies does not count.

    Returns:
        32 hexadecimal digits.

    Raises:
        ModelError: A weight is on the meta device.
    """
    digest = hashlib.sha256(b"fastprune weights 1")
    parameters = {plain_name(name): weight for name, weight in model.named_parameters()}
    for name, weight in sorted(parameters.items()):
        if weight.is_meta:
            raise ModelError(f"{name}: expected a weight with values, got one on the meta device; load the model first")
        bits = weight.detach().view(_INTEGERS[weight.element_size()])
        digest.update(f"{name}{list(weight.shape)}{weight.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()[:32]
