"""The per-example Triton kernel against plain torch: interpreted on the CPU and, with ``-m gpu``, on a device.

An interpreted program costs about a millisecond a step, so weights are small here. Real shapes are in
test_kernels_gpu.py; what a compiler makes of the kernels is in test_kernels_aot.py.
"""

# ruff: noqa: E402 -- what follows importorskip needs Triton
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")

import triton.language as tl
from fastprune_kernels import grad_abs_sum
from fastprune_kernels.grad_sum import accumulate_grad_sum
from fastprune_kernels.tiling import tile_position
from support.kernel_cases import (
    DEVICES,
    LENGTHS,
    SMALL,
    STARTS,
    assert_as_exact_as_torch,
    check,
    each_device,
    each_dtype,
    each_size,
    inputs,
    reference_of,
    strided,
)


@each_device
@each_dtype
@each_size
@pytest.mark.parametrize("name", ["grad_abs_sum", "grad_sq_sum"])
def test_sums_over_ragged_examples(name, size, dtype, device) -> None:
    dy, x = inputs(*size, dtype, device)
    check([name], [dy], x)


@each_device
@pytest.mark.parametrize(
    "names", [("grad_abs_sum", "grad_sum"), ("grad_abs_sum", "grad_sq_sum"), ("grad_sum", "grad_sq_sum")], ids="+".join
)
def test_two_statistics_in_one_sweep(names, device) -> None:
    dy, x = inputs(40, 70, torch.bfloat16, device)
    check(names, [dy], x)


@each_device
@pytest.mark.parametrize("layouts", [("transposed", "slice"), ("slice", "transposed"), ("step", "step")], ids="-".join)
def test_any_strides(layouts, device) -> None:
    dy, x = inputs(17, 65, torch.bfloat16, device, layouts)
    check(["grad_abs_sum"], [dy], x)


@each_device
@pytest.mark.parametrize("layout", ["transposed", "step"])
def test_any_strides_of_the_accumulator(layout, device) -> None:
    dy, x = inputs(17, 65, torch.float32, device)
    check(["grad_abs_sum", "grad_sq_sum"], [dy], x, acc_layout=layout)


@each_device
@pytest.mark.parametrize("name", ["grad_abs_sum", "grad_sq_sum"])
@pytest.mark.parametrize("spans", [([0, 130], [130, 150]), ([3, 40, 60], [20, 1, 0])], ids=["long", "short"])
def test_the_blocks_that_launchers_choose(spans, name, device) -> None:
    """Spans on the CPU, wherever the rest is: their mean length chooses the tokens of a step."""
    starts, lengths = map(torch.tensor, spans)
    dy, x = inputs(65, 20, torch.bfloat16, device, spans=(starts, lengths), n_tokens=280)
    acc = strided(65, 20, torch.float32, device)
    before = acc.clone()
    grad_abs_sum.accumulate_grad_statistics([(dy, {name: acc})], x, starts, lengths)
    assert_as_exact_as_torch(acc, before, reference_of(name, dy, x, starts, lengths), 150)


@pytest.mark.slow
@each_device
def test_weights_that_share_an_input_are_one_launch(device, monkeypatch) -> None:
    """Each gets the bits of a launch of its own, whatever their sizes and row strides; four take two launches."""
    launches = []
    launch = grad_abs_sum._launch
    monkeypatch.setattr(grad_abs_sum, "_launch", lambda *args: (launches.append(len(args[0])), launch(*args)))
    x = inputs(1, 70, torch.bfloat16, device)[1]
    dys = [inputs(n, 1, torch.bfloat16, device)[0] for n in (40, 1, 33, 5)]
    accs = [torch.rand(dy.shape[1], 70, device=device) for dy in dys]
    alone = [acc.clone() for acc in accs]
    spans = STARTS.to(device), LENGTHS.to(device)
    matrices = [(dy, {"grad_abs_sum": acc}) for dy, acc in zip(dys, accs, strict=True)]
    grad_abs_sum.accumulate_grad_statistics(matrices, x, *spans, shape=SMALL)
    assert launches == [3, 1]
    for dy, acc, expected in zip(dys, accs, alone, strict=True):
        grad_abs_sum.accumulate_grad_statistics([(dy, {"grad_abs_sum": expected})], x, *spans, shape=SMALL)
        assert torch.equal(acc, expected)
    check(["grad_abs_sum"], dys, x)


@each_device
def test_weights_of_different_layouts_are_launched_one_by_one(device) -> None:
    x = inputs(1, 20, torch.bfloat16, device)[1]
    dys = [inputs(9, 1, torch.bfloat16, device, (layout, "slice"))[0] for layout in ("slice", "step")]
    check(["grad_abs_sum"], dys, x)


