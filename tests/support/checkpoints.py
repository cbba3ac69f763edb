"""Masks for checkpoint folders, and comparison of what the folders hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fastprune.checkpoint.patch import patch_checkpoint
from fastprune.masking.apply import matrices_of
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint


def mask_for(model: torch.nn.Module) -> PruneMask:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    generator = torch.Generator().manual_seed(1)
    indices = {
        name: torch.randperm(math.prod(shape), generator=generator)[: 5 if "mlp" in name else 0].sort().values
        for name, shape in shapes.items()
    }
    return PruneMask(indices, shapes, {"fingerprint": fingerprint(matrices_of(model, shapes))})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def refused(
    tmp_path: Path, error: type[BaseException], message: str | None, mask: PruneMask, **options: object
) -> None:
    """The call fails with this message, and neither folder shows any trace of it."""
    before = contents(tmp_path)
    with pytest.raises(error, match=message):
        patch_checkpoint(tmp_path / "in", mask, tmp_path / "out", **options)
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def change(folder: Path, name: str = "config.json", **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
