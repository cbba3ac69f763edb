"""Sums over examples and tokens: every backend against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.accumulation import BACKENDS, DTYPES, GOOD, LENGTHS, N_TOKENS, STARTS, arguments, error, exact

from fastprune import ops
from fastprune.errors import ArgumentError
from fastprune.ops import cpp, reference

SHAPES = [(1, 1), (3, 5), (17, 129), (130, 64), (0, 4), (4, 0)]  # (out, in)
PRODUCT_OPS = ["accumulate_grad_sum", "accumulate_grad_abs_sum", "accumulate_grad_sq_sum"]
PER_EXAMPLE_OPS = PRODUCT_OPS[1:]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCT_OPS)
def test_products_round_no_more_than_sums_in_any_order_do(op, backend, dtype, acc_dtype, shape):
    """A sum of n terms errs by at most (n - 1) units of rounding of the sum of their magnitudes, in whatever order.

    A term's product and (for squares) its square are rounded too; the square doubles the error of what is squared.
    """
    args = arguments(op, *shape, dtype)
    start = torch.rand(shape, dtype=acc_dtype)
    wanted = exact(op, start, args)
    magnitude = exact(op, start, tuple(t.abs() if t.is_floating_point() else t for t in args))
    found = start.clone()
    getattr(ops, op)(found, *args, backend=backend)
    unit = torch.finfo(acc_dtype).eps / 2
    factor = 2 if op == "accumulate_grad_sq_sum" else 1
    assert ((found.double() - wanted).abs() <= factor * (N_TOKENS + 2) * unit * magnitude).all()


# The kernel's tiles are 8 x 48 (AVX-512, float32) down to 4 x 12 (AVX2, float64): whole tiles, one more and one less.
@pytest.mark.parametrize("shape", [(8, 48), (16, 96), (7, 47), (9, 49), (1, 97), (65, 1), (24, 144)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_tiles_cover_every_weight_once(op, backend, shape):
    args = arguments(op, *shape, torch.float32)
    acc = torch.ones(shape)
    getattr(ops, op)(acc, *args, backend=backend)
    assert error(acc, exact(op, torch.ones(shape), args)) < 1e-6


@pytest.mark.parametrize("lengths", [[1300], [511, 2, 300, 600], [513] * 3, [1] * 40], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_many_tokens_are_taken_in_several_parts(op, backend, lengths):
    lengths = torch.tensor(lengths)
    n_tokens = int(lengths.sum())
    args = torch.randn(n_tokens, 10), torch.randn(n_tokens, 50), lengths.cumsum(0) - lengths, lengths
    acc = torch.zeros(10, 50)
    getattr(ops, op)(acc, *args, backend=backend)
    assert error(acc, exact(op, torch.zeros(10, 50), args)) < 1e-6 * max(1, max(lengths.tolist()) / 256) ** 0.5


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension was not built")
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_rows_beyond_one_block_of_packed_errors(op, acc_dtype):
    """8 MB of errors are packed at a time: 1200 tokens of one example leave room for 1747 rows in float32."""
    dy, x = torch.randn(1200, 3601), torch.randn(1200, 5)
    spans = torch.tensor([0]), torch.tensor([1200])
    acc = torch.zeros(3601, 5, dtype=acc_dtype)
    getattr(ops, op)(acc, dy, x, *spans, backend="cpp")
    assert error(acc, exact(op, torch.zeros(3601, 5), (dy, x, *spans))) < 2e-6


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension was not built")
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_a_square_matrix_of_inputs_is_exact(op, acc_dtype):
    """Small whole numbers have no rounding, so a wrong token, row or column shows as a wrong bit."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randint(-8, 9, (N_TOKENS, n), generator=generator).float() for n in (67, 131))
    acc = torch.randint(0, 99, (67, 131), generator=generator).to(acc_dtype)
    wanted = exact(op, acc, (dy, x, STARTS, LENGTHS))
    getattr(ops, op)(acc, dy, x, STARTS, LENGTHS, backend="cpp")
    assert torch.equal(acc.double(), wanted)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension was not built")