@each_device
def test_same_bits_again_and_over_two_launches(device) -> None:
    dy, x = inputs(40, 70, torch.bfloat16, device)
    start = torch.rand(40, 70, device=device)
    spans = STARTS.to(device), LENGTHS.to(device)

    def run(*parts: slice) -> Tensor:
        acc = start.clone()
        for part in parts:
            matrices = [(dy, {"grad_abs_sum": acc})]
            grad_abs_sum.accumulate_grad_statistics(matrices, x, *(each[part] for each in spans), shape=SMALL)
        return acc

    once = run(slice(None))
    assert torch.equal(once, run(slice(None)))
    assert torch.equal(once, run(slice(0, 4), slice(4, None)))


@each_device
def test_more_examples_than_are_counted_at_a_time(device) -> None:
    lengths = torch.arange(300) % 3
    starts = lengths.cumsum(0) - lengths
    dy, x = inputs(4, 6, torch.float32, device, spans=(starts, lengths), n_tokens=300)
    check(["grad_sq_sum"], [dy], x, starts, lengths)


@each_device
@pytest.mark.parametrize("n_out, n_in, n_examples", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_nothing_to_do_leaves_the_accumulator(n_out, n_in, n_examples, device) -> None:
    spans = STARTS[:n_examples], LENGTHS[:n_examples]
    dy, x = inputs(n_out, n_in, torch.bfloat16, device, spans=spans)
    check(["grad_abs_sum"], [dy], x, *spans)


@each_device
def test_an_example_without_tokens_adds_nothing(device) -> None:
    spans = torch.tensor([5]), torch.tensor([0])
    dy, x = inputs(4, 4, torch.bfloat16, device, spans=spans)
    check(["grad_abs_sum", "grad_sum"], [dy], x, *spans)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_sizes_and_spans(device, data) -> None:
    n_tokens = data.draw(st.integers(1, 90), "tokens")
    n_out, n_in = data.draw(st.integers(1, 70), "out"), data.draw(st.integers(1, 70), "in")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), "dtype")
    spans = data.draw(
        st.lists(
            st.integers(0, n_tokens).flatmap(lambda s: st.tuples(st.just(s), st.integers(0, n_tokens - s))),
            min_size=1,
            max_size=5,
        ),
        "spans",
    )
    starts, lengths = (torch.tensor(each) for each in zip(*spans, strict=True))
    dy, x = inputs(n_out, n_in, dtype, device, spans=(starts, lengths), n_tokens=n_tokens)
    check(["grad_abs_sum"], [dy], x, starts, lengths)


@triton.jit
def _positions_kernel(visits_ptr, rows, columns):
    row, column = tile_position(tl.program_id(0), rows, columns)
    visits_ptr += row * columns + column
    tl.store(visits_ptr, tl.load(visits_ptr) + 1)


@each_device
@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 9), (9, 1), (8, 5), (19, 3)])
def test_every_tile_is_visited_once(rows, columns, device) -> None:
    visits = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    _positions_kernel[(rows * columns,)](visits, rows, columns)
    assert (visits == 1).all()


@each_device
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"acc": torch.float64}, TypeError, "acc: expected"),
        ({"x": torch.float32}, TypeError, "one dtype"),
        ({"x": torch.float64, "dy": torch.float64}, TypeError, "one dtype"),
        ({"names": ["grad_sum"]}, ValueError, "statistics"),
        ({"names": ["grad_abs_sum", "grad_sq_sum", "grad_sum"]}, ValueError, "statistics"),
        ({"names": ["act_sq_sum"]}, ValueError, "statistics"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_what_the_kernel_cannot_do_is_refused(change, error, message, device) -> None:
    dy = torch.ones(4, 3, dtype=change.get("dy", torch.bfloat16), device=device)
    x = torch.ones(4, 5, dtype=change.get("x", torch.bfloat16), device=device)
    accs = {
        name: torch.zeros(3, 5, dtype=change.get("acc", torch.float32), device=device)
        for name in change.get("names", ["grad_abs_sum"])
    }
    with pytest.raises(error, match=message):
        grad_abs_sum.accumulate_grad_statistics([(dy, accs)], x, torch.tensor([0]), torch.tensor([4]))
    assert all((acc == 0).all() for acc in accs.values())


def test_strides_that_need_wider_offsets_are_refused() -> None:
    far = torch.empty_strided((4, 3), (1 << 28, 1), dtype=torch.bfloat16, device="meta")
    near, acc = torch.ones(4, 3, dtype=torch.bfloat16), torch.zeros(3, 3)
    with pytest.raises(ValueError, match="2\\*\\*31"):
        grad_abs_sum.accumulate_grad_statistics(
            [(far, {"grad_abs_sum": acc})], near, torch.tensor([0]), torch.tensor([4])
        )
    with pytest.raises(ValueError, match="2\\*\\*31"):
        accumulate_grad_sum(acc, near, far)
    assert (acc == 0).all()


def test_accumulators_of_one_weight_have_one_layout() -> None:
    dy, x = torch.ones(4, 3, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16)
    accs = {"grad_abs_sum": torch.zeros(3, 5), "grad_sum": torch.zeros(5, 3).T}
    with pytest.raises(ValueError, match="equal strides"):
        grad_abs_sum.accumulate_grad_statistics([(dy, accs)], x, torch.tensor([0]), torch.tensor([4]))
