"""``fastprune plan``: what a pass of ``fastprune score`` would take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

import fastprune
from fastprune.cli.frame import Run, command
from fastprune.cli.options import CHECKPOINT, HostMemoryOption, MemoryOption, OffloadOption, SegmentsOption


@command(
    names={
        "model_or_config": "model",
        "n_examples": "examples",
        "n_tokens": "tokens",
        "flops_per_second": "tflops",
        "read_bytes_per_second": "read_gbps",
    }
)
def plan(
    run: Run,
    model: Annotated[
        Path,
        CHECKPOINT,
        typer.Argument(help="Checkpoint folder, or a config.json alone: no weight is read.", show_default=False),
    ],
    examples: Annotated[int, typer.Option(help="Examples of both sets together.")] = 824,
    tokens: Annotated[int, typer.Option(help="Mean tokens of an example.")] = 250,
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    segments: SegmentsOption = None,
    offload: OffloadOption = None,
    tflops: Annotated[
        float | None, typer.Option(help="Rate of matrix products on the device, TFLOP/s; gives the time.")
    ] = None,
    read_gbps: Annotated[
        float | None, typer.Option(help="Read rate of the disk, GB/s (default: reading takes no time).")
    ] = None,
) -> None:
    """Estimate what a pass of `fastprune score` takes, without running it: segments, memory, work, time.

    Without `--memory` there is no limit. With `--host-memory` the device is a GPU, and the host takes the hidden states
    that the GPU has no room for; without it, the pass runs on a CPU.

    `fastprune plan config.json --memory 80GiB --host-memory 128GiB --tflops 600 --read-gbps 5`
    """
    from fastprune.checkpoint.load import load_config

    found = fastprune.plan(
        load_config(model),
        examples,
        tokens,
        memory=memory,
        host_memory=host_memory,
        segments=segments,
        offload=None if offload is None else offload.value,
        flops_per_second=None if tflops is None else tflops * 1e12,
        read_bytes_per_second=None if read_gbps is None else read_gbps * 1e9,
    )
    run.result(dataclasses.asdict(found), str(found))
