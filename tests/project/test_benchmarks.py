"""What the benchmarks write down, also when one of them fails or is stopped. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="benchmarks need pytest-benchmark")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.jsonl"))


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_report_replaces_its_own_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from measure import Report

    out = tmp_path / "results.jsonl"
    out.write_text('{"from": "another"}\n')
    with pytest.raises(KeyboardInterrupt), Report(out) as report:
        report.write([{"round": 1}, {"of": "two"}])
        report.write([{"round": 2}])
        assert read(out) == [{"from": "another"}, {"round": 2}]
        raise KeyboardInterrupt
    assert read(out) == [{"from": "another"}, {"round": 2}]
    assert capsys.readouterr().out == '{"round": 2}\n'


def outcome(group: str, method: str, seconds: float, failed: bool = False, **facts: float) -> tuple:
    """What pytest tells of a benchmark."""
    stats = None if failed else SimpleNamespace(stats=SimpleNamespace(median=seconds))
    info = {"method": method, "shape": "2 x 2", "peak_extra_mib": 0.0, **facts}
    benchmark = SimpleNamespace(group=group, extra_info=info, stats=stats)
    item = SimpleNamespace(funcargs={"benchmark": benchmark})
    return item, SimpleNamespace(when="call", excinfo=ValueError() if failed else None)


def test_single_operations_are_written_one_by_one_and_without_those_that_failed(tmp_path: Path) -> None:
    from bench_ops import Results
    from measure import Report

    out = tmp_path / "results.jsonl"
    results = Results(Report(out))
    results.pytest_runtest_makereport(*outcome("grad_abs_sum a", "gemm", 1.0, failed=True, flop=1e9))
    results.pytest_runtest_makereport(*outcome("grad_abs_sum a", "fastprune", 2.0, flop=1e9))
    (line,) = read(out)
    assert (line["benchmark"], line["method"], line["gflop_per_s"]) == ("grad_abs_sum", "fastprune", 0.5)
    assert "share_of_gemm" not in line
    results.pytest_runtest_makereport(*outcome("copy", "copy", 1.0, bytes=8e9))
    results.pytest_runtest_makereport(*outcome("top_scores", "torch.topk", 4.0, bytes=8e9))
    results.pytest_runtest_makereport(*outcome("grad_abs_sum a", "fastprune", 4.0, flop=1e9))
    by_method = {line["method"]: line for line in read(out)}
    assert by_method["torch.topk"]["share_of_copy"] == 0.25
    assert "torch" in by_method["fastprune"]["backends"] and "backends" not in by_method["torch.topk"]
    assert (by_method["fastprune"]["passes"], by_method["fastprune"]["seconds_median"]) == (2, 3.0)


def test_the_plain_product_of_an_example_is_left_to_a_devices_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 inputs would make a baseline that is slow for no reason of its own."""
    import bench_ops

    monkeypatch.setattr(bench_ops, "EXAMPLES", {5: 3})
    monkeypatch.setattr(bench_ops, "DTYPE", torch.bfloat16)
    layer = bench_ops.Layer(24, 16, 5)
    truth = layer.product_an_example().clone()
    layer.acc.zero_()
    products = 0

    def mm(a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:  # torch's takes a device's
        nonlocal products
        products += 1
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(bench_ops, "DEVICE", "cuda")
    monkeypatch.setattr(torch, "mm", mm)
    assert torch.equal(layer.product_an_example(), truth)
    assert products == 3


def test_only_the_time_of_the_examples_is_scaled_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_scoring import Method
    from measure import Stopwatch

    clock = iter([0.0, 1.0, 3.0, 3.5])
    monkeypatch.setattr(Stopwatch, "_now", lambda self: next(clock))

    def run(examples: int, watch: Stopwatch) -> None:
        with watch:
            assert examples == 4

    method = Method(run, examples=4, warm_up=0, times_examples=10.0, times_blocks=2.0)
    method.measure("cpu")
    times = method.times()
    assert (times["fixed_seconds"], times["seconds_median"], times["scaled_by"]) == (3.0, 43.0, 20.0)


def test_shares_of_the_gemm_rate_are_of_products_timed_like_a_method() -> None:
    from bench_scoring import Method, lines_of, plain_products
    from measure import Stopwatch

    product = 2.0 * 2048 * 2048 * 512
    run, count, times = plain_products("cpu", torch.float32, 2.5 * product)
    assert count == 2 and times == 1.25
    method = Method(run, count, warm_up=0, times_examples=times)
    method.measure("cpu")
    run(count, watch := Stopwatch("cpu"))
    assert watch.seconds > 0 and len(method.seconds) == 1

    methods = {name: Method(run, count, warm_up=0) for name in ("fastprune", "gemm", "naive")}
    methods["fastprune"].seconds = [4.0, 50.0, 10.0]
    assert "share_of_gemm_rate" not in lines_of(methods, {}, 1e9)[0]  # a run that was stopped before the products
    methods["gemm"].seconds, methods["naive"].seconds = [2.0, 20.0, 8.0], [6.0, 100.0]
    fast, gemm, naive = lines_of(methods, {}, 1e9)
    assert "torch" in fast["backends"] and "backends" not in gemm | naive
    # Round by round: the second was slow for all of them, and the third is not over.
    assert [line["share_of_gemm_rate"] for line in (fast, gemm, naive)] == [0.5, 1.0, round((2 / 6 + 20 / 100) / 2, 3)]
    assert (gemm["fastprune_is_faster_by"], naive["fastprune_is_faster_by"], fast["gemm_gflops"]) == (0.5, 1.75, 0.1)


@pytest.mark.parametrize(("n_replays", "blocks"), [(None, [0, 1, 2, 3]), (2, [1, 3]), (1, [2])])
def test_few_replays_lie_evenly_over_the_blocks(n_replays: int | None, blocks: list[int]) -> None:
    import baselines
    from bench_scoring import WORKLOADS

    dry = WORKLOADS["dry"]
    workload = replace(dry, shape=(32, 48, 4, 4, 2, 97), examples=2, lengths=(5, 6))
    model, examples = workload.model("cpu"), workload.build_examples(1)
    whole = baselines.naive(model, examples, examples)
    for all_kept, kept in zip(whole, baselines.replay(model, examples, examples, n_replays), strict=True):
        assert sorted({int(name.split(".")[2]) for name in kept}) == blocks
        for name, (_, values) in kept.items():
            assert values.allclose(all_kept[name][1], rtol=1e-3)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_table_reads_committed_results(path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "table.py"), str(path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    timed = [line for line in read(path) if "seconds_median" in line]
    assert all(line["method"] in table for line in timed)


class Queue:
    """A device's clock: work is queued at once and done one piece after the other."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def launch(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.perf_counter()) + seconds

    def now(self) -> float:
        self.launch(0)
        return self.free_at


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_part_of_a_pass_is_given_its_own_time(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are formed inside the backward pass: what they take is not dX, or less than nothing would be left.

    On a device they are launched by a thread of autograd's, and nobody waits for them.
    """
    import scoring_split
    from bench_scoring import WORKLOADS

    import fastprune
    from fastprune import ops
    from fastprune.calibration import CalibrationSet

    dry = WORKLOADS["dry"]
    model, rows, calls, genuine = dry.model("cpu"), CalibrationSet(dry.build_examples(1)), [], ops.accumulate_gradients
    queue, backward = Queue(), torch.autograd.backward

    def slow(*args: object, **kwargs: object) -> None:
        calls.append(queue.launch(0.05) if device == "cuda" else time.sleep(0.05))
        genuine(*args, **kwargs)

    def on_a_thread(*args: object) -> None:
        with ThreadPoolExecutor() as pool:
            pool.submit(backward, *args).result()

    monkeypatch.setattr(ops, "accumulate_gradients", slow)
    if device == "cuda":
        monkeypatch.setattr(scoring_split, "Instant", queue.now)
        monkeypatch.setattr(torch.autograd, "backward", on_a_thread)
    start = time.perf_counter()
    parts = scoring_split.split(device, lambda: fastprune.score(model, rows, rows, progress=False))
    whole = max(time.perf_counter(), queue.free_at) - start
    assert set(parts) == {"forward", "head", "sums", "selection", "dX", "rest"}
    nothing = [part for part, seconds in parts.items() if seconds <= 0]
    assert nothing == [] or (device, nothing) == ("cuda", ["selection"])  # for which nothing is queued here
    assert len(calls) >= 28 and parts["sums"] >= 0.05 * len(calls)
    assert sum(parts.values()) <= whole


def test_a_split_that_fails_costs_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_scoring
    import scoring_split

    out = tmp_path / "results.jsonl"
    before = []

    def failing(device: str, run: object) -> None:
        before.extend(read(out))
        raise RuntimeError("no events here")

    monkeypatch.setattr(scoring_split, "split", failing)
    monkeypatch.setattr(sys, "argv", ["bench_scoring.py", "--dry-run", "--out", str(out)])
    bench_scoring.main()
    assert [line["method"] for line in before] == ["fastprune"]
    lines = {line["method"]: line for line in read(out)}
    assert set(lines) == {"fastprune", "gemm", "naive", "replay"}
    assert lines["fastprune"]["split_error"] == "RuntimeError: no events here"


@pytest.mark.parametrize("broken", ["naive", "replay"])
def test_a_method_that_fails_leaves_the_others(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import baselines
    import bench_scoring

    genuine, runs = baselines.naive, []

    def failing(*args: object) -> object:
        runs.append(args)
        if broken == "naive" and len(runs) == 1:
            return genuine(*args)  # by the check, which needs it
        raise torch.OutOfMemoryError("no room here")

    monkeypatch.setattr(baselines, broken, failing)
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_scoring.py", "--dry-run", "--out", str(out)])
    with pytest.raises(SystemExit, match=rf"^{broken}: (.|\n)*no room here"):
        bench_scoring.main()
    assert {line["method"] for line in read(out)} == {"fastprune", "gemm", "naive", "replay"} - {broken}


def test_an_operation_with_another_result_is_not_timed_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bench_cuda_ops

    monkeypatch.setattr(bench_cuda_ops, "topk", lambda weight, statistic, k: torch.zeros(k))
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench_cuda_ops.py", "--dry-run", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"top_scores, q_proj .*: torch\.topk gives another result"):
        bench_cuda_ops.main()
    assert [line["benchmark"] for line in read(out)] == ["apply_and_restore_sparse", "difference"]


def test_a_random_checkpoint_draws_few_values_and_repeats_no_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from random_checkpoint import SHAPES, write_checkpoint
    from safetensors.torch import load_file

    drawn, genuine = [], torch.Tensor.normal_

    def noted(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        drawn.extend([tensor.numel()] if tensor.device.type == "cpu" else [])
        return genuine(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", noted)
    shape = {**SHAPES["300m"], "num_hidden_layers": 3, "vocab_size": 8192}
    folders = [write_checkpoint(tmp_path / name, **shape, shard_bytes=1 << 26) for name in ("one", "two")]
    files = [sorted(folder.glob("*.safetensors")) for folder in folders]
    assert len(files[0]) > 1 and [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    weights = {name: tensor for path in files[0] for name, tensor in load_file(path).items() if tensor.ndim == 2}
    n_weights = sum(weight.numel() for weight in weights.values())
    assert 2 * max(drawn) < n_weights and sum(drawn) == 2 * max(drawn)  # one of each checkpoint
    for weight in weights.values():
        assert abs(weight.double().mean()) < 1e-4
        assert weight.double().std() == pytest.approx(0.02, rel=0.01)
        assert len(weight[:, :16].unique(dim=0)) == len(weight)  # nor a row of one
    assert len({tuple(weight.flatten()[:64].tolist()) for weight in weights.values()}) == len(weights)


def test_a_streaming_line_says_what_was_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_streaming
    import measured_run

    def run(*words: object) -> dict:
        monkeypatch.setattr(sys, "argv", ["measured_run.py", *map(str, words)])
        measured_run.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(bench_streaming, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench_streaming.py", "--dry-run", "--examples", "3", "--out", str(out)])
    bench_streaming.main()
    assert [(line["examples"], line["tokens"]) for line in read(out)] == [(6, 6 * 64)] * 2
    assert all("torch" in line["backends"] for line in read(out))
