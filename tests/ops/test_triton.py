"""The Triton backend behind :mod:`fastprune.ops`, interpreted on CPU tensors.

What the kernels do with strides, sizes and dtypes is in test_kernels.py; what they do on a device in test_ops_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from support.architectures import HARM, build
from torch import Tensor

from fastprune import ops
from fastprune.calibration import micro_batches
from fastprune.model.matrices import eligible_matrices
from fastprune.ops import reference
from fastprune.scoring.statistics import SegmentStatistics

triton_ops = pytest.importorskip(
    "fastprune.ops.triton", reason="Triton has no build for this platform", exc_type=ImportError
)

pytestmark = pytest.mark.skipif(not triton_ops.INTERPRETED, reason="kernels are compiled here")

PER_EXAMPLE = ["accumulate_grad_abs_sum", "accumulate_grad_sq_sum"]
SUMS = ["accumulate_grad_sum", *PER_EXAMPLE, "accumulate_act_sq_sum"]
# An example without tokens, tokens in no example, an example of several steps, and one that is not in order.
STARTS, LENGTHS, N_TOKENS = torch.tensor([9, 3, 80, 1]), torch.tensor([70, 5, 0, 2]), 81


def ragged(op: str, out: int, inner: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Arguments after the accumulator, of which rows are windows of larger tensors."""
    dy, x = (torch.randn(N_TOKENS + 1, n + 3).to(dtype)[1:, 2 : 2 + n] for n in (out, inner))
    if op == "accumulate_act_sq_sum":
        return (x,)
    return (dy, x) if op == "accumulate_grad_sum" else (dy, x, STARTS, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", SUMS)
def test_interpreted_triton_is_as_exact_as_torch(op, dtype) -> None:
    """Bounds are those of test_kernels.py: tensor cores cut where they add, three TF32 products leave out 2^-21."""
    args = ragged(op, 17, 45, dtype)
    start = torch.rand(45) if op == "accumulate_act_sq_sum" else torch.rand(17, 45)
    exact, plain, found = start.double(), start.clone(), start.clone()
    getattr(reference, op)(exact, *args)
    getattr(ops, op)(plain, *args, backend="torch")
    getattr(ops, op)(found, *args, backend="triton")
    error, own = (found - exact).norm(), (plain - exact).norm()
    assert error <= 2 * own + 2**-24 * (8 + N_TOKENS / 8) * exact.norm()
    assert not torch.equal(found, start)
    if op == "accumulate_act_sq_sum":
        assert torch.equal(found, plain)
    again = start.clone()
    getattr(ops, op)(again, *args, backend="triton")
    assert torch.equal(again, found)


@pytest.mark.parametrize("op", PER_EXAMPLE)
def test_whole_numbers_give_the_bits_of_torch(op) -> None:
    """Nothing is rounded, so a token of the wrong example shows in any bit; the accumulator is input-major too."""
    dy, x = (torch.randint(-8, 9, (N_TOKENS, n)).bfloat16() for n in (20, 33))
    for acc in (torch.ones(20, 33), torch.ones(33, 20).T):
        plain = acc.clone()
        getattr(ops, op)(plain, dy, x, STARTS, LENGTHS, backend="torch")
        getattr(ops, op)(acc, dy, x, STARTS, LENGTHS, backend="triton")
        assert torch.equal(acc, plain)


@pytest.mark.parametrize("left_out", ["none", "grad_sum", "grad_abs_sum", "grad_sq_sum"])
def test_several_sums_of_whole_numbers_give_the_bits_of_torch(left_out) -> None:
    dy, x = (torch.randint(-8, 9, (N_TOKENS, n)).bfloat16() for n in (20, 33))
    dy[:1], dy[8:9], dy[79:] = 0, 0, 0  # tokens of no example
    names = {"grad_sum", "grad_abs_sum", "grad_sq_sum"} - {left_out}
    plain, found = ({name: torch.ones(20, 33) for name in names} for _ in range(2))
    ops.accumulate_gradients(plain, dy, x, STARTS, LENGTHS, backend="torch")
    ops.accumulate_gradients(found, dy, x, STARTS, LENGTHS, backend="triton")
    assert all(torch.equal(found[name], plain[name]) for name in names)


@pytest.mark.parametrize("op", PER_EXAMPLE)
def test_no_examples_and_empty_examples_add_nothing(op) -> None:
    dy, x, acc = torch.randn(4, 3), torch.randn(4, 5), torch.ones(3, 5)
    for spans in (([], []), ([2], [0])):
        starts, lengths = (torch.tensor(each, dtype=torch.int64) for each in spans)
        getattr(ops, op)(acc, dy, x, starts, lengths, backend="triton")
    assert torch.equal(acc, torch.ones(3, 5))


def test_inputs_that_require_a_gradient_are_taken_as_they_are() -> None:
    x, acc = torch.ones(2, 5, requires_grad=True), torch.zeros(5)
    ops.accumulate_act_sq_sum(acc, x, backend="triton")
    assert torch.equal(acc, torch.full((5,), 2.0)) and not acc.requires_grad


def test_the_engine_gives_the_statistics_of_the_cpu_through_triton() -> None:
    """Right-padded micro-batches, as :mod:`fastprune.scoring.statistics` hands them over."""
    matrix = eligible_matrices(build("Llama"))[0]
    names = ("grad_sum", "grad_abs_sum", "grad_sq_sum", "act_sq_sum")
    (batch,) = micro_batches(HARM, 10_000)
    real = batch.attention_mask.flatten()[:, None]
    x = torch.randn(batch.input_ids.numel(), matrix.weight.shape[1])
    dy = torch.randn(batch.input_ids.numel(), matrix.weight.shape[0]) * real
    found = {}
    for backend in ("torch", "triton"):
        statistics = SegmentStatistics([matrix], names, torch.float32, backend)
        statistics.begin(batch, [str(row) for row in range(len(HARM))])
        statistics.inputs(matrix, x)
        statistics.gradients(matrix, x, dy)
        found[backend] = statistics.of[matrix.name]
    assert batch.lengths.tolist() == batch.attention_mask.sum(1).tolist()
    for name in names:
        torch.testing.assert_close(found["triton"][name], found["torch"][name], rtol=1e-5, atol=1e-4)
