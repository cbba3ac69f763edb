"""Writing single weights and putting them back: the same bits on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sparse import BACKENDS, DTYPES, LAYOUTS, any_bits, bits, copies, same, several
from torch import Tensor

from fastprune import ops
from fastprune.errors import ArgumentError, BackendError


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [0.0, 0.3, -2.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_apply_then_restore_gives_the_same_bits(backend, dtype, scale, layout):
    for shape in [(1, 1), (3, 5), (17, 129)]:
        weight = LAYOUTS[layout](any_bits(shape, dtype))
        before = weight.clone(memory_format=torch.contiguous_format)
        indices = torch.randperm(weight.numel())[: max(1, weight.numel() // 3)]
        old = ops.apply_sparse_(weight, indices, scale, backend=backend)
        assert torch.equal(bits(old), bits(before.view(-1)[indices]))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        wanted = before.clone().view(-1)
        wanted[indices] = (old.to(wide) * scale).to(dtype) if scale else torch.zeros_like(old)
        same = bits(weight).view(-1) == bits(wanted)
        assert bool((same | (weight.reshape(-1).isnan() & wanted.isnan())).all())
        ops.restore_sparse_(weight, indices, old, backend=backend)
        assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_zero_writes_plus_zero_over_anything(backend, dtype):
    weight = torch.tensor([[-1.0, math.inf, math.nan, -0.0]], dtype=dtype)
    ops.apply_sparse_(weight, torch.arange(4), backend=backend)
    assert not bits(weight).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_write_the_same_bits(dtype):
    weight = torch.randn(40, 50).to(dtype)
    indices = torch.randperm(2000)[:500]
    written = []
    for backend in BACKENDS:
        copy = weight.clone()
        ops.apply_sparse_(copy, indices, 0.7, backend=backend)
        written.append(copy)
    assert all(torch.equal(copy, written[0]) for copy in written) and not torch.equal(written[0], weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_can_be_written_and_autograd_hears_of_it(backend):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    loss = (weight * weight).sum()
    old = ops.apply_sparse_(weight, torch.tensor([1, 5]), backend=backend)
    assert weight[0, 1] == 0 and weight[1, 1] == 0 and not old.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_indices_write_nothing(backend):
    weight = torch.randn(3, 4)
    before = weight.clone()
    old = ops.apply_sparse_(weight, torch.empty(0, dtype=torch.int64), backend=backend)
    ops.restore_sparse_(weight, torch.empty(0, dtype=torch.int64), old, backend=backend)
    assert old.shape == (0,) and torch.equal(weight, before)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=4, max_size=4), order=st.permutations(range(4)), step=st.integers(1, 2)
)
def test_flat_indices_mean_row_major_order_in_any_layout(shape, order, step):
    """Guards the conversion of flat indices into memory offsets for permuted and strided tensors."""
    axes = list(order)
    storage = torch.zeros([shape[a] for a in axes[:-1]] + [shape[axes[-1]] * step])
    weight = storage[..., ::step].permute([axes.index(a) for a in range(len(shape))])
    assert list(weight.shape) == shape
    weight.copy_(torch.arange(weight.numel(), dtype=torch.float32).view(shape) + 1)
    indices = torch.randperm(weight.numel())[: (weight.numel() + 1) // 2]
    for backend in BACKENDS:
        old = ops.apply_sparse_(weight, indices, backend=backend)
        assert torch.equal(old, indices + 1.0)
        wanted = torch.arange(weight.numel()) + 1.0
        wanted[indices] = 0
        assert torch.equal(weight.reshape(-1), wanted)
        ops.restore_sparse_(weight, indices, old, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("weight", "indices", "scale", "name"),
    [
        (torch.zeros(2, 3), torch.tensor([6]), 0.0, "indices"),
        (torch.zeros(2, 3), torch.tensor([-1]), 0.0, "indices"),
        (torch.zeros(2, 3), torch.tensor([1], dtype=torch.int32), 0.0, "indices"),
        (torch.zeros(2, 3), torch.tensor([[1]]), 0.0, "indices"),
        (torch.zeros(2, 3), torch.tensor([1]), math.nan, "scale"),
        (torch.zeros(2, 3), torch.tensor([1]), math.inf, "scale"),
        (torch.zeros(2, 3), torch.tensor([1]), "0", "scale"),
        (torch._neg_view(torch.zeros(2, 3)), torch.tensor([1]), 0.0, "weight"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([1]), 0.0, "weight"),
        (torch.zeros(3).expand(2, 3), torch.tensor([1]), 0.0, "weight"),
        (torch.zeros(8).as_strided((3, 3), (2, 1)), torch.tensor([1]), 0.0, "weight"),
    ],
)
def test_bad_arguments_are_named(weight, indices, scale, name, backend):
    with pytest.raises(ArgumentError, match=name):
        ops.apply_sparse_(weight, indices, scale, backend=backend)
    assert not weight.any()


@pytest.mark.parametrize(
    "old", [torch.zeros(2, dtype=torch.float64), torch.zeros(3), torch.zeros(2, device="meta")], ids=str
)
def test_restore_refuses_values_that_are_not_those_of_apply(old):
    with pytest.raises(ArgumentError, match="old"):
        ops.restore_sparse_(torch.zeros(2, 3), torch.tensor([0, 1]), old)


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_several_matrices_at_once_get_the_bits_of_one_by_one(backend, scale, monkeypatch):
    weights, indices = several()
    before, alone = copies(weights), copies(weights)
    expected = {name: ops.apply_sparse_(alone[name], indices[name], scale, backend=backend) for name in alone}
    waits, genuine = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waits.append(tensor.device) or genuine(tensor))
    old = ops.apply_sparse_each_(weights, indices, scale, backend=backend)
    assert len(waits) == 1  # for the range of all lists of a device, which is a wait if it is a GPU
    assert same(old, expected) and same(weights, alone) and not same(weights, before)
    ops.restore_sparse_each_(weights, indices, dict(reversed(old.items())), backend=backend)
    assert len(waits) == 2 and same(weights, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_matrices_or_no_indices_write_nothing(backend):
    assert ops.apply_sparse_each_({}, {}, backend=backend) == {}
    ops.restore_sparse_each_({}, {}, {}, backend=backend)
    weights, indices = several()
    before, nothing = copies(weights), {name: each[:0] for name, each in indices.items()}
    ops.restore_sparse_each_(weights, nothing, ops.apply_sparse_each_(weights, nothing, backend=backend))
    assert same(weights, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"indices": torch.tensor([5, 493])},
            r"^last: indices: expected 0 to 492 for a weight \(17, 29\), got 5 to 493",
        ),
        ({"indices": torch.tensor([-1, 5])}, r"^last: indices: expected 0 to 492 .*, got -1 to 5"),
        ({"indices": torch.tensor([[1]])}, r"^last: indices: expected int64 \(n,\)"),
        ({"weight": torch.zeros(29).expand(17, 29)}, "^last: weight: expected no elements that share memory"),
        ({"weight": torch.zeros(17, 29, dtype=torch.int64)}, "^last: weight: expected float16"),
        ({"old": torch.zeros(3)}, r"^last: old: expected torch\.float32 \(1,\)"),
        ({"scale": math.nan}, "^scale: expected a finite number"),
        ({"backend": "triton"}, "'triton' has no (apply|restore)_sparse_"),
        ({"backend": "tpu"}, "^backend: expected one of"),
    ],
)
def test_one_bad_argument_leaves_all_matrices_untouched(changes, message):
    weights, indices = several()
    weights["last"] = changes.get("weight", torch.ones(17, 29))
    indices["last"] = changes.get("indices", torch.tensor([7]))
    before, options = copies(weights), {"backend": changes.get("backend")}
    if "old" not in changes:
        with pytest.raises((ArgumentError, BackendError), match=message):
            ops.apply_sparse_each_(weights, indices, changes.get("scale", 0.0), **options)
        assert same(weights, before)
    if "scale" not in changes:
        old = {name: weights[name].new_zeros(each.shape) for name, each in indices.items()}
        with pytest.raises((ArgumentError, BackendError), match=message):
            ops.restore_sparse_each_(weights, indices, {**old, "last": changes.get("old", old["last"])}, **options)
        assert same(weights, before)


def test_names_that_differ_are_refused():
    weights, indices = {"a": torch.ones(2, 3)}, {"a": torch.tensor([1])}
    with pytest.raises(ArgumentError, match=r"indices: expected the names of the 1 weights, got 2; 'b' is in one"):
        ops.apply_sparse_each_(weights, {**indices, "b": indices["a"]})
    with pytest.raises(ArgumentError, match=r"indices: expected the names of the 1 weights, got 0; 'a' is in one"):
        ops.apply_sparse_each_(weights, {})
    with pytest.raises(ArgumentError, match=r"old: expected the names of the 1 weights, got 1; 'a' is in one"):
        ops.restore_sparse_each_(weights, indices, {"b": torch.ones(1)})
    with pytest.raises(ArgumentError, match=r"indices: expected the names of the 1 weights, got 0; 'a' is in one"):
        ops.restore_sparse_each_(weights, {}, {"a": torch.ones(1)})
    assert weights["a"].all()
