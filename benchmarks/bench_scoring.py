"""Whole scoring against one naive pass and against the replay of the published code, in one run.

    python benchmarks/bench_scoring.py [--device cpu|cuda] [--large] [--rounds N] [--threads N] [--out FILE] [--dry-run]

On the CPU the model is a random Llama of 16 blocks (hidden 384, intermediate 1024; ``--large``: 1024 and 2816) in
float32 with 16 + 16 (32 + 32) examples of 40 to 120 tokens; fastprune's scores are compared with the naive pass's
before anything is timed, and the methods alternate. On a GPU it is a random Llama of the shape of Llama-3.1-8B in
bfloat16 with 412 + 412 examples of 250 tokens, and one method follows the other, each after a warm-up.

A fourth method, ``gemm``, runs plain products with the FLOPs that every exact method needs. Shares of the GEMM rate
refer to it: a rate sustained for as long as a pass takes, measured between the passes, since a shared or a hot machine
reaches the rate of the best single product for milliseconds only. Ratios and shares are computed in each round;
reported are their medians over the rounds.

Some methods are measured on a few examples, blocks or products, and their times are scaled: the time of the examples by
``scaled_by``; what does not grow with them (allocating sums, selecting the best weights) by the blocks only,
``fixed_seconds`` in all. One JSON line per measurement goes to standard output and, rewritten after every round, with
``--out`` to a file. If a method fails, the others go on, and the exit code is 1. Interpreter overheads, the start-up
self-check and the selection of the kept scores are inside fastprune's time; ``shares_of_time`` says where it goes
(scoring_split.py).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import baselines
import torch
import transformers
from measure import Peak, Report, Stopwatch, backends
from scoring_split import shares

import fastprune
from fastprune.calibration import CalibrationSet, Example
from fastprune.model.matrices import eligible_matrices

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
        split: Of each set, that fastprune scores once more to see where the time goes; the fewer, the larger is the
            part of what does not grow with them.
        warm_up: Of each set, that fastprune scores before it is timed: on a GPU a full micro-batch.
    """

    shape: tuple[int, int, int, int, int, int]
    dtype: torch.dtype
    examples: int
    lengths: tuple[int, int]
    naive_examples: int
    replay_examples: int
    replay_blocks: int
    split: int
    warm_up: int = 0

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
    "cpu": Workload((384, 1024, 16, 6, 6, 2048), torch.float32, 16, (40, 120), 16, 16, 16, 16),
    "cpu, large": Workload((1024, 2816, 16, 16, 16, 2048), torch.float32, 32, (40, 120), 32, 8, 4, 32),
    "cuda": Workload((4096, 14_336, 32, 32, 8, 128_256), torch.bfloat16, 412, (250, 250), 16, 4, 2, 32, 16),
    "dry": Workload((32, 48, 2, 4, 2, 97), torch.float32, 3, (5, 9), 3, 2, 1, 3, 1),
}


@dataclass
class Method:
    """One of the methods, and its measurements.

    Attributes:
        run: Called with a number of examples of each set and with the stopwatch that is to run over all of them.
        examples: How many are timed.
        warm_up: How many go before, untimed.
        times_examples: What the time of the examples is scaled by, to be that of all examples.
        times_blocks: What all time is scaled by, to be that of all blocks.
        seconds: Of each round, scaled.
        fixed: What part of these does not grow with the examples.
        peak_mib: Of all rounds, on a GPU.
        parts: What a line says of the shares of its parts, if they were looked at.
        failed: The traceback of the error that ended it.
    """

    run: Callable[[int, Stopwatch], object]
    examples: int
    warm_up: int
    times_examples: float = 1.0
    times_blocks: float = 1.0
    seconds: list[float] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    parts: dict[str, object] = field(default_factory=dict)
    failed: str = ""

    def measure(self, device: str) -> None:
        """Another round."""
        of_examples = Stopwatch(device)
        with Peak(device) as peak, Stopwatch(device) as whole:
            self.run(self.examples, of_examples)
        self.fixed.append(self.times_blocks * (whole.seconds - of_examples.seconds))
        self.seconds.append(self.fixed[-1] + self.scaled_by * of_examples.seconds)
        if device == "cuda":  # the CPU's allocator hides a method's behind others'
            self.peak_mib = max(self.peak_mib, peak.mib)

    @property
    def scaled_by(self) -> float:
        """What the time of the examples is scaled by."""
        return self.times_examples * self.times_blocks

    def times(self) -> dict[str, object]:
        """For a line."""
        line = {
            "seconds_median": round(statistics.median(self.seconds), 4),
            "seconds_min": round(min(self.seconds), 4),
            "seconds_max": round(max(self.seconds), 4),
            "rounds": len(self.seconds),
            "scaled_by": self.scaled_by,
        }
        if self.scaled_by != 1:
            line["fixed_seconds"] = round(statistics.median(self.fixed), 4)
        if self.peak_mib:
            line["peak_extra_mib"] = self.peak_mib
        return line | self.parts


