"""How long answering will take at the most, measured on a few steps of the work itself.

In: a model and what it will be asked. Out: a line for people. The measuring changes neither the model nor an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fastprune.evaluation.decoding import Query, Sampling, batches_of, continue_batch
from fastprune.evaluation.forward import inference
from fastprune.progress import Progress, duration

_STEPS = 4  # that are timed
# Shorter work is done before it is worth a measurement, which takes about 2 + _STEPS steps and three first passes.
_WORTH_IT = 40 * _STEPS


def answering_time(model: Any, queries: Sequence[Query], *, batch_size: int, share: float = 1.0) -> str | None:
    """``"at most 12 min for 500 answers in 8 batches"``, or ``None`` for work that is done in a moment.

    Args:
        model: The causal LM.
        queries: What it will be asked.
        batch_size: Rows in a forward pass.
        share: How many times over they will be asked, or the part of them that is left.
    """
    batches = batches_of(queries, batch_size)
    steps = sum(max(queries[index].budget for index in batch) for batch in batches) * share
    if steps < _WORTH_IT:
        return None
    middle = [queries[index] for index in batches[len(batches) // 2]]
    width = max(len(query.context) for query in middle)
    with inference(model) as forward:
        forward.check([query.context for query in middle], [0] * len(middle), [query.name for query in middle])
        first, few = (
            _seconds(forward, [replace(query, budget=budget) for query in middle]) for budget in (1, 1 + _STEPS)
        )
    # A step takes at least what a token of the first pass takes; noise of the machine may say less.
    step = max((few - first) / _STEPS, first / width)
    tokens = sum(len(batch) * max(len(queries[index].context) for index in batch) for batch in batches)
    seconds = (first * tokens / (len(middle) * width) * share) + step * steps
    n_rows, n_batches = round(len(queries) * share), max(1, round(len(batches) * share))
    return f"at most {duration(seconds)} for {n_rows} answers in {n_batches} batches"


def _seconds(forward: Any, queries: Sequence[Query]) -> float:
    """Of the faster of two runs: the first one may load, compile and allocate."""
    stop = torch.tensor([], dtype=torch.int64)
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        with Progress(0, "", "", show=False) as bar:
            continue_batch(forward, queries, stop, Sampling(), bar)  # ends with a copy to the CPU
        times.append(time.perf_counter() - begin)
    return min(times)