@pytest.mark.parametrize("shape", [(1, 1), (4, 24), (67, 131)], ids=str)
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_threads_and_instruction_sets_change_no_bit(op, acc_dtype, shape):
    """On a processor without AVX-512 this compares AVX2 with itself; the number of threads is still compared."""
    from fastprune import _cpp

    args, before, sums = arguments(op, *shape, torch.float32), torch.get_num_threads(), []
    try:
        for avx512, threads in ((True, 1), (True, 3), (False, 1), (False, 2)):
            _cpp.allow_avx512(avx512)
            torch.set_num_threads(threads)
            sums.append(torch.ones(shape, dtype=acc_dtype))
            getattr(ops, op)(sums[-1], *args, backend="cpp")
    finally:
        _cpp.allow_avx512(True)
        torch.set_num_threads(before)
    assert all(torch.equal(found, sums[0]) for found in sums)
    assert error(sums[0], exact(op, torch.ones(shape), args)) < 1e-6


@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_a_processor_without_the_kernel_is_served_by_its_blas(op, monkeypatch):
    monkeypatch.setattr(cpp, "has_gradient_kernel", lambda: False)
    args = arguments(op, 17, 129, torch.bfloat16)
    sums = {}
    for backend in BACKENDS:
        sums[backend] = torch.zeros(17, 129)
        getattr(ops, op)(sums[backend], *args, backend=backend)
        assert torch.equal(sums[backend], sums["torch"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCT_OPS)
def test_transposed_and_strided_accumulators(op, backend):
    dy, x, *spans = arguments(op, 6, 9, torch.float32)
    wanted = exact(op, torch.zeros(6, 9), (dy, x, *spans))
    transposed, strided = torch.zeros(9, 6).T, torch.zeros(6, 20)
    getattr(ops, op)(transposed, dy, x, *spans, backend=backend)
    getattr(ops, op)(strided[:, 3:12], dy, x, *spans, backend=backend)
    assert error(transposed, wanted) < 1e-6
    assert error(strided[:, 3:12], wanted) < 1e-6
    assert not strided[:, :3].any() and not strided[:, 12:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_two_accumulators_merge_into_one_over_all(op, backend):
    dy, x, starts, lengths = arguments(op, 13, 21, torch.float32)
    whole, first, second = torch.zeros(13, 21), torch.zeros(13, 21), torch.zeros(13, 21)
    getattr(ops, op)(whole, dy, x, starts, lengths, backend=backend)
    getattr(ops, op)(first, dy, x, starts[:1], lengths[:1], backend=backend)
    getattr(ops, op)(second, dy, x, starts[1:], lengths[1:], backend=backend)
    assert error(first + second, whole.double()) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", PRODUCT_OPS)
def test_no_tokens_add_nothing(op, backend):
    none = torch.empty(0, dtype=torch.int64)
    args = (torch.empty(0, 3), torch.empty(0, 5)) + (() if op == "accumulate_grad_sum" else (none, none))
    acc = torch.ones(3, 5)
    getattr(ops, op)(acc, *args, backend=backend)
    assert torch.equal(acc, torch.ones(3, 5))


def test_absolute_value_is_taken_per_example():
    """Guards the statistic that the method is about: |g1| + |g2| is not |g1 + g2|."""
    dy, x = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
    apart, together = torch.zeros(1, 1), torch.zeros(1, 1)
    ops.accumulate_grad_abs_sum(apart, dy, x, torch.tensor([0, 1]), torch.tensor([1, 1]))
    ops.accumulate_grad_abs_sum(together, dy, x, torch.tensor([0]), torch.tensor([2]))
    assert apart.item() == 2 and together.item() == 0


def test_inputs_that_require_a_gradient_are_taken_as_they_are():
    dy, x = torch.ones(2, 3), torch.ones(2, 5, requires_grad=True)
    acc = torch.zeros(3, 5)
    ops.accumulate_grad_abs_sum(acc, dy, x, torch.tensor([0]), torch.tensor([2]))
    ops.accumulate_grad_sum(acc, dy, x)
    assert torch.equal(acc, torch.full((3, 5), 4.0)) and not acc.requires_grad


@settings(deadline=None, max_examples=60)
@given(
    n_tokens=st.integers(0, 400), width=st.integers(0, 70), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31)
)
def test_act_sq_sum_has_the_bits_of_the_reference(n_tokens, width, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, width + 3, generator=generator).to(dtype)[:, 1 : 1 + width]
    for acc_dtype in (torch.float32, torch.float64):
        start = torch.rand(width, generator=generator, dtype=acc_dtype)
        wanted = start.clone()
        reference.accumulate_act_sq_sum(wanted, x)
        for backend in BACKENDS:
            acc = start.clone()
            ops.accumulate_act_sq_sum(acc, x, backend=backend)
            assert torch.equal(acc, wanted), (backend, acc_dtype)
        plain = (start.double() + x.double().square().sum(0)).to(acc_dtype)
        torch.testing.assert_close(wanted, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_act_sq_sum_takes_any_stride_and_keeps_small_terms(backend):
    x = torch.full((3000, 2), 0.25)
    x[0] = 4096.0
    acc = torch.zeros(4)[::2]
    ops.accumulate_act_sq_sum(acc, x.T.contiguous().T, backend=backend)
    # 4096^2 + 2999 / 16: in float32 each 1/16 would be rounded away, or up, one by one.
    assert acc.tolist() == [float(torch.tensor(4096.0**2 + 2999 / 16, dtype=torch.float32))] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_number_of_threads_changes_no_bit_of_act_sq_sum(backend):
    x, before = torch.randn(500, 300), torch.get_num_threads()
    sums = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(torch.zeros(300))
            ops.accumulate_act_sq_sum(sums[-1], x, backend=backend)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("acc", torch.zeros(3, 5, dtype=torch.bfloat16)),
        ("acc", torch.zeros(15)),
        ("acc", torch.zeros(6, 10)[::2, ::2]),
        ("acc", torch.zeros(1, 5).expand(3, 5)),
        ("acc", torch.zeros(3, 1).expand(3, 5)),
        ("acc", torch.zeros(9).as_strided((3, 5), (2, 1))),
        ("dy", torch.zeros(4, 2)),
        ("dy", torch.zeros(4, 3, dtype=torch.int64)),
        ("dy", torch.zeros(4, 3, dtype=torch.float64)),
        ("dy", torch.zeros(4, 3, device="meta")),
        ("dy", torch._neg_view(torch.zeros(4, 3))),
        ("x", [[0.0] * 5] * 4),
        ("x", torch.zeros(4, 5).to_sparse()),
        ("x", torch.zeros(5, 5)),
        ("x", torch.zeros(2, 2, 5)),
        ("starts", torch.tensor([0, 3])),
        ("starts", torch.tensor([-1, 2])),
        ("starts", torch.tensor([0])),
        ("lengths", torch.tensor([2, -1])),
        ("lengths", torch.tensor([2, 2], dtype=torch.int32)),
    ],
)
@pytest.mark.parametrize("op", PER_EXAMPLE_OPS)
def test_bad_arguments_are_named_and_change_nothing(op, name, value):
    args = {**GOOD, name: value}
    before = args["acc"].clone()
    with pytest.raises(ArgumentError, match=name):
        getattr(ops, op)(**args)
    assert torch.equal(args["acc"], before)


@pytest.mark.parametrize(
    ("acc", "x", "name"),
    [
        (torch.zeros(3, 5), torch.zeros(4, 5), "acc"),
        (torch.zeros(1).expand(5), torch.zeros(4, 5), "acc"),
        (torch.zeros(5), torch.zeros(4, 6), "x"),
        (torch.zeros(5), torch.zeros(5), "x"),
        (torch.zeros(5), torch.zeros(4, 5, dtype=torch.int32), "x"),
    ],
)
def test_act_sq_sum_refuses_what_does_not_fit(acc, x, name):
    with pytest.raises(ArgumentError, match=name):
        ops.accumulate_act_sq_sum(acc, x)
