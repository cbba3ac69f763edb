"""The CUDA operations against what torch offers for the same, on layers of Llama-3.1-8B, in one run.

    python benchmarks/bench_cuda_ops.py [--out FILE] [--dry-run]

``top_scores`` (one matrix, and all seven of a decoder block in one launch) against forming the scores and
``torch.topk``; the set difference against ``torch.isin``; sparse writes against indexing. Results are compared bit by
bit before anything is timed; a method that differs is not timed, and the exit code is 1. One JSON line per measurement
has the bytes that have to move at least once, the resulting bandwidth, and its share of the bandwidth of a copy in the
same run. ``--dry-run`` runs the same code on small CPU tensors with the reference in place of the kernels, and times
nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import Instant, backends, flush_cache, write_lines

from fastprune import ops
from fastprune.ops import cuda, reference

BLOCK = {  # out x in of Llama-3.1-8B
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14_336, 4096),
    "up_proj": (14_336, 4096),
    "down_proj": (4096, 14_336),
}
TOY_BLOCK = {name: (rows // 64, columns // 64) for name, (rows, columns) in BLOCK.items()}
CRITERION, FRACTION = "signed", 1e-3
ROUNDS, WARM_UP = 30, 5

Tensors = list[torch.Tensor]


def seconds(run: Callable[[], object]) -> list[float]:
    """Times of single calls by the device's clock, with nothing in its cache; waiting for the host is included."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(ROUNDS):
        flush_cache()
        begin = Instant()
        run()
        times.append(Instant() - begin)
    return times


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / statistics.median(seconds(lambda: target.copy_(source)))


def flat(results: object) -> Tensors:
    """The tensors of a result, in order, floats as bits."""
    if isinstance(results, torch.Tensor):
        same_size = {2: torch.int16, 4: torch.int32}
        return [results.view(same_size[results.element_size()]) if results.is_floating_point() else results]
    return [tensor for part in results for tensor in flat(part)]


