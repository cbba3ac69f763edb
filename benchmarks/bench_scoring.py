"""Whole scoring against one naive pass and against the replay of the published code, in one run, alternating.

    python benchmarks/bench_scoring.py [--rounds N] [--threads N] [--out FILE]

The model is a random Llama of 16 blocks (hidden 384, intermediate 1024), 16 + 16 examples of 40 to 120 tokens. The
pruned sets of the three are compared before anything is timed. One JSON line a measurement goes to standard output
and, with ``--out``, to a file; the last line sums up. Interpreter overheads, the start-up self-check and the
selection of the kept scores are inside fastprune's time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import baselines
import torch
import transformers
from measure import Peak

import fastprune
from fastprune.calibration import CalibrationSet, Example

HIDDEN, INTERMEDIATE, BLOCKS, HEADS, VOCAB = 384, 1024, 16, 6, 2048
P, Q = 1e-3, 1e-3


def build_model() -> torch.nn.Module:
    """The random Llama of this benchmark, float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def build_examples(n_examples: int, seed: int) -> list[Example]:
    """Random token ids, 40 to 120 tokens each, the last half scored."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n_examples):
        length = int(torch.randint(40, 121, (1,), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        made.append(Example(tuple(ids), (*[-100] * (length // 2), *ids[length // 2 :])))
    return made


def gemm_rate(size: int = 2048, inner: int = 512, rounds: int = 20) -> float:
    """FLOP/s of a plain float32 ``torch.mm``, the best of ``rounds``."""
    a, b, out = torch.randn(size, inner), torch.randn(inner, size), torch.empty(size, size)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size * size * inner / best


def floor_flops(model: torch.nn.Module, examples: list[Example]) -> float:
    """FLOPs that any exact method needs: forward, dX and dW of the eligible weights, forward and dX of the head."""
    from fastprune.model.eligible import eligible_matrices

    tokens, scored = sum(map(len, examples)), sum(example.scored for example in examples)
    weights = sum(matrix.weight.numel() for matrix in eligible_matrices(model))
    return 6.0 * weights * tokens + 4.0 * VOCAB * HIDDEN * scored


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--examples", type=int, default=16, help="examples of each set")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, harm, benign = build_model(), build_examples(options.examples, 1), build_examples(options.examples, 2)
    check(model, harm, benign)
    methods = {
        "fastprune": lambda: fastprune.score(model, CalibrationSet(harm), CalibrationSet(benign), progress=False),
        "naive": lambda: baselines.naive(model, harm, benign),
        "replay": lambda: baselines.replay(model, harm, benign),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks = dict.fromkeys(methods, 0.0)
    rates = []
    for _ in range(options.rounds):
        rates.append(gemm_rate())
        for name, run in methods.items():
            with Peak("cpu") as peak:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks[name], peak.mib)
    rate, flops = max(rates), floor_flops(model, harm + benign)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = []
    for name, values in seconds.items():
        lines.append(
            {
                "benchmark": "scoring",
                "method": name,
                "shape": f"llama {BLOCKS} blocks, hidden {HIDDEN}, intermediate {INTERMEDIATE}",
                "examples": 2 * options.examples,
                "tokens": sum(map(len, harm + benign)),
                "dtype": "float32",
                "device": f"{platform.machine()} CPU, {options.threads} threads",
                "torch": torch.__version__,
                "seconds_median": round(medians[name], 4),
                "seconds_min": round(min(values), 4),
                "seconds_max": round(max(values), 4),
                "rounds": options.rounds,
                "fastprune_is_faster_by": round(medians[name] / medians["fastprune"], 2),
                "floor_tflop": round(flops / 1e12, 3),
                "gemm_gflops": round(rate / 1e9, 1),
                "share_of_gemm_rate": round(flops / medians[name] / rate, 3),
                "peak_extra_mib": peaks[name],
            }
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    sys.stdout.write(text)
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
