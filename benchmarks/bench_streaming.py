"""Streamed scoring against resident scoring: time and peak memory, each run in a process of its own.

    python benchmarks/bench_streaming.py [--device cpu|cuda] [--large] [--rounds N] [--examples N] [--out FILE]
                                         [--dry-run]

On the CPU a random bf16 Llama of 0.27 B parameters with 8 + 8 examples of 64 tokens, in memory and from disk, then the
same with 8, 16 and 32 blocks one at a time; ``--large`` adds one of 3.2 B parameters (6 GiB on disk) on a budget of
3 GiB, and patches it. On a GPU the shape of Llama-3.1-8B on 24 GiB with 412 + 412 examples of 250 tokens, and with
``--large`` that of a Llama of 70 B, whose blocks are all read from one file, on 80 GiB with 100 GiB of host memory.
Files are in the page cache after the first run, which is not counted. The pruned sets of streamed and resident runs
must be equal. One JSON line a measurement, as soon as it is known.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import write_lines
from random_checkpoint import SHAPES, write_checkpoint

HERE = Path(__file__).parent
TINY = {**SHAPES["300m"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 97}

Words = tuple[object, ...]


def run(*words: object) -> dict:
    """One measured run."""
    command = [sys.executable, str(HERE / "measured_run.py"), *map(str, words)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode != 0:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def line(method: str, shape: str, runs: list[dict], **more: object) -> dict[str, object]:
    """What is reported of some runs of one thing."""
    median = statistics.median(one["seconds"] for one in runs)
    gpu = (
        {"peak_gpu_mib": round(max(one["peak_gpu_bytes"] for one in runs) / 2**20)} if torch.cuda.is_available() else {}
    )
    scored = {key: runs[-1][key] for key in ("examples", "tokens", "backends") if key in runs[-1]}
    planned = {"planned_mib": round(runs[-1]["planned_bytes"] / 2**20)} if "planned_bytes" in runs[-1] else {}
    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "benchmark": "streaming",
        "method": method,
        "shape": shape,
        **scored,
        "device": name,
        "torch": torch.__version__,
        "seconds_median": round(median, 3),
        "seconds_min": round(min(one["seconds"] for one in runs), 3),
        "rounds": len(runs),
        "peak_extra_mib": round(max(one["peak_bytes"] for one in runs) / 2**20),
        **planned,
        **gpu,
        **more,
    }


def against_resident(folder: Path, shape: str, rounds: int, data: Words) -> list[dict]:
    """Alternating runs of one checkpoint, in memory and from disk."""
    methods = {"resident, 1 segment": ("--resident", "--segments", 1), "streamed, 5 segments": ("--segments", 5)}
    methods["streamed, a block at a time"] = ("--segments", 20)
    if shape.startswith("dry"):
        methods = {"resident, 1 segment": ("--resident", "--segments", 1), "streamed, 4 segments": ("--segments", 4)}
    runs: dict[str, list[dict]] = {method: [] for method in methods}
    run("score", folder, *data, *methods["resident, 1 segment"])  # into the page cache
    for _ in range(rounds):
        for method, words in methods.items():
            runs[method].append(run("score", folder, *data, *words))
    if len({one["mask"] for of_method in runs.values() for one in of_method}) > 1:
        raise SystemExit("streamed and resident runs prune other weights; refusing to report times")
    base = statistics.median(one["seconds"] for one in runs["resident, 1 segment"])
    return [
        line(method, shape, found, times_resident=round(statistics.median(one["seconds"] for one in found) / base, 3))
        for method, found in runs.items()
    ]


def main() -> None:
    """Write checkpoints to a temporary folder, run, and print the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--large", action="store_true", help="also the large model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, help="of each set: 8 on the CPU and 412 on a GPU, if not given")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="a toy model, one round: figures mean nothing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastprune-bench-") as name:
        folder = Path(name)
        on_device = options.device == "cuda" and not options.dry_run
        examples, tokens = (412, 250) if on_device else (8, 64)
        data = ("--examples", options.examples or examples, "--tokens", tokens)
        if options.dry_run:
            lines = against_resident(write_checkpoint(folder / "dry", **TINY), "dry run", 1, data)
        elif on_device:
            lines = on_gpu(folder, options.large, data)
        else:
            lines = on_cpu(folder, options.large, options.rounds, data)
        for each in lines:
            write_lines([each], options.out)


def on_cpu(folder: Path, large: bool, rounds: int, data: Words) -> Iterator[dict]:
    small = write_checkpoint(folder / "300m", **SHAPES["300m"])
    yield from against_resident(small, "llama 0.27 B, 20 blocks, bf16", rounds, data)
    for blocks in (8, 16, 32):
        of_blocks = write_checkpoint(folder / str(blocks), **{**SHAPES["300m"], "num_hidden_layers": blocks})
        words = (*data, "--segments", blocks, "--offload", "disk")
        runs = [run("score", of_blocks, *words) for _ in range(rounds + 1)][1:]
        yield line("streamed, a block at a time", f"llama of {blocks} blocks, bf16", runs)
    if large:
        checkpoint = write_checkpoint(folder / "3b", **SHAPES["3b"])
        shape = "llama 3.2 B, 28 blocks, bf16"
        runs = [run("score", checkpoint, *data, "--memory", "3GiB")]
        yield line("streamed, budget 3 GiB", shape, runs, segments=runs[0]["segments"])
        yield line("patch", shape, [run("patch", checkpoint, folder / "patched")])


def on_gpu(folder: Path, large: bool, data: Words) -> Iterator[dict]:
    checkpoint = write_checkpoint(folder / "8b", **SHAPES["8b"], shared_blocks=True)
    runs = [run("score", checkpoint, *data, "--memory", "24GiB", "--host-memory", "100GiB", "--shared-blocks")]
    yield line("streamed, budget 24 GiB", "llama 8 B, 32 blocks, bf16", runs, segments=runs[0]["segments"])
    if large:
        checkpoint = write_checkpoint(folder / "70b", **SHAPES["70b"], shared_blocks=True)
        runs = [run("score", checkpoint, *data, "--memory", "72GiB", "--host-memory", "100GiB", "--shared-blocks")]
        yield line("streamed", "llama 70 B, 80 blocks, bf16", runs, segments=runs[0]["segments"])


if __name__ == "__main__":
    main()
