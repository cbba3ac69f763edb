"""The Triton kernels for sums over all tokens against plain torch: interpreted, and with ``-m gpu`` on a device."""

# ruff: noqa: E402 -- what follows importorskip needs Triton
from __future__ import annotations

import pytest
import torch

from fastprune.ops import reference

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

from fastprune_kernels import grad_sum
from fastprune_kernels.act_sq_sum import accumulate_act_sq_sum
from fastprune_kernels.grad_sum import accumulate_grad_sum
from support.kernel_cases import (
    N_TOKENS,
    SMALL,
    assert_as_exact_as_torch,
    assert_nothing_written_around,
    each_device,
    each_dtype,
    each_size,
    inputs,
    strided,
)


@each_device
@each_dtype
@each_size
def test_grad_sum(size, dtype, device) -> None:
    dy, x = inputs(*size, dtype, device, spans=(torch.tensor([0]), torch.tensor([N_TOKENS])))
    acc = strided(*size, torch.float32, device)
    before, again = acc.clone(), acc.clone()
    accumulate_grad_sum(acc, dy, x, shape=SMALL)
    assert_as_exact_as_torch(acc, before, lambda a: reference.accumulate_grad_sum(a, dy, x), N_TOKENS)
    assert_nothing_written_around(acc)
    accumulate_grad_sum(again, dy, x, shape=SMALL)
    assert torch.equal(acc, again)


@each_device
@pytest.mark.parametrize("layouts", [("transposed", "slice"), ("step", "transposed")], ids="-".join)
def test_grad_sum_with_any_strides_and_the_block_it_chooses(layouts, device) -> None:
    dy, x = inputs(17, 65, torch.bfloat16, device, layouts, spans=(torch.tensor([0]), torch.tensor([N_TOKENS])))
    acc = strided(17, 65, torch.float32, device, "transposed")
    before = acc.clone()
    accumulate_grad_sum(acc, dy, x)
    assert_as_exact_as_torch(acc, before, lambda a: reference.accumulate_grad_sum(a, dy, x), N_TOKENS)


@each_device
def test_grad_sum_of_more_tokens_than_a_launch_takes(device, monkeypatch) -> None:
    monkeypatch.setattr(grad_sum, "MAX_TOKENS", 50)
    dy, x = inputs(17, 65, torch.float16, device, spans=(torch.tensor([0]), torch.tensor([N_TOKENS])))
    acc = torch.rand(17, 65, device=device)
    before = acc.clone()
    accumulate_grad_sum(acc, dy, x, shape=SMALL)
    assert_as_exact_as_torch(acc, before, lambda a: reference.accumulate_grad_sum(a, dy, x), 50)


@each_device
def test_grad_sum_without_tokens_leaves_the_accumulator(device) -> None:
    acc = torch.rand(3, 5, device=device)
    before = acc.clone()
    accumulate_grad_sum(acc, acc.new_empty(0, 3), acc.new_empty(0, 5))
    assert torch.equal(acc, before)


@each_device
@each_dtype
@pytest.mark.parametrize("size", [(0, 4), (1, 1), (129, 17), (700, 100)], ids=str)
@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_act_sq_sum_has_the_bits_of_the_reference(layout, size, dtype, device) -> None:
    x = strided(*size, dtype, device, layout)
    for wide in (torch.float32, torch.float64):
        acc = strided(2, size[1], wide, device, "step")[0]
        expected = acc.clone()
        accumulate_act_sq_sum(acc, x)
        reference.accumulate_act_sq_sum(expected, x)
        assert torch.equal(acc, expected)
