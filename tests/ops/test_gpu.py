"""Every operation through the waist on a device, by default and by name, against float64 and plain torch; and scoring.

Kernels on layers of real models are in test_kernels_gpu.py and test_cuda_ops_gpu.py; here stands what
:mod:`fastprune.ops` adds: routes, where the spans are, streams, devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.architectures import BENIGN, HARM, build, pad
from support.criteria import statistic_for
from torch import Tensor

import fastprune
from fastprune import ops
from fastprune.errors import BackendError
from fastprune.ops import dispatch, reference

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
PER_EXAMPLE = ["accumulate_grad_abs_sum", "accumulate_grad_sq_sum"]
SUMS = ["accumulate_grad_sum", *PER_EXAMPLE, "accumulate_act_sq_sum"]
FLOATS = [torch.bfloat16, torch.float16, torch.float32]
# Tokens in no example, an example without tokens, one of a single token, and examples that are not in order.
STARTS, LENGTHS, N_TOKENS = [260, 0, 150, 151, 3], [250, 120, 0, 1, 64], 512

each_backend = pytest.mark.parametrize("backend", [None, "torch", "triton"])
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_sum = pytest.mark.parametrize("op", SUMS)


def sum_arguments(op: str, dtype: torch.dtype, device: str = DEVICE, shape=(320, 208)) -> tuple[Tensor, ...]:
    """A start for the accumulator and the arguments after it; rows are aligned windows of larger tensors."""
    dy, x = (torch.randn(N_TOKENS + 1, n + 16).to(device, dtype)[1:, 16:] for n in shape)
    if op == "accumulate_act_sq_sum":
        return torch.rand(shape[1], device=device), x
    start = torch.rand(shape, device=device)
    if op == "accumulate_grad_sum":
        return start, dy, x
    return start, dy, x, torch.tensor(STARTS), torch.tensor(LENGTHS)


def added(op: str, start: Tensor, *args: Tensor, backend: str | None) -> Tensor:
    acc = start.clone()
    getattr(ops, op)(acc, *args, backend=backend)
    return acc


def assert_exact(op: str, found: Tensor, start: Tensor, *args: Tensor) -> None:
    """The bound of test_kernels.py: 8 roundings of float32, and one eighth a token of what tensor cores cut off."""
    exact = start.cpu().double()
    getattr(reference, op)(exact, *(arg.cpu() for arg in args))
    longest = N_TOKENS if op == "accumulate_grad_sum" else max(LENGTHS)
    error = float((found.cpu().double() - exact).norm() / exact.norm())
    assert error <= 2**-24 * (8 + longest / 8)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def test_all_backends_of_a_device_are_there() -> None:
    found = ops.available_backends()
    assert found["triton"] == found["cuda"] == "available"


@each_dtype
@each_backend
@each_sum
def test_sums_against_float64_and_twice_the_same_bits(op, backend, dtype) -> None:
    start, *args = sum_arguments(op, dtype)
    found = added(op, start, *args, backend=backend)
    assert found.device.type == DEVICE
    assert_exact(op, found, start, *args)
    assert torch.equal(added(op, start, *args, backend=backend), found)
    if op == "accumulate_act_sq_sum":
        assert torch.equal(found, added(op, start, *args, backend="torch"))


@pytest.mark.parametrize("left_out", ["none", "grad_sum", "grad_abs_sum", "grad_sq_sum"])
@each_dtype
@each_backend
def test_several_sums_in_one_call(backend, dtype, left_out) -> None:
    start, dy, x, *_ = sum_arguments("accumulate_grad_abs_sum", dtype)
    starts, lengths = torch.tensor(STARTS[:4]), torch.tensor(LENGTHS[:4])
    dy = dy.clone()
    dy[120:151], dy[152:260], dy[510:] = 0, 0, 0  # tokens of no example
    names = [name for name in ("grad_sum", "grad_abs_sum", "grad_sq_sum") if name != left_out]
    accs, again = ({name: start.clone() for name in names} for _ in range(2))
    for into in (accs, again):
        ops.accumulate_gradients(into, dy, x, starts, lengths, backend=backend)
    for name in names:
        args = (dy, x) if name == "grad_sum" else (dy, x, starts, lengths)
        assert_exact(f"accumulate_{name}", accs[name], start, *args)
        assert torch.equal(accs[name], again[name])


@each_sum
def test_the_default_is_the_kernel_that_is_meant(op) -> None:
    """Bits tell the routes apart, and ``choose`` names them."""
    start, *args = sum_arguments(op, torch.bfloat16)
    cublas = op == "accumulate_grad_sum" and reference.forms_float32(start.device, torch.bfloat16)
    expected = "torch" if cublas else "triton"
    assert torch.equal(added(op, start, *args, backend=None), added(op, start, *args, backend=expected))
    assert cublas or dispatch.choose(None, op, start, *args[:2]) == "triton"


@pytest.mark.parametrize("op", PER_EXAMPLE)
@each_dtype
def test_spans_on_the_device_give_the_same_bits(op, dtype) -> None:
    start, dy, x, *spans = sum_arguments(op, dtype)
    on_device = [span.to(DEVICE) for span in spans]
    for backend in ("torch", "triton"):
        found = added(op, start, dy, x, *on_device, backend=backend)
        assert torch.equal(found, added(op, start, dy, x, *spans, backend=backend))


@pytest.mark.parametrize("op", PER_EXAMPLE)
def test_input_major_accumulators(op) -> None:
    start, *args = sum_arguments(op, torch.bfloat16)
    acc = start.T.contiguous().T
    getattr(ops, op)(acc, *args)
    assert_exact(op, acc, start, *args)


@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@each_sum
def test_float64_goes_to_torch_unless_triton_is_named(op, acc_dtype) -> None:
    start, *args = sum_arguments(op, torch.float64)
    start = start.to(acc_dtype)
    found = added(op, start, *args, backend=None)
    assert_exact(op, found, start, *args)
    with pytest.raises(BackendError, match=r"backend 'triton' takes .* got float64"):
        added(op, start, *args, backend="triton")


@pytest.mark.parametrize("op", PER_EXAMPLE)
def test_nothing_waits_for_the_device_where_the_spans_are_on_the_cpu(op) -> None:
    start, *args = sum_arguments(op, torch.bfloat16)
    added(op, start, *args, backend=None)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = added(op, start, *args, backend=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_exact(op, found, start, *args)


@each_sum
def test_sums_are_queued_on_the_current_stream(op) -> None:
    start, *args = sum_arguments(op, torch.bfloat16)
    # Contiguous, as `late` is: for other strides cuBLAS may choose a kernel that rounds differently.
    expected = added(op, start, args[0].contiguous(), *args[1:], backend=None)
    acc, late = torch.zeros_like(start), torch.zeros_like(args[0], memory_format=torch.contiguous_format)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s, in which another stream would find zeros
        late.copy_(args[0])
        acc.copy_(start)
        getattr(ops, op)(acc, late, *args[1:])
    torch.cuda.synchronize()
    assert torch.equal(acc, expected)


def selection_arguments(dtype: torch.dtype, device: str = DEVICE) -> tuple[Tensor, Tensor]:
    return (torch.randn(300, 517) * 0.02).to(device, dtype), torch.randn(300, 517).to(device)


def check_selection(backend: str | None, dtype: torch.dtype, device: str = DEVICE) -> None:
    """Selection, apply and restore on a device give the bits of the reference on the CPU."""
    weight, statistic = selection_arguments(dtype, device)
    before = weight.clone().cpu()
    for criterion in ops.CRITERIA:
        given = statistic_for(criterion, statistic)
        found = ops.top_scores(weight, given, criterion, 700, backend=backend)
        wanted = reference.top_scores(before, None if given is None else given.cpu(), criterion, 700)
        assert all(each.device == weight.device for each in found)
        assert torch.equal(found[0].cpu(), wanted[0]) and torch.equal(bits(found[1].cpu()), bits(wanted[1]))
    indices = found[0]
    for scale in (0.0, -0.3):
        expected = before.clone()
        old = ops.apply_sparse_(weight, indices, scale, backend=backend)
        reference.apply_sparse_(expected.view(-1), indices.cpu(), scale)
        assert torch.equal(bits(weight.cpu()), bits(expected))
        assert torch.equal(bits(old.cpu()), bits(before.view(-1)[indices.cpu()]))
        ops.restore_sparse_(weight, indices, old, backend=backend)
        assert torch.equal(bits(weight.cpu()), bits(before))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("backend", [None, "torch", "cuda"])
def test_selection_and_sparse_writes_have_the_bits_of_the_reference(backend, dtype) -> None:
    check_selection(backend, dtype)


def test_sparse_writes_to_a_strided_parameter() -> None:
    weight = torch.nn.Parameter(torch.randn(60, 40, device=DEVICE).T)
    before, indices = weight.detach().clone(), torch.randperm(2400)[:900].to(DEVICE)
    loss = (weight * weight).sum()
    old = ops.apply_sparse_(weight, indices)
    assert not weight.detach().reshape(-1)[indices].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    ops.restore_sparse_(weight, indices, old)
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize(("backend", "op"), [("cuda", "accumulate_grad_abs_sum"), ("cpp", "accumulate_grad_sum")])
def test_backends_without_the_operation_or_the_device_refuse(backend, op) -> None:
    start, *args = sum_arguments(op, torch.bfloat16)
    with pytest.raises(
        BackendError, match=f"backend '{backend}' (has no {op}|works on CPU tensors, got one on cuda:0)"
    ):
        added(op, start, *args, backend=backend)
    with pytest.raises(BackendError, match="backend 'triton' has no top_scores"):
        ops.top_scores(start, None, "magnitude", 3, backend="triton")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    for op in SUMS:
        for dtype in FLOATS:
            start, *args = sum_arguments(op, dtype, "cuda:1")
            for backend in (None, "torch", "triton"):
                assert_exact(op, added(op, start, *args, backend=backend), start, *args)
    for backend in (None, "torch", "cuda"):
        check_selection(backend, torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0


# Whole scoring. Llama is plain, GPT-2 stores its weights input-major, Gemma 2 has sliding windows and soft-caps.

ROLES = {"harm": ("signed", "wanda"), "benign": ("abs", "fisher")}


@functools.cache
def scored(name: str, device: str, segments: int) -> fastprune.Scores:
    """All scores of a tiny model, kept whole."""
    model = build(name).to(device)
    return fastprune.score(
        model, [pad(HARM, "left")], [pad(BENIGN, "right")], **ROLES, p_max=1, q_max=1, segments=segments, progress=False
    )


def dense(kept) -> Tensor:
    """Scores by flat index."""
    return torch.zeros(kept.numel, dtype=torch.float64).scatter_(0, kept.indices, kept.values.double())


def for_each_matrix(name: str, segments: int, check: Callable[[Tensor, Tensor], None]) -> None:
    on_cpu, on_device = scored(name, "cpu", 1), scored(name, DEVICE, segments)
    for role, criteria in ROLES.items():
        for criterion in criteria:
            theirs = on_device.of(role, criterion)
            for matrix, kept in on_cpu.of(role, criterion).items():
                check(dense(kept), dense(theirs[matrix]))


each_model = pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
each_segmentation = pytest.mark.parametrize("segments", [1, 3])


@each_segmentation
@each_model
def test_scores_of_a_device_are_those_of_the_cpu(name, segments) -> None:
    """Norm-wise; float32 on either side is within 1e-5 of float64 (test_engine.py), squares within twice that."""

    def check(expected: Tensor, found: Tensor) -> None:
        assert float((found - expected).norm() / expected.norm()) <= 4e-5

    for_each_matrix(name, segments, check)


@each_segmentation
@each_model
def test_pruned_sets_of_a_device_are_those_of_the_cpu(name, segments) -> None:
    """Equal but for weights whose score is within the two roundings of the threshold; few are."""

    def check(expected: Tensor, found: Tensor) -> None:
        k = len(expected) // 50
        theirs, ours = (set(scores.topk(k).indices.tolist()) for scores in (expected, found))
        threshold, slack = float(expected.topk(k).values[-1]), 1e-5 * float(expected.norm()) / len(expected) ** 0.5
        # Norm-wise 4e-5 bounds the root mean square of the differences; a single one may be some times larger.
        assert all(abs(float(expected[i]) - threshold) <= 10 * 4 * slack for i in theirs ^ ours)
        assert len(theirs ^ ours) <= 2

    for_each_matrix(name, segments, check)
    masks = [scored(name, device, count).select(0.05, 0.02) for device, count in (("cpu", 1), (DEVICE, segments))]
    assert masks[0].jaccard(masks[1]) >= 0.98
    model = build(name).to(DEVICE)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with masks[1].applied(model):
        for matrix, indices in masks[1].items():
            assert not model.get_parameter(matrix).detach().reshape(-1)[indices.to(DEVICE)].any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