class Bench:
    """Checks, times and writes down pairs of a baseline and a candidate."""

    def __init__(self, dry_run: bool, out: Path | None) -> None:
        self.dry_run = dry_run
        self.out = out
        self.copy = None if dry_run else copy_bandwidth()
        self.refused: list[str] = []

    def compare(self, name: str, shape: str, n_bytes: int, methods: dict[str, Callable[[], object]]) -> None:
        """Time each method; the first is the candidate, whose results the others must share."""
        candidate, *_ = results = [flat(method()) for method in methods.values()]
        for method, other in zip(methods, results, strict=True):
            if len(candidate) != len(other) or not all(map(torch.equal, candidate, other)):
                self.refused.append(f"{name}, {shape}: {method} gives another result; refusing to time")
                return
        if self.dry_run:
            self.write({"benchmark": name, "shape": shape, "methods": list(methods), "dry_run": True})
            return
        medians = {}
        for method, run in methods.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times = sorted(seconds(run))
            medians[method] = statistics.median(times)
            self.write(
                {
                    "benchmark": name,
                    "method": method,
                    "shape": shape,
                    "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__,
                    "seconds_median": medians[method],
                    "seconds_p20": times[len(times) // 5],
                    "seconds_p80": times[len(times) * 4 // 5],
                    "rounds": ROUNDS,
                    "peak_extra_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1),
                    "bytes": n_bytes,
                    "gb_per_s": round(n_bytes / medians[method] / 1e9, 1),
                    "copy_gb_per_s": round(self.copy / 1e9, 1),
                    "share_of_copy": round(n_bytes / medians[method] / self.copy, 3),
                    "fastprune_is_faster_by": round(medians[method] / medians[next(iter(medians))], 2),
                    **({"backends": backends()} if method == "fastprune" else {}),
                }
            )

    def write(self, line: dict[str, object]) -> None:
        """One JSON line to standard output and to the file."""
        write_lines([line], self.out)


def topk(weight: torch.Tensor, statistic: torch.Tensor, k: int) -> torch.Tensor:
    """The baseline: all scores written to memory, then ``torch.topk``; which of equal scores it takes is left to it."""
    return reference.form_scores(weight, statistic, CRITERION).flatten().topk(k).values


def gradient_like(shape: tuple[int, int], device: str) -> torch.Tensor:
    """A statistic that is larger in some rows and columns."""
    rows, columns = (torch.randn(size, device=device).exp() for size in shape)
    return torch.randn(shape, device=device) * rows[:, None] * columns


def bench_selection(bench: Bench, device: str, dtype: torch.dtype, block: dict[str, tuple[int, int]]) -> None:
    """Single matrices, then a block in one launch."""
    weights = [(torch.randn(shape, device=device) * 0.02).to(dtype) for shape in block.values()]
    stats = [gradient_like(shape, device) for shape in block.values()]
    ks = [int(FRACTION * weight.numel()) + 1 for weight in weights]
    sizes = [weight.numel() * (weight.element_size() + 4) for weight in weights]
    matrices = list(zip(weights, stats, ks, strict=True))
    named, k_of = dict(zip(block, zip(weights, stats, strict=True), strict=True)), dict(zip(block, ks, strict=True))
    backend = "torch" if bench.dry_run else "cuda"

    def exact() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [reference.top_scores(weight, stat, CRITERION, k) for weight, stat, k in matrices]

    def together() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(dict(ops.top_scores_of_each(named, CRITERION, k_of, backend=backend)).values())

    def one(weight: torch.Tensor, stat: torch.Tensor, k: int) -> torch.Tensor:
        return ops.top_scores(weight, stat, CRITERION, k, backend=backend)[1]

    if not all(map(torch.equal, flat(together()), flat(exact()))):
        bench.refused.append(f"top_scores_of_each, {dtype}: another result than the reference; refusing to time")
        return
    type_name = str(dtype).removeprefix("torch.")
    for name in ("q_proj", "up_proj"):
        at = list(block).index(name)
        methods = {"fastprune": partial(one, *matrices[at]), "torch.topk": partial(topk, *matrices[at])}
        bench.compare("top_scores", f"{name} {block[name]} {type_name} k={ks[at]}", sizes[at], methods)
    methods = {
        "fastprune": lambda: [values for _, values in together()],
        "torch.topk": lambda: [topk(*matrix) for matrix in matrices],
    }
    bench.compare("top_scores_of_each", f"one block {type_name} k={FRACTION}n", sum(sizes), methods)


def bench_sparse(bench: Bench, device: str, block: dict[str, tuple[int, int]]) -> None:
    """The writes of a mask into all matrices of a block, and the set difference that makes one."""
    dry = bench.dry_run
    weights = [torch.randn(shape, device=device).bfloat16().view(-1) for shape in block.values()]
    offsets = [torch.randperm(len(w), device=device)[: len(w) // 1000 + 1].sort().values for w in weights]
    old = [weight[where] for weight, where in zip(weights, offsets, strict=True)]

    def apply_and_restore() -> list[torch.Tensor]:
        if dry:
            return by_index()
        kept = cuda.apply_sparse_each_(weights, offsets, 0.0)
        cuda.restore_sparse_each_(weights, offsets, kept)
        return kept

    def by_index() -> list[torch.Tensor]:
        kept = [reference.apply_sparse_(*pair, 0.0) for pair in zip(weights, offsets, strict=True)]
        for weight, where, values in zip(weights, offsets, kept, strict=True):
            reference.restore_sparse_(weight, where, values)
        return kept

    n_bytes = sum(len(values) * (2 * 8 + 3 * 2 + 3 * 2) for values in old)
    shape = f"one block, {sum(map(len, old))} weights"
    bench.compare("apply_and_restore_sparse", shape, n_bytes, {"fastprune": apply_and_restore, "indexing": by_index})
    a, b = offsets[-1], torch.cat([offsets[-1][::3], offsets[-1][1::3] + 1]).unique()
    isin = {"torch.isin": lambda: a[torch.isin(a, b, assume_unique=True, invert=True)]}
    ours = {"fastprune": isin["torch.isin"] if dry else lambda: cuda.difference(a, b)}
    bench.compare("difference", f"{len(a)} without {len(b)}", 8 * (2 * len(a) + len(b)), ours | isin)


def main() -> None:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="small CPU tensors, nothing is timed")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        sys.exit(print("bench_cuda_ops: nothing to measure, there is no CUDA device", file=sys.stderr))
    torch.manual_seed(0)
    device, block = ("cpu", TOY_BLOCK) if options.dry_run else ("cuda", BLOCK)
    bench = Bench(options.dry_run, options.out)
    for dtype in (torch.bfloat16, torch.float32):
        bench_selection(bench, device, dtype, block)
    bench_sparse(bench, device, block)
    if bench.refused:
        raise SystemExit("\n".join(bench.refused))


if __name__ == "__main__":
    main()
