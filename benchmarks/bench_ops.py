"""Single operations against what torch offers for the same, in one run.

    python benchmarks/bench_ops.py [--device cpu|cuda] [--large] [--only EXPR] [--passes N] [--out FILE] [--dry-run]
    pytest benchmarks/bench_ops.py                            # one pass, pytest-benchmark's own tables

Sums of absolute gradients, example by example, against one plain GEMM of the same FLOPs (the floor), the same by one
product an example, by ``torch.bmm``, by ``torch.func`` (vmap of grad) and by Opacus (where it is installed);
``top_scores`` against ``torch.topk`` and ``torch.kthvalue``; sparse writes against indexing. Results are compared
before anything is timed. The script repeats the whole in passes, so that a change of the machine's pace meets all
methods, and writes one JSON line a measurement, with ``--out`` to a file after each benchmark anew: the median over the
passes of each pass's median, what part of the GEMM rate or of the bandwidth of a copy that is, and the extra memory at
the peak. A benchmark that fails leaves itself out, and the exit code is 1. On a GPU its own clock is read, and no call
finds its inputs in the cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from measure import Instant, Peak, Report, backends, flush_cache
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

DEVICE = os.environ.get("BENCH_DEVICE", "cpu")
DRY_RUN, LARGE = "BENCH_DRY_RUN" in os.environ, "BENCH_LARGE" in os.environ
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
# (out, in) of a square layer, and of layers of Llama-3.1-8B, Qwen2.5-32B and Llama-70B.
LAYERS = {"square": (2048, 2048), "llama-8b q": (4096, 4096)}
LARGE_LAYERS = {
    "llama-8b up": (14_336, 4096),
    "qwen-32b o": (5120, 5120),
    "qwen-32b up": (27_648, 5120),
    "llama-70b q": (8192, 8192),
    "llama-70b up": (28_672, 8192),
}
EXAMPLES = {64: 16, 250: 8, 1000: 2}  # tokens of an example: how many examples
MOST_STORED = 4 << 30  # bytes of stored gradients beyond which the methods that store them are left out
ROUNDS = 10 if DEVICE == "cuda" else 3
if LARGE or DEVICE == "cuda":
    LAYERS |= LARGE_LAYERS
if DRY_RUN:
    LAYERS, EXAMPLES, ROUNDS = {"toy": (24, 16)}, {5: 3}, 1
pytestmark = pytest.mark.benchmark(timer=Instant if DEVICE == "cuda" else time.perf_counter)


class Layer:
    """Inputs and output gradients of one Linear, for examples of one length."""

    def __init__(self, n_out: int, n_in: int, tokens: int) -> None:
        self.shape, self.tokens, self.examples = (n_out, n_in), tokens, EXAMPLES[tokens]
        n_tokens = tokens * self.examples
        self.dy, self.x = (torch.randn(n_tokens, n, device=DEVICE, dtype=DTYPE) for n in (n_out, n_in))
        self.starts = torch.arange(self.examples) * tokens
        self.lengths = torch.full((self.examples,), tokens)
        self.acc = torch.zeros(self.shape, device=DEVICE)
        self.flop = 2.0 * n_out * n_in * n_tokens

    @property
    def by_example(self) -> tuple[Tensor, Tensor]:
        """``dy`` and ``x`` as ``(examples, tokens, features)``."""
        return self.dy.view(self.examples, self.tokens, -1), self.x.view(self.examples, self.tokens, -1)

    def fastprune(self) -> Tensor:
        """The operation."""
        ops.accumulate_grad_abs_sum(self.acc, self.dy, self.x, self.starts, self.lengths)
        return self.acc

    def gemm(self) -> None:
        """A plain product of the same FLOPs: the floor, not the same result."""
        torch.mm(self.dy.T, self.x)

    def product_an_example(self) -> Tensor:
        """One product, absolute value and sum an example."""
        if DEVICE == "cpu":
            reference.accumulate_grad_abs_sum(self.acc, self.dy, self.x, self.starts, self.lengths)
            return self.acc
        # The reference converts to float32 first, which no tensor core multiplies: nobody would write that for a GPU.
        for dy, x in zip(*self.by_example, strict=True):
            self.acc.add_(torch.mm(dy.T, x, out_dtype=torch.float32).abs_())
        return self.acc

    def bmm(self) -> Tensor:
        """All examples' gradients at once, then absolute value and sum."""
        dy, x = self.by_example
        return self.acc.add_(torch.bmm(dy.mT, x).abs_().sum(0))

    def vmap_grad(self) -> Tensor:
        """``torch.func``: per-example gradients of a loss whose output gradient is ``dy``."""

        def loss(weight: Tensor, dy: Tensor, x: Tensor) -> Tensor:
            return (torch.nn.functional.linear(x, weight) * dy).sum()

        weight = torch.zeros(self.shape, device=DEVICE, dtype=DTYPE)
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, *self.by_example)
        return self.acc.add_(gradients.abs_().sum(0))

    def opacus(self) -> Tensor:
        """Opacus' rule for the per-example gradients of a Linear."""
        from opacus.grad_sample.linear import compute_linear_grad_sample

        dy, x = self.by_example
        linear = torch.nn.Linear(self.shape[1], self.shape[0], bias=False, device="meta")
        (gradients,) = compute_linear_grad_sample(linear, [x], dy).values()
        return self.acc.add_(gradients.abs_().sum(0))


