"""The benchmark's sums in bfloat16: bit by bit what a loop over examples gives, and nothing else in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.pass_statistics import STATISTICS, engine_statistics, relative_error

import fastprune
from fastprune.calibration import CalibrationSet, micro_batches

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
GRADIENTS = ("grad_sum", "grad_abs_sum", "grad_sq_sum")


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def rounded_statistics(model: torch.nn.Module, **settings: Any) -> dict[str, dict[str, torch.Tensor]]:
    from bf16_statistics import rounded_sums

    with rounded_sums():
        return engine_statistics(model, **settings)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("segments", [1, 3])
def test_sums_are_those_of_a_loop_that_rounds_every_step(name: str, segments: int) -> None:
    model, rows = build(name), HARM * 3
    found = rounded_statistics(model, segments=segments, batch_tokens=1, rows=rows)
    order = [index for batch in micro_batches(rows, 1) for index in batch.example_indices]
    assert sorted(order) == list(range(len(rows))) != order
    alone = [engine_statistics(model, segments=1, batch_tokens=1, rows=[row]) for row in HARM]
    exact = engine_statistics(model, segments=1, batch_tokens=1, dtype=torch.float64, rows=rows)
    for matrix in found:
        sums = {key: torch.zeros_like(found[matrix][key], dtype=torch.bfloat16) for key in GRADIENTS}
        for index in order:
            gradient = alone[index % len(HARM)][matrix]["grad_sum"].to(torch.bfloat16)
            sums["grad_sum"] = sums["grad_sum"] + gradient
            sums["grad_abs_sum"] = sums["grad_abs_sum"] + gradient.abs()
            sums["grad_sq_sum"] = sums["grad_sq_sum"] + gradient * gradient
        for key in GRADIENTS:
            assert found[matrix][key].dtype == torch.float32
            assert torch.equal(found[matrix][key], sums[key].float()), (matrix, key)
            assert relative_error(found[matrix][key], exact[matrix][key]) < 0.05
        assert relative_error(found[matrix]["act_sq_sum"], exact[matrix]["act_sq_sum"]) < 1e-5


def test_micro_batches_of_several_padded_examples_keep_them_apart() -> None:
    model = build("Llama")
    one = rounded_statistics(model, segments=2, batch_tokens=1)
    many = rounded_statistics(model, segments=2, batch_tokens=4096)
    for matrix in one:
        for key in GRADIENTS:  # gradients differ by float32's rounding, which decides some of bfloat16's
            assert relative_error(many[matrix][key], one[matrix][key].double()) < 2e-3, (matrix, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype: torch.dtype) -> None:
    """The loss scale of float16 is a power of two, and bfloat16 has float32's range: it leaves no trace."""
    model = build("Llama", dtype=dtype)
    found = rounded_statistics(model, segments=2, batch_tokens=24)
    exact = engine_statistics(model, segments=2, batch_tokens=24)
    for matrix in found:
        for key in STATISTICS:
            assert relative_error(found[matrix][key], exact[matrix][key].double()) < 0.02, (matrix, key)


def test_scores_are_formed_from_the_rounded_sums() -> None:
    from bf16_statistics import rounded_sums

    model = build("Llama")

    def score() -> fastprune.Scores:
        return fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), q_max=1, progress=False)

    with rounded_sums():
        rounded = score()
    exact = score()
    sums = rounded_statistics(model, segments=1, batch_tokens=4096)
    for matrix, kept in rounded.harm.items():
        expected = -model.get_parameter(matrix).detach() * sums[matrix]["grad_sum"]
        assert torch.equal(kept.values, expected.flatten()[kept.indices]), matrix
        assert not torch.equal(kept.values, exact.harm[matrix].values)
