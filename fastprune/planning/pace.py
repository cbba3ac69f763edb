"""How long a pass will take on this machine, from its work and a moment's measurement.

In: a plan, and a matrix of the model. Out: seconds. What the machine reads from disk while it computes is not measured:
a file that was read lately comes from memory, and the next one does not.
"""

from __future__ import annotations

import time

import torch

from fastprune.planning.estimate import Plan

# Share of the rate of plain matrix products that a pass reaches: in float32 42 % with small matrices to 71 % with
# larger ones (docs/performance.md). In bfloat16 a CPU's products are faster, and what surrounds them is not: 16 % at
# hidden size 576. Taken for GPUs too, where nothing has been measured.
_SHARE = {torch.bfloat16: 0.16, torch.float16: 0.16}
_SHARE_FLOAT32 = 0.55
_MOMENT = 0.1  # seconds


def seconds_of(plan: Plan, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, processes: int) -> float:
    """Seconds that a pass computes.

    Args:
        plan: The plan of the pass.
        shape: Of a large matrix of the model, ``(out_features, in_features)``.
        dtype: Of its weights.
        device: Where the pass computes.
        processes: Number of processes that share the examples.
    """
    weight = torch.ones(shape, dtype=dtype, device=device)
    inputs = torch.ones(min(plan.micro_batch_tokens, 4096), shape[1], dtype=dtype, device=device)
    taken, products, begin = 0.0, 0, time.perf_counter()
    while taken < _MOMENT:
        product = inputs @ weight.T
        products += 1
        product[0, 0].item()  # waits for the device
        if products == 1:  # which loads and allocates
            begin = time.perf_counter()
        taken = time.perf_counter() - begin
    rate = 2.0 * inputs.numel() * shape[0] * (products - 1) / taken
    return plan.flops / (rate * _SHARE.get(dtype, _SHARE_FLOAT32) * processes)
