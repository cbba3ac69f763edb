"""Checks that all launchers share: the device of a launch, and dtypes and strides that the kernels can take.

``fastprune.ops`` has checked shapes and devices; the checks here follow from how the kernels are written.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from fastprune_kernels.tiling import tile_position
from torch import Tensor
from triton.runtime import driver

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Triton decides this when it decorates a function, so a decorated function is tested, not the environment.
INTERPRETED = not isinstance(tile_position, triton.JITFunction)


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Launches go to the current device; this makes it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability() -> tuple[int, int]:
    """Compute capability of the current device; that of an H100 where kernels are interpreted."""
    return (9, 0) if INTERPRETED else divmod(driver.active.get_current_target().arch, 10)


def check_inputs(*tensors: Tensor) -> None:
    """Raise TypeError unless the inputs have one dtype, and one that the kernels take."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= set(INPUT_DTYPES):
        raise TypeError(f"inputs: expected one dtype of {INPUT_DTYPES}, got {sorted(map(str, dtypes))}")


def check_accumulators(*accumulators: Tensor, float64: bool = False) -> None:
    """Raise TypeError unless all are float32, or float64 where the kernel sums in float64."""
    expected = (torch.float32, torch.float64) if float64 else (torch.float32,)
    for acc in accumulators:
        if acc.dtype not in expected:
            raise TypeError(f"acc: expected one of {expected}, got {acc.dtype}")


def strides(tensor: Tensor) -> list[int]:
    """Strides of the dimensions of more than one element; the others have no meaning."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def check_offsets(tensor: Tensor, rows: int, columns: int) -> None:
    """Raise ValueError if offsets within a tile of ``rows`` by ``columns`` elements do not fit in 32 bits."""
    if (rows - 1) * tensor.stride(0) + (columns - 1) * tensor.stride(1) >= 1 << 31:
        raise ValueError(
            f"strides: expected a tile of {rows} x {columns} elements within 2**31, got strides {tensor.stride()}"
        )


def is_vectorized(tensor: Tensor) -> bool:
    """Whether rows of features can be copied 16 bytes at a time; the compiler looks for sizes that 16 divides.

    Features have to be the contiguous axis: along tokens, the end of an example could cut a copy in two.
    """
    return tensor.stride(1) == 1 and not any(n % 16 for n in (tensor.stride(0), tensor.shape[1], tensor.data_ptr()))