def run(benchmark: Callable, group: str, call: Callable[[], object], **facts: object) -> None:
    """Time a call, and measure its memory."""
    call()
    with Peak(DEVICE) as peak:
        call()
    facts["peak_extra_mib"] = peak.mib
    benchmark.group = group
    benchmark.extra_info.update(facts)
    benchmark.pedantic(call, setup=flush_cache if DEVICE == "cuda" else None, rounds=ROUNDS, warmup_rounds=1)


def test_copy(benchmark: Callable) -> None:
    """Bandwidth of a copy, bytes read and written counted."""
    source = torch.ones(1 << (10 if DRY_RUN else 26), device=DEVICE)
    target = torch.empty_like(source)
    shape = f"{source.numel() * 4 >> 20} MiB"
    run(benchmark, "copy", partial(target.copy_, source), method="copy", shape=shape, bytes=8 * source.numel())


@pytest.mark.parametrize("method", ["gemm", "fastprune", "product_an_example", "bmm", "vmap_grad", "opacus"])
@pytest.mark.parametrize("tokens", EXAMPLES)
@pytest.mark.parametrize("name", LAYERS)
def test_grad_abs_sum(benchmark: Callable, name: str, tokens: int, method: str) -> None:
    """Floor, operation and the alternatives to it."""
    n_out, n_in = LAYERS[name]
    if method == "opacus":
        pytest.importorskip("opacus")
    if method in ("bmm", "vmap_grad", "opacus") and EXAMPLES[tokens] * n_out * n_in * DTYPE.itemsize > MOST_STORED:
        pytest.skip("the examples' gradients would take more than 4 GiB")
    torch.manual_seed(0)
    layer = Layer(n_out, n_in, tokens)
    if method not in ("gemm", "fastprune"):
        truth = layer.fastprune().clone()
        layer.acc.zero_()
        error = (getattr(layer, method)() - truth).norm() / truth.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[DTYPE]  # bfloat16 gradients are stored rounded
    shape = f"{name} {n_out} x {n_in}, {EXAMPLES[tokens]} x {tokens} tokens"
    run(benchmark, f"grad_abs_sum {shape}", getattr(layer, method), method=method, shape=shape, flop=layer.flop)


