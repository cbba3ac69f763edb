"""Whole scoring against one naive pass and against the replay of the published code, in one run, alternating.

    python benchmarks/bench_scoring.py [--device cpu|cuda] [--rounds N] [--threads N] [--out FILE] [--dry-run]

On the CPU the model is a random Llama of 16 blocks (hidden 384, intermediate 1024) in float32 with 16 + 16 examples of
40 to 120 tokens, and the pruned sets of the three are compared before anything is timed. On a GPU it is a random Llama
of the shape of Llama-3.1-8B in bfloat16 with 412 + 412 examples of 250 tokens; there the baselines take the first few
examples, the replay the first few blocks, and their time is scaled up, which the line says. One JSON line a measurement
goes to standard output and, with ``--out``, to a file. Interpreter overheads, the start-up self-check and the selection
of the kept scores are inside fastprune's time.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import baselines
import torch
import transformers
from measure import Peak, write_lines

import fastprune
from fastprune.calibration import CalibrationSet, Example
from fastprune.model.eligible import eligible_matrices

Q = 1e-3


@dataclass(frozen=True)
class Workload:
    """A model and what is scored on it.

    Attributes:
        shape: Hidden and intermediate size, blocks, heads, key-value heads, vocabulary.
        dtype: Of the weights.
        examples: Of each set.
        lengths: Fewest and most tokens of an example.
        naive_examples: Of each set, that the naive pass takes.
        replay_examples: Of each set, that the replay takes.
        replay_blocks: Blocks that the replay is run for.
    """

    shape: tuple[int, int, int, int, int, int]
    dtype: torch.dtype
    examples: int
    lengths: tuple[int, int]
    naive_examples: int
    replay_examples: int
    replay_blocks: int

    def model(self, device: str) -> torch.nn.Module:
        """A random Llama."""
        torch.manual_seed(0)
        hidden, intermediate, blocks, heads, kv_heads, vocab = self.shape
        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=False,
            dtype=self.dtype,
        )
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def build_examples(self, seed: int) -> list[Example]:
        """Random token ids, the last half scored."""
        generator, vocab = torch.Generator().manual_seed(seed), self.shape[-1]
        made = []
        for _ in range(self.examples):
            length = int(torch.randint(self.lengths[0], self.lengths[1] + 1, (1,), generator=generator))
            ids = torch.randint(0, vocab, (length,), generator=generator).tolist()
            made.append(Example(tuple(ids), (*[-100] * (length // 2), *ids[length // 2 :])))
        return made

    def floor_flops(self, model: torch.nn.Module, examples: list[Example]) -> float:
        """FLOPs of any exact method: forward, dX and dW of the eligible weights, forward and dX of the head."""
        tokens, scored = sum(map(len, examples)), sum(example.scored for example in examples)
        weights = sum(matrix.weight.numel() for matrix in eligible_matrices(model))
        return 6.0 * weights * tokens + 4.0 * self.shape[-1] * self.shape[0] * scored


WORKLOADS = {
    "cpu": Workload((384, 1024, 16, 6, 6, 2048), torch.float32, 16, (40, 120), 16, 16, 16),
    "cuda": Workload((4096, 14_336, 32, 32, 8, 128_256), torch.bfloat16, 412, (250, 250), 16, 4, 2),
    "dry": Workload((32, 48, 2, 4, 2, 97), torch.float32, 3, (5, 9), 3, 2, 1),
}


def gemm_rate(device: str, dtype: torch.dtype, rounds: int = 20) -> float:
    """FLOP/s of a plain ``torch.mm``, the best of ``rounds``."""
    size, inner = (8192, 8192) if device == "cuda" else (2048, 512)
    a, b = torch.randn(size, inner, device=device, dtype=dtype), torch.randn(inner, size, device=device, dtype=dtype)
    out, best = torch.empty(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(rounds):
        best = min(best, timed(device, partial(torch.mm, a, b, out=out)))
    return 2.0 * size * size * inner / best


def timed(device: str, run: Callable[[], object]) -> float:
    """Seconds of a call, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check(model: torch.nn.Module, harm: list[Example], benign: list[Example]) -> None:
    """The three methods keep the same best weights, up to near-ties; otherwise no time is worth reporting."""
    scores = fastprune.score(model, CalibrationSet(harm), CalibrationSet(benign), progress=False)
    truth = baselines.naive(model, harm, benign)
    for role, kept in zip((scores.harm, scores.benign), truth, strict=True):
        for name, (indices, values) in kept.items():
            k = int(Q * model.get_parameter(name).numel())
            ours, theirs = set(role[name].indices[:k].tolist()), set(indices[:k].tolist())
            threshold = float(values[k - 1])
            for index in ours ^ theirs:
                position = (indices == index).nonzero()
                value = float(values[position[0, 0]]) if len(position) else float("-inf")
                if abs(value - threshold) > 1e-4 * abs(threshold):
                    raise SystemExit(f"{name}: weight {index} is kept by one method only; refusing to time")


