"""The matrix product that adds to a wide sum, as torch forms it.

In: 16-bit or wider inputs and a float32 or float64 sum, checked by :mod:`fastprune.ops`. Out: the sum, in place.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def add_product_(acc: Tensor, dy: Tensor, x: Tensor) -> None:
    """``acc += dy.T @ x``, the inputs converted to the dtype of ``acc`` unless the device forms wide sums of them."""
    if acc.dtype != dy.dtype and takes_as_they_are(acc, dy):
        torch.addmm(acc, dy.T, x, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(dy.to(acc.dtype).T, x.to(acc.dtype))


def takes_as_they_are(acc: Tensor, dy: Tensor) -> bool:
    """Whether torch multiplies such inputs without converting them first."""
    return acc.dtype == dy.dtype or (acc.dtype == torch.float32 and forms_float32(acc.device, dy.dtype))


@functools.cache
def forms_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's product of such 16-bit inputs can add to a float32 sum.

    By torch's sources it can on CUDA devices since version 2.10. Versions before 2.8 do not know ``out_dtype``; 2.8 and
    2.9 want a sum of the inputs' dtype and go wrong with ``out``. So a product of ones is tried, not a version read.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    one, acc = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(acc, one, one, out_dtype=torch.float32, out=acc)
    except (RuntimeError, TypeError):
        return False
    return bool((acc == 9).all())
