"""Tensors whose memory is not what they show: the operations refuse them by name, or give the right result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune import ops
from fastprune.errors import ArgumentError

BACKENDS = [name for name in ("torch", "cpp") if ops.available_backends()[name] == "available"]


class Dispatching(Tensor):
    """A subclass that answers every operation itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise TypeError("no operation is known")


class Functional(Tensor):
    """A subclass that answers every function itself."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        if getattr(function, "__name__", "") in ("__get__", "dim", "size", "stride", "numel", "data_ptr"):
            return super().__torch_function__(function, types, arguments, keywords or {})
        return 7


class Named(Tensor):
    """A subclass with nothing of its own."""


def freed() -> Tensor:
    tensor = torch.randn(3, 5)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut() -> Tensor:
    tensor = torch.randn(3, 5)
    tensor.untyped_storage().resize_(40)
    return tensor


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.zeros(3, 5)


ODD: dict[str, Callable[[], Tensor]] = {
    "negated": lambda: torch._neg_view(torch.randn(3, 5)),
    "imaginary part": lambda: torch.randn(3, 5, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(3, 5).to_sparse(),
    "sparse rows": lambda: torch.eye(3, 5).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, 5).to_mkldnn(),
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(3, 5), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(2, 5)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 5), torch.ones(2, 5)], layout=torch.jagged),
    "meta": lambda: torch.zeros(3, 5, device="meta"),
    "fake": fake,
    "freed": freed,
    "cut": cut,
    "zeros without memory": lambda: torch._efficientzerotensor((3, 5)),
    "dispatching": lambda: torch.randn(3, 5).as_subclass(Dispatching),
    "functional": lambda: torch.randn(3, 5).as_subclass(Functional),
    "uninitialised": nn.UninitializedParameter,
    "complex": lambda: torch.randn(3, 5, dtype=torch.complex64),
    "integers": lambda: torch.ones(3, 5, dtype=torch.int64),
    "float8": lambda: torch.ones(3, 5).to(torch.float8_e4m3fn),
    "no tensor": lambda: [[1.0] * 5] * 3,
}
DY, X, SPANS = torch.ones(4, 3), torch.ones(4, 5), (torch.tensor([0, 2]), torch.tensor([2, 2]))
INDICES, OLD = torch.tensor([1, 4]), torch.zeros(2)
GIVEN: dict[str, Callable[[Tensor, str], object]] = {
    "acc of a sum": lambda bad, b: ops.accumulate_grad_sum(bad, DY, X, backend=b),
    "acc of absolute values": lambda bad, b: ops.accumulate_grad_abs_sum(bad, DY, X, *SPANS, backend=b),
    "accs": lambda bad, b: ops.accumulate_gradients(
        {"grad_sum": torch.zeros(3, 5), "grad_sq_sum": bad}, DY, X, *SPANS, backend=b
    ),
    "dy": lambda bad, b: ops.accumulate_grad_sq_sum(torch.zeros(5, 5), bad, torch.ones(3, 5), *SPANS, backend=b),
    "x": lambda bad, b: ops.accumulate_grad_sum(torch.zeros(2, 5), torch.ones(3, 2), bad, backend=b),
    "x of squares": lambda bad, b: ops.accumulate_act_sq_sum(torch.zeros(5), bad, backend=b),
    "weight": lambda bad, b: ops.top_scores(bad, None, "magnitude", 2, backend=b),
    "statistic": lambda bad, b: ops.top_scores(torch.ones(3, 5), bad, "signed", 2, backend=b),
    "weight to apply to": lambda bad, b: ops.apply_sparse_(bad, INDICES, 0.5, backend=b),
    "weight to restore": lambda bad, b: ops.restore_sparse_(bad, INDICES, OLD, backend=b),
    "indices": lambda bad, b: ops.apply_sparse_(torch.ones(3, 5), bad, 0.5, backend=b),
    "old": lambda bad, b: ops.restore_sparse_(torch.ones(3, 5), INDICES, bad, backend=b),
    "starts": lambda bad, b: ops.accumulate_grad_abs_sum(torch.zeros(3, 5), DY, X, bad, SPANS[1], backend=b),
    "lengths": lambda bad, b: ops.accumulate_grad_abs_sum(torch.zeros(3, 5), DY, X, SPANS[0], bad, backend=b),
}


@pytest.mark.filterwarnings("ignore")  # torch says that some of these are prototypes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", GIVEN)
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_refused_by_the_name_of_the_argument(kind: str, argument: str, backend: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{argument.split()[0]}\b"):
        GIVEN[argument](ODD[kind](), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_integers_are_refused(backend: str) -> None:
    weight = torch.ones(3, 5)
    for lazy in (torch._neg_view(torch.tensor([-1, -4])), torch.zeros(2, dtype=torch.int64, device="meta")):
        with pytest.raises(ArgumentError, match="indices: expected a dense tensor"):
            ops.apply_sparse_(weight, lazy, 0.5, backend=backend)
        with pytest.raises(ArgumentError, match="lengths: expected a dense tensor"):
            ops.accumulate_grad_abs_sum(torch.zeros(3, 5), DY, X, SPANS[0], lazy, backend=backend)
    assert torch.equal(weight, torch.ones(3, 5))


@pytest.mark.parametrize("transform", ["vmap", "grad", "functionalize"])
def test_tensors_inside_a_transform_are_refused(transform: str) -> None:
    def inside(weight: Tensor) -> Tensor:
        with pytest.raises(ArgumentError, match=r"weight: .*transform of torch\.func"):
            ops.top_scores(weight, None, "magnitude", 1)
        return weight.sum()

    getattr(torch.func, transform)(inside)(torch.ones(3, 5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_subclasses_without_operations_of_their_own_are_tensors(backend: str) -> None:
    for kind in (Named, nn.Parameter, nn.Buffer):
        weight = (
            kind(torch.tensor([[3.0, -4.0]])) if kind is not Named else torch.tensor([[3.0, -4.0]]).as_subclass(kind)
        )
        assert ops.top_scores(weight, None, "magnitude", 1, backend=backend)[0].tolist() == [1]
        ops.apply_sparse_(weight, torch.tensor([0]), 0.0, backend=backend)
        assert weight.tolist() == [[0.0, -4.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_inference_mode_are_written_in_that_mode_alone(backend: str) -> None:
    with torch.inference_mode():
        weight, acc, squares = torch.ones(3, 5), torch.zeros(3, 5), torch.zeros(5)

    def write() -> None:
        ops.accumulate_grad_abs_sum(acc, DY, X, *SPANS, backend=backend)
        ops.accumulate_grad_sum(acc, DY, X, backend=backend)
        ops.accumulate_act_sq_sum(squares, X, backend=backend)
        ops.restore_sparse_(weight, INDICES, ops.apply_sparse_(weight, INDICES, 3.0, backend=backend), backend=backend)
        ops.apply_sparse_(weight, INDICES, 2.0, backend=backend)

    for call in (
        lambda: ops.accumulate_grad_abs_sum(acc, DY, X, *SPANS, backend=backend),
        lambda: ops.accumulate_act_sq_sum(squares, X, backend=backend),
        lambda: ops.apply_sparse_(weight, INDICES, 2.0, backend=backend),
        lambda: ops.restore_sparse_(weight, INDICES, OLD, backend=backend),
    ):
        with pytest.raises(ArgumentError, match=r"torch\.inference_mode"):
            call()
    assert torch.equal(weight, torch.ones(3, 5)) and not acc.any() and not squares.any()
    with torch.inference_mode():
        write()
    assert weight.view(-1)[INDICES].tolist() == [2.0, 2.0] and acc.unique().tolist() == [8.0]
    assert squares.unique().tolist() == [4.0]
    assert ops.top_scores(weight, None, "magnitude", 2, backend=backend)[0].tolist() == [1, 4]  # reading is no matter


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_hears_of_what_is_added_to_an_accumulator(backend: str) -> None:
    for dims, add in (
        (2, lambda acc: ops.accumulate_grad_abs_sum(acc, DY, X, *SPANS, backend=backend)),
        (2, lambda acc: ops.accumulate_grad_sum(acc, DY, X, backend=backend)),
        (1, lambda acc: ops.accumulate_act_sq_sum(acc, X, backend=backend)),
    ):
        leaf = torch.ones((3, 5)[2 - dims :], requires_grad=True)
        acc = leaf * 1
        squared = acc.square().sum()
        add(acc)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squared.backward()


def accumulators(kind: str) -> dict[str, Tensor]:
    memory = torch.zeros(200)
    match kind:
        case "one":
            return dict.fromkeys(("grad_abs_sum", "grad_sq_sum"), memory[:15].view(3, 5))
        case "views":
            return {"grad_abs_sum": memory[:15].view(3, 5), "grad_sq_sum": memory[:15].view(3, 5)}
        case "one row on":
            return {"grad_abs_sum": memory[:15].view(3, 5), "grad_sq_sum": memory[10:25].view(3, 5)}
        case "columns":
            return {"grad_abs_sum": memory.view(20, 10)[:3, :5], "grad_sum": memory.view(20, 10)[:3, 4:9]}
        case "transposed":
            return {"grad_abs_sum": memory[:15].view(5, 3).T, "grad_sum": memory[14:29].view(5, 3).T}
        case "three":
            first = memory[:15].view(3, 5)
            return {"grad_sum": first, "grad_abs_sum": memory[50:65].view(3, 5), "grad_sq_sum": first}
    raise AssertionError(kind)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["one", "views", "one row on", "columns", "transposed", "three"])
def test_accumulators_that_share_an_element_are_refused(kind: str, backend: str) -> None:
    accs = accumulators(kind)
    with pytest.raises(ArgumentError, match=r"accs: expected memory of its own for each, got one for 'grad"):
        ops.accumulate_gradients(accs, DY, X, *SPANS, backend=backend)
    assert not any(acc.any() for acc in accs.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulators_side_by_side_in_one_memory_are_summed_apart(backend: str) -> None:
    for shape, first, second in (
        ((3, 10), (slice(None), slice(0, 5)), (slice(None), slice(5, 10))),
        ((6, 5), (slice(0, 3), slice(None)), (slice(3, 6), slice(None))),
        ((6, 5), (slice(0, 6, 2), slice(None)), (slice(1, 6, 2), slice(None))),
        ((4, 12), (slice(1, 4), slice(7, 12)), (slice(0, 3), slice(2, 7))),
    ):
        memory = torch.zeros(shape)
        accs = {"grad_abs_sum": memory[first], "grad_sq_sum": memory[second]}
        dy, x = torch.randn(4, 3), torch.randn(4, 5)
        alone = {name: torch.zeros(3, 5) for name in accs}
        ops.accumulate_gradients(accs, dy, x, *SPANS, backend=backend)
        ops.accumulate_gradients(alone, dy, x, *SPANS, backend=backend)
        for name in accs:
            assert torch.equal(accs[name], alone[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_accumulator_is_no_input(backend: str) -> None:
    memory = torch.ones(4, 4)
    for dy, x in ((memory, torch.ones(4, 4)), (torch.ones(4, 4), memory.T), (memory.view(-1)[4:12].view(2, 4),) * 2):
        with pytest.raises(ArgumentError, match="acc: expected memory of its own, got that of"):
            ops.accumulate_grad_sum(memory, dy, x, backend=backend)
    with pytest.raises(ArgumentError, match="acc: expected memory of its own, got that of x"):
        ops.accumulate_act_sq_sum(memory[0], memory, backend=backend)
    assert torch.equal(memory, torch.ones(4, 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_in_two_examples_is_refused_where_it_would_count_twice(backend: str) -> None:
    spans = torch.tensor([0, 1]), torch.tensor([2, 2])
    for names in (("grad_sum",), ("grad_sum", "grad_abs_sum")):
        accs = {name: torch.zeros(3, 5) for name in names}
        with pytest.raises(
            ArgumentError, match="starts, lengths: expected each token in one example, got token 1 in two"
        ):
            ops.accumulate_gradients(accs, DY, X, *spans, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_in_two_lists_is_refused(backend: str) -> None:
    weight = torch.ones(4, 6)
    one = torch.tensor([7])
    for weights, indices in (
        ({"a": weight, "b": weight}, {"a": one, "b": one}),
        ({"a": weight, "b": weight[1:]}, {"a": one, "b": one - 6}),
        ({"a": weight.T, "b": weight}, {"a": torch.tensor([5]), "b": one}),  # column 1, row 1 of the other layout
        ({"a": weight, "b": weight.view(torch.bfloat16)}, {"a": one, "b": torch.tensor([14])}),
        ({"a": weight, "b": torch.ones(2), "c": weight[:, 1]}, {"a": one, "b": one - 7, "c": torch.tensor([1])}),
    ):
        with pytest.raises(ArgumentError, match=r"weights: expected no element in two lists, got 'a' and '[bc]'"):
            ops.apply_sparse_each_(weights, indices, 0.5, backend=backend)
        old = {name: torch.zeros(1, dtype=weights[name].dtype) for name in weights}
        with pytest.raises(ArgumentError, match=r"weights: expected no element in two lists, got 'a' and '[bc]'"):
            ops.restore_sparse_each_(weights, indices, old, backend=backend)
    with pytest.raises(ArgumentError, match="indices: expected each weight once, got one twice"):
        ops.apply_sparse_(weight, torch.tensor([3, 1, 3]), 0.5, backend=backend)
    assert torch.equal(weight, torch.ones(4, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_windows_of_one_memory_may_be_written_where_they_differ(backend: str) -> None:
    weight = torch.arange(24.0).view(4, 6)
    weights = {"a": weight[:, :3], "b": weight[:, 3:], "whole": weight, "none": weight}
    indices = {
        "a": torch.tensor([4, 1]), "b": torch.tensor([0]), "whole": torch.tensor([23]), "none": torch.tensor([]).long()
    }  # fmt: skip
    before = weight.clone()
    old = ops.apply_sparse_each_(weights, indices, 0.0, backend=backend)
    assert (weight != before).nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [3, 5]]
    ops.restore_sparse_each_(weights, indices, old, backend=backend)
    assert torch.equal(weight, before)