def main() -> None:
    """Check, then time the three methods in turn and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, help="3 on the CPU and 2 on a GPU, if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="a toy model, one round: times mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, rounds = options.device, 1 if options.dry_run else options.rounds or {"cpu": 3, "cuda": 2}[options.device]
    workload = WORKLOADS["dry" if options.dry_run else device]
    model, harm, benign = workload.model(device), workload.build_examples(1), workload.build_examples(2)
    if device == "cpu":
        check(model, harm, benign)
    n_blocks = workload.shape[2]
    n_naive, n_replay, n_replay_blocks = workload.naive_examples, workload.replay_examples, workload.replay_blocks
    methods = {
        "fastprune": lambda: fastprune.score(model, CalibrationSet(harm), CalibrationSet(benign), progress=False),
        "naive": lambda: baselines.naive(model, harm[:n_naive], benign[:n_naive]),
        "replay": lambda: baselines.replay(model, harm[:n_replay], benign[:n_replay], n_replay_blocks),
    }
    scales = {
        "fastprune": 1.0,
        "naive": workload.examples / n_naive,
        "replay": workload.examples / n_replay * n_blocks / n_replay_blocks,
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks = dict.fromkeys(methods, 0.0)
    rates = []
    for _ in range(rounds):
        rates.append(gemm_rate(device, workload.dtype))
        for name, run in methods.items():
            with Peak(device) as peak:
                seconds[name].append(scales[name] * timed(device, run))
            peaks[name] = max(peaks[name], peak.mib)
    rate, flops = max(rates), workload.floor_flops(model, harm + benign)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    name_of_device = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    lines = [
        {
            "benchmark": "scoring",
            "method": name,
            "shape": f"llama {n_blocks} blocks, hidden {workload.shape[0]}, intermediate {workload.shape[1]}",
            "examples": 2 * workload.examples,
            "tokens": sum(map(len, harm + benign)),
            "dtype": str(workload.dtype).removeprefix("torch."),
            "device": name_of_device if device == "cuda" else f"{name_of_device}, {options.threads} threads",
            "torch": torch.__version__,
            "seconds_median": round(medians[name], 4),
            "seconds_min": round(min(values), 4),
            "seconds_max": round(max(values), 4),
            "rounds": rounds,
            "scaled_by": scales[name],
            "fastprune_is_faster_by": round(medians[name] / medians["fastprune"], 2),
            "floor_tflop": round(flops / 1e12, 3),
            "gemm_gflops": round(rate / 1e9, 1),
            "share_of_gemm_rate": round(flops / medians[name] / rate, 3),
        }
        | (
            {"peak_extra_mib": peaks[name]} if device == "cuda" else {}
        )  # the CPU's allocator hides a method's behind others'
        for name, values in seconds.items()
    ]
    write_lines(lines, options.out)


if __name__ == "__main__":
    main()
