"""Identity of an in-memory model: do the processes of a run hold the same weights?

In: a model in memory. Out: a hash of every bit of every parameter and stored buffer, each in its place, and of the
settings of adapters. Samples would not do: a mask hardly ever meets one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from fastprune.model.adapters import adapter_settings, plain_name

# Words of 32 bits that are summed together: their products, in 64 bits, take 8 MiB.
_CHUNK = 1 << 20


def identity_of(model: nn.Module) -> str:
    """A hash over every parameter, every persistent buffer and the adapters' settings; equal on any device."""
    digest = hashlib.sha256()
    for name, tensor in _held(model):
        digest.update(f"{plain_name(name)} {tensor.dtype} {list(tensor.shape)} {_sums(tensor)}\n".encode())
    digest.update(repr(adapter_settings(model)).encode())
    return digest.hexdigest()


def _held(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            # Others are made from the config, and again by forwards: the frequencies of dynamic rotary positions, say.
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


def _sums(tensor: torch.Tensor) -> list[int]:
    """One number for each chunk of a tensor's bits, in which each word has a factor of its own.

    A plain sum is the same whatever the order. Products of words of 32 bits with random factors of 63, added modulo
    2^64, are the multilinear hash: two contents meet with a chance of about 2^-32. The arithmetic of integers is exact,
    so devices agree.
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    sums = []
    for start in range(0, len(raw), 4 * _CHUNK):
        part = raw[start : start + 4 * _CHUNK].clone()  # aligned, as a view of other type has to be
        words = nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).to(torch.int64)
        sums.append((words * _factors(tensor.device)[: len(words)]).sum())
    return torch.stack(sums).tolist() if sums else []


@functools.lru_cache(maxsize=8)
def _factors(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2**63 - 1, (_CHUNK,), generator=generator, dtype=torch.int64).to(device)
