"""The square root in ``wanda``: rounded once, whatever the layout, and the same bits on every backend."""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastprune import ops
from fastprune.ops import cuda, reference

BACKENDS = [name for name in ("torch", "cpp") if ops.available_backends()[name] == "available"]
EXTREME = (0.0, 1e-45, 5e-44, 1.1754942e-38, 1.17549435e-38, 1e-30, 1.0, 2.0, 3e38, 3.4028235e38, float("inf"))


def patterns(step: int) -> torch.Tensor:
    """Every step-th float32 from 0 to infinity."""
    return torch.from_numpy(np.arange(0, 0x7F800001, step, dtype=np.int32)).view(torch.float32)


def layouts(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values without gaps, from an odd address, with gaps, reversed in memory."""
    gaps = torch.stack([values, values], 1)[:, 0]
    return {"plain": values, "odd": torch.cat([values[:1], values])[1:], "gaps": gaps, "rows": values[:, None][:, 0]}


@pytest.mark.parametrize("layout", ["plain", "odd", "gaps", "rows"])
def test_float32_roots_are_those_of_float64_rounded(layout: str) -> None:
    """The root of a float32 is never so near the middle between two float32 that float64's rounding could cross it."""
    values = layouts(patterns(2003))[layout]
    wanted = torch.from_numpy(np.sqrt(values.numpy().astype(np.float64)).astype(np.float32))
    assert torch.equal(reference.root(values), wanted)
    for n in range(70):  # whole vectors, and what is left of one
        assert torch.equal(reference.root(values[5000 : 5000 + n]), wanted[5000 : 5000 + n])


def test_float64_roots_are_the_nearest() -> None:
    generator = torch.Generator().manual_seed(3)
    scale = torch.randint(-1040, 1020, (3000,), generator=generator).double()
    values = torch.rand(3000, dtype=torch.float64, generator=generator) * torch.exp2(scale)
    for value, root in zip(values.tolist(), reference.root(values).tolist(), strict=True):
        if value:
            half = Fraction(float(np.spacing(root))) / 2
            assert (Fraction(root) - half) ** 2 < Fraction(value) < (Fraction(root) + half) ** 2


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(4)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        weight = torch.randn(67, 1031, generator=generator).to(dtype)
        weight[weight == 0] = 1
        inputs = torch.rand(1031, generator=generator) * torch.exp2(
            torch.randint(-60, 60, (1031,), generator=generator)
        )
        inputs[: len(EXTREME)] = torch.tensor(EXTREME)
        found[f"{dtype}"] = weight, inputs
        found[f"{dtype}, statistic with gaps"] = weight, torch.stack([inputs, inputs], 1)[:, 0]
        found[f"{dtype}, float64 statistic"] = weight, inputs.double() * 1.1
        found[f"{dtype}, of rows"] = weight.T.contiguous(), inputs[:, None]
        found[f"{dtype}, whole statistic"] = weight, inputs.expand(67, -1).contiguous()
    return found


def defined(weight: torch.Tensor, statistic: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|w| times the root, each rounded once, in NumPy; sorted, ties by index."""
    wide = np.float64 if torch.float64 in (weight.dtype, statistic.dtype) else np.float32
    root = np.sqrt(statistic.numpy().astype(wide)).astype(wide)
    with np.errstate(over="ignore"):
        scores = (np.abs(weight.to(torch.float64).numpy().astype(wide)) * root).astype(np.float32).ravel()
    order = np.argsort(-scores, kind="stable")
    return torch.from_numpy(order), torch.from_numpy(scores[order])


@pytest.mark.slow
@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_backends_select_the_same_bits(backend: str, request: pytest.FixtureRequest, monkeypatch) -> None:
    if backend == "cuda":
        if sys.platform != "linux" or shutil.which("g++") is None:
            pytest.skip("the emulation needs Linux and g++")
        module = request.getfixturevalue("emulated")

        @contextmanager
        def device_of(tensors):
            yield module, 0, 0

        monkeypatch.setattr(cuda, "_device_of", device_of)
    for name, (weight, statistic) in cases().items():
        indices, values = defined(weight, statistic)
        for k in (30, 1000, weight.numel()):
            if backend == "cuda":
                [(_, found)] = cuda.top_scores_of_each({"": (weight, statistic)}, "wanda", {"": k})
            else:
                found = ops.top_scores(weight, statistic, "wanda", k, backend=backend)
            assert torch.equal(found[0], indices[:k]), (name, k)
            assert torch.equal(found[1].view(torch.int32), values[:k].contiguous().view(torch.int32)), (name, k)