def methods_of(
    workload: Workload, model: torch.nn.Module, harm: list[Example], benign: list[Example], flops: float
) -> dict[str, Method]:
    """Fastprune first: a run that is cut off has at least that. ``flops``: of the plain products."""

    def fast(n: int, _: Stopwatch) -> object:
        return fastprune.score(model, CalibrationSet(harm[:n]), CalibrationSet(benign[:n]), progress=False)

    def naive(n: int, watch: Stopwatch) -> object:
        return baselines.naive(model, harm[:n], benign[:n], watch)

    def replay(n: int, watch: Stopwatch) -> object:
        return baselines.replay(model, harm[:n], benign[:n], workload.replay_blocks, watch)

    products, n_products, times_products = plain_products(model.device.type, workload.dtype, flops)
    examples, times_blocks = workload.examples, workload.shape[2] / workload.replay_blocks
    n_naive, n_replay, warm_up = workload.naive_examples, workload.replay_examples, min(1, workload.warm_up)
    return {
        "fastprune": Method(fast, examples, workload.warm_up),
        "gemm": Method(products, n_products, warm_up, times_products),
        "naive": Method(naive, n_naive, warm_up, examples / n_naive),
        "replay": Method(replay, n_replay, warm_up, examples / n_replay, times_blocks),
    }


def plain_products(
    device: str, dtype: torch.dtype, flops: float
) -> tuple[Callable[[int, Stopwatch], object], int, float]:
    """Products of a size at which the device is fastest.

    Returns:
        What forms a number of them, how many are timed, and by what their time is multiplied to be that of ``flops``.
    """
    size, inner = (8192, 8192) if device == "cuda" else (2048, 512)
    a, b = torch.randn(size, inner, device=device, dtype=dtype), torch.randn(inner, size, device=device, dtype=dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)

    def run(count: int, watch: Stopwatch) -> None:
        with watch:
            for _ in range(count):
                torch.mm(a, b, out=out)

    needed = flops / (2.0 * size * size * inner)
    timed = max(1, round(needed / 10 if device == "cuda" else needed))  # a second shows the rate that a GPU holds
    return run, timed, needed / timed


def check(model: torch.nn.Module, harm: list[Example], benign: list[Example]) -> None:
    """Fastprune and the naive pass keep the same best weights, up to near-ties; else no time is worth reporting."""
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
    """Check, then time the methods in turn and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--large", action="store_true", help="on the CPU the larger model, some five minutes a round")
    parser.add_argument("--rounds", type=int, help="3 on the CPU and 2 on a GPU, if not given")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="a toy model, one round: times mean nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, rounds = options.device, 1 if options.dry_run else options.rounds or {"cpu": 3, "cuda": 2}[options.device]
    workload = WORKLOADS["dry" if options.dry_run else "cpu, large" if options.large and device == "cpu" else device]
    model, harm, benign = workload.model(device), workload.build_examples(1), workload.build_examples(2)
    if device == "cpu":
        check(model, harm, benign)
    flops = workload.floor_flops(model, harm + benign)
    methods = methods_of(workload, model, harm, benign, flops)
    name_of_device = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    about = {
        "shape": f"llama {workload.shape[2]} blocks, hidden {workload.shape[0]}, intermediate {workload.shape[1]}",
        "examples": 2 * workload.examples,
        "tokens": sum(map(len, harm + benign)),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "device": name_of_device if device == "cuda" else f"{name_of_device}, {options.threads} threads",
        "torch": torch.__version__,
    }
    # A change of the CPU's pace has to meet all of them; a GPU keeps its pace, and its memory is handed on once.
    turns = [*methods] * rounds if device == "cpu" else [name for name in methods for _ in range(rounds)]
    with Report(options.out) as report:
        for name in turns:
            method = methods[name]
            if method.failed:
                continue
            try:
                if method.warm_up and not method.seconds:
                    torch.cuda.empty_cache()
                    method.run(method.warm_up, Stopwatch(device))
                method.measure(device)
            except Exception:  # too little memory for one of them is no reason to go without the others
                method.failed = traceback.format_exc()
                continue
            report.write(lines_of(methods, about, flops))
            if name == "fastprune" and len(method.seconds) == rounds:
                method.parts = shares(device, partial(method.run, workload.split, Stopwatch(device)))
                report.write(lines_of(methods, about, flops))
    if failures := [f"{name}: {method.failed}" for name, method in methods.items() if method.failed]:
        raise SystemExit("\n".join(failures))


def ratio(numerator: Method, denominator: Method) -> float:
    """Of two methods' times: the median over the rounds, since both meet the machine's pace of that round."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=False)  # the last round may not be over
    return statistics.median(above / below for above, below in pairs)


def lines_of(methods: dict[str, Method], about: dict[str, object], flops: float) -> list[dict[str, object]]:
    """One line for each method that was measured."""
    measured = {name: method for name, method in methods.items() if method.seconds}
    lines = []
    for name, method in measured.items():
        line = {"benchmark": "scoring", "method": name, **about, **method.times()}
        if name == "fastprune":
            line["backends"] = backends()
        if "fastprune" in measured:
            line["fastprune_is_faster_by"] = round(ratio(method, measured["fastprune"]), 2)
        line["floor_tflop"] = round(flops / 1e12, 3)
        if "gemm" in measured:
            line["gemm_gflops"] = round(flops / statistics.median(measured["gemm"].seconds) / 1e9, 1)
            line["share_of_gemm_rate"] = round(ratio(measured["gemm"], method), 3)
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()