@pytest.mark.parametrize("method", ["fastprune", "a call each"])
@pytest.mark.parametrize("names", [("grad_sum", "grad_abs_sum"), ("grad_sum", "grad_abs_sum", "grad_sq_sum")], ids=len)
def test_several_sums(benchmark: Callable, names: tuple[str, ...], method: str) -> None:
    """Several statistics of the same gradients, each product formed once or once for each."""
    torch.manual_seed(0)
    (name, (n_out, n_in)), tokens = next(iter(LAYERS.items())), sorted(EXAMPLES)[len(EXAMPLES) // 2]
    layer = Layer(n_out, n_in, tokens)
    inputs = layer.dy, layer.x, layer.starts, layer.lengths
    together, apart = ({each: torch.zeros(layer.shape, device=DEVICE) for each in names} for _ in range(2))

    def one_call() -> None:
        ops.accumulate_gradients(together, *inputs)

    def a_call_each() -> None:
        for each, acc in apart.items():
            ops.accumulate_gradients({each: acc}, *inputs)

    one_call()
    a_call_each()
    for each in names:
        assert (together[each] - apart[each]).norm() <= 1e-5 * apart[each].norm()
    shape = f"{name} {n_out} x {n_in}, {EXAMPLES[tokens]} x {tokens} tokens, {len(names)} sums"
    call = one_call if method == "fastprune" else a_call_each
    run(benchmark, f"sums of gradients, {len(names)}", call, method=method, shape=shape)


@pytest.mark.parametrize("method", ["fastprune", "torch.topk", "torch.kthvalue"])
def test_top_scores(benchmark: Callable, method: str) -> None:
    """The best thousandth of a matrix; the baselines form the scores first and leave the order of ties to chance."""
    torch.manual_seed(0)
    size = 64 if DRY_RUN else 4096
    weight, statistic = (torch.randn(size, size, device=DEVICE) for _ in range(2))
    k = weight.numel() // 1000

    def scores() -> Tensor:
        return reference.form_scores(weight, statistic, "signed").flatten()

    methods = {
        "fastprune": lambda: ops.top_scores(weight, statistic, "signed", k)[1],
        "torch.topk": lambda: scores().topk(k).values,
        "torch.kthvalue": lambda: scores().kthvalue(weight.numel() - k + 1).values,
    }
    assert torch.equal(methods["fastprune"]()[-1], methods[method]().flatten()[-1])
    shape = f"{size} x {size}, k = {k}"
    run(benchmark, "top_scores", methods[method], method=method, shape=shape, bytes=2 * 4 * weight.numel())


@pytest.mark.parametrize("method", ["fastprune", "indexing"])
def test_apply_and_restore(benchmark: Callable, method: str) -> None:
    """A mask of a thousandth put on and taken off."""
    torch.manual_seed(0)
    size = 64 if DRY_RUN else 4096
    weight = torch.randn(size, size, device=DEVICE).bfloat16()
    indices = torch.randperm(weight.numel(), device=DEVICE)[: weight.numel() // 1000].sort().values

    def ours() -> None:
        ops.restore_sparse_(weight, indices, ops.apply_sparse_(weight, indices))

    def indexing() -> None:
        flat = weight.view(-1)
        old = flat[indices]
        flat[indices] = 0
        flat[indices] = old

    shape = f"{len(indices)} of {size} x {size} bfloat16"
    run(benchmark, "apply and restore", ours if method == "fastprune" else indexing, method=method, shape=shape)


class Results:
    """What the benchmarks gave so far; as a plugin of pytest it hears of each as it passes."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.medians: dict[tuple[str, str], list[float]] = {}
        self.facts: dict[tuple[str, str], dict] = {}

    def pytest_runtest_makereport(self, item: pytest.Function, call: pytest.CallInfo) -> None:
        """Keep a result, and write down all."""
        if call.when == "call" and call.excinfo is None:
            benchmark = item.funcargs["benchmark"]
            key = benchmark.group, benchmark.extra_info["method"]
            self.medians.setdefault(key, []).append(benchmark.stats.stats.median)
            self.facts[key] = benchmark.extra_info
            self.report.write(self.lines())

    def lines(self) -> list[dict[str, object]]:
        """One line a measurement, shares by the same run's GEMM and copy as far as these are there."""
        seconds = {key: statistics.median(times) for key, times in self.medians.items()}
        rate_of = {
            key: self.facts[key]["flop"] / median for key, median in seconds.items() if "flop" in self.facts[key]
        }
        best = max((rate for (_, method), rate in rate_of.items() if method == "gemm"), default=None)
        width_of = {
            key: self.facts[key]["bytes"] / median for key, median in seconds.items() if "bytes" in self.facts[key]
        }
        copy = width_of.get(("copy", "copy"))
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        lines = []
        for key, median in seconds.items():
            (group, method), info, times = key, self.facts[key], self.medians[key]
            line = {"benchmark": group.split(" ")[0] if key in rate_of else group, "method": method}
            line |= {"shape": info["shape"], "device": device, "torch": torch.__version__, "passes": len(times)}
            line |= {"seconds_median": median, "seconds_min": min(times), "seconds_max": max(times)}
            line["peak_extra_mib"] = info["peak_extra_mib"]
            if method in ("fastprune", "a call each"):
                line["backends"] = backends()
            if (group, "fastprune") in seconds:
                line["fastprune_is_faster_by"] = round(median / seconds[group, "fastprune"], 2)
            if key in rate_of:
                line["gflop_per_s"] = round(rate_of[key] / 1e9, 1)
                if (group, "gemm") in seconds:
                    line["share_of_gemm"] = round(seconds[group, "gemm"] / median, 3)
                if best is not None:
                    line["share_of_best_gemm"] = round(rate_of[key] / best, 3)
            if key in width_of:
                line["gb_per_s"] = round(width_of[key] / 1e9, 1)
                if copy is not None:
                    line["share_of_copy"] = round(width_of[key] / copy, 3)
            lines.append(line)
        return lines


def main() -> None:
    """Run this file under pytest-benchmark a few times and write down what comes out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--large", action="store_true", help="larger layers too (on a GPU always); takes half an hour on two cores"
    )
    parser.add_argument(
        "--only", default="", help="the benchmarks that this selects, as pytest's -k: 'several or copy'"
    )
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, one pass: times mean nothing")
    options = parser.parse_args()
    settings = {"BENCH_DEVICE": options.device}
    settings |= {"BENCH_LARGE": "1"} if options.large else {}
    settings |= {"BENCH_DRY_RUN": "1"} if options.dry_run else {}
    if {key: os.environ.get(key) for key in settings} != settings:  # read when this file is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})
    arguments = [__file__, "-qq", "--benchmark-disable-gc", "--no-header", "--benchmark-quiet", "--capture=fd"]
    with Report(options.out) as report:
        results = Results(report)
        codes = [
            pytest.main([*arguments, "-p", "no:cacheprovider", "-k", options.only], plugins=[results])
            for _ in range(1 if options.dry_run else options.passes)
        ]
    if any(codes):
        raise SystemExit("a benchmark failed; see above")


if __name__ == "__main__":
    main()
