"""Which backend serves what, and what a named one says when it cannot.

No device is needed: availability is pretended, and device tensors are torch's fake ones (a device and no memory).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.architectures import BENIGN, HARM, build, pad
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastprune
from fastprune import ops
from fastprune.errors import ArgumentError, BackendError
from fastprune.ops import cuda, dispatch, memory, reference

PER_EXAMPLE = ["accumulate_grad_abs_sum", "accumulate_grad_sq_sum"]
SUMS = ["accumulate_grad_sum", *PER_EXAMPLE, "accumulate_gradients", "accumulate_act_sq_sum"]
SELECTION = ["top_scores", "apply_sparse_", "restore_sparse_"]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine where everything is available; the dictionary says what is not."""
    triton = pytest.importorskip("fastprune.ops.triton", reason="Triton has no build for this platform")
    missing: dict[str, str] = {}
    monkeypatch.setattr(dispatch, "status", lambda name: missing.get(name, "available"))
    monkeypatch.setattr(dispatch, "_too_old", lambda device: device == 1)
    monkeypatch.setattr(triton, "INTERPRETED", False)
    for check in ("check_held", "check_apart"):  # fake tensors have no memory to look at
        monkeypatch.setattr(memory, check, lambda *tensors: None)
    monkeypatch.setattr(reference, "forms_float32", lambda device, dtype: device.type == "cuda" and dtype.itemsize == 2)
    return missing


def fake(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cuda:0") -> Tensor:
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


def tensors(operation: str, device: str, dtype: torch.dtype, acc_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What ``choose`` is given for an operation."""
    dy, x = (fake(7, n, dtype=dtype, device=device) for n in (3, 5))
    if operation in SELECTION:
        return (fake(3, 5, dtype=dtype, device=device),)
    if operation == "accumulate_act_sq_sum":
        return fake(5, dtype=acc_dtype, device=device), x
    return fake(3, 5, dtype=acc_dtype, device=device), dy, x


def chosen(operation, device, *, dtype=torch.bfloat16, acc=torch.float32, backend=None) -> str:
    return dispatch.choose(backend, operation, *tensors(operation, device, dtype, acc))


@pytest.mark.parametrize("operation", [*SUMS, *SELECTION])
def test_the_best_backend_of_each_operation(operation, gpu) -> None:
    best = "triton" if operation in SUMS else "cuda"
    assert chosen(operation, "cuda:0") == best
    assert chosen(operation, "cpu") == "cpp"
    assert chosen(operation, "xpu:0") == "torch"
    gpu.update({best: "gone", "cpp": "gone"})
    assert chosen(operation, "cuda:0") == chosen(operation, "cpu") == "torch"


@pytest.mark.parametrize("operation", SUMS)
def test_torch_serves_what_the_triton_kernels_do_not_take(operation, gpu) -> None:
    assert chosen(operation, "cuda:0", dtype=torch.float32) == "triton"
    assert chosen(operation, "cuda:0", dtype=torch.float64) == "torch"
    assert chosen(operation, "cuda:0", dtype=torch.float64, acc=torch.float64) == "torch"
    wide = "triton" if operation == "accumulate_act_sq_sum" else "torch"  # that kernel sums in float64 anyway
    assert chosen(operation, "cuda:0", acc=torch.float64) == wide


def test_torch_serves_an_old_device_beside_a_new_one_and_huge_matrices(gpu) -> None:
    assert chosen("accumulate_grad_abs_sum", "cuda:1") == chosen("top_scores", "cuda:1") == "torch"
    assert dispatch.choose(None, "top_scores", fake(1 << 16, 1 << 16)) == "torch"
    assert dispatch.choose(None, "top_scores", fake((1 << 16) - 1, 1 << 16)) == "cuda"
    assert dispatch.choose(None, "apply_sparse_", fake(1 << 16, 1 << 16)) == "cuda"


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_torch_serves_strides_that_the_triton_kernels_do_not_take(name, gpu) -> None:
    with FakeTensorMode():
        far = torch.empty_strided((4, 3), (1 << 24, 1), dtype=torch.bfloat16, device="cuda")
    near, acc = fake(4, 5, dtype=torch.bfloat16), fake(3, 5)
    assert dispatch.choose(None, name, acc, far, near) == "torch"
    with pytest.raises(BackendError, match=r"'triton' takes tensors of which 256 rows .* got strides \(16777216, 1\)"):
        dispatch.choose("triton", name, acc, far, near)


@pytest.mark.parametrize(
    ("backend", "operation", "changes", "message"),
    [
        ("triton", "top_scores", {}, "'triton' has no top_scores; there are torch, cpp, cuda"),
        ("triton", "apply_sparse_", {}, "'triton' has no apply_sparse_; there are torch, cpp, cuda"),
        ("cuda", "accumulate_grad_abs_sum", {}, "'cuda' has no accumulate_grad_abs_sum; there are torch, cpp, triton"),
        ("cuda", "accumulate_grad_sum", {}, "'cuda' has no accumulate_grad_sum; there are torch, cpp, triton"),
        ("cpp", "accumulate_grad_sum", {}, "'cpp' works on CPU tensors, got one on cuda:0"),
        ("cpp", "top_scores", {}, "'cpp' works on CPU tensors, got one on cuda:0"),
        ("cuda", "top_scores", {"device": "cpu"}, "'cuda' works on CUDA tensors, got one on cpu"),
        ("cuda", "restore_sparse_", {"device": "cuda:1"}, "'cuda' needs compute capability 8.0 or higher, cuda:1 has"),
        ("triton", "accumulate_act_sq_sum", {"device": "cpu"}, "'triton' works on CUDA tensors, got one on cpu"),
        (
            "triton",
            "accumulate_grad_sq_sum",
            {"dtype": torch.float64},
            "'triton' takes inputs of bfloat16, float16 or float32, got float64",
        ),
        (
            "triton",
            "accumulate_act_sq_sum",
            {"dtype": torch.float64},
            "'triton' takes inputs of bfloat16, float16 or float32, got float64",
        ),
        (
            "triton",
            "accumulate_grad_sum",
            {"acc": torch.float64},
            "'triton' takes float32 accumulators for accumulate_grad_sum, got float64",
        ),
    ],
)
def test_a_named_backend_says_why_it_cannot_serve(backend, operation, changes, message, gpu) -> None:
    device = changes.pop("device", "cuda:0")
    with pytest.raises(BackendError) as raised:
        chosen(operation, device, backend=backend, **changes)
    assert str(raised.value).startswith(f"backend {message}")


def test_a_named_backend_that_is_missing_gives_its_reason(gpu) -> None:
    gpu.update({"triton": "no CUDA device", "cuda": "the CUDA extension was not built"})
    with pytest.raises(BackendError, match=r"^backend 'triton' is not available: no CUDA device$"):
        chosen("accumulate_grad_sum", "cuda:0", backend="triton")
    with pytest.raises(BackendError, match=r"^backend 'cuda' is not available: the CUDA extension was not built$"):
        chosen("top_scores", "cuda:0", backend="cuda")


def test_a_matrix_too_large_for_cuda_is_refused_by_name(gpu) -> None:
    with pytest.raises(
        BackendError, match=r"'cuda' selects from matrices of fewer than 2\^32 weights, got one of 4294"
    ):
        dispatch.choose("cuda", "top_scores", fake(1 << 16, 1 << 16))


def test_interpreted_kernels_take_cpu_tensors_by_name_only(gpu, monkeypatch) -> None:
    from fastprune.ops import triton

    monkeypatch.setattr(triton, "INTERPRETED", True)
    assert chosen("accumulate_grad_abs_sum", "cpu", backend="triton") == "triton"
    assert chosen("accumulate_grad_abs_sum", "cpu") == "cpp"
    assert chosen("accumulate_grad_abs_sum", "cuda:0") == "torch"
    with pytest.raises(BackendError, match="'triton' is interpreted and works on CPU tensors, got one on cuda:0"):
        chosen("accumulate_grad_abs_sum", "cuda:0", backend="triton")


@pytest.mark.parametrize(
    ("cublas", "dtype", "acc", "expected"),
    [
        (True, torch.bfloat16, torch.float32, "torch"),
        (False, torch.bfloat16, torch.float32, "triton"),
        (False, torch.float16, torch.float32, "triton"),
        (False, torch.float32, torch.float32, "torch"),
        (False, torch.float64, torch.float64, "torch"),
        (False, torch.bfloat16, torch.float64, "torch"),
        (True, torch.bfloat16, torch.float64, "torch"),
    ],
)
def test_a_plain_sum_is_torchs_unless_it_would_convert_16_bit_inputs(cublas, dtype, acc, expected, gpu, monkeypatch):
    from fastprune.ops import triton

    called = []
    monkeypatch.setattr(reference, "forms_float32", lambda device, dtype: cublas and dtype.itemsize == 2)
    monkeypatch.setattr(triton, "accumulate_grad_sum", lambda *args: called.append("triton"))
    monkeypatch.setattr(reference, "add_product_", lambda *args: called.append("torch"))
    ops.accumulate_grad_sum(*tensors("accumulate_grad_sum", "cuda:0", dtype, acc))
    assert called == [expected]
    called.clear()
    for backend in ("torch", "triton") if acc == torch.float32 else ("torch",):
        ops.accumulate_grad_sum(*tensors("accumulate_grad_sum", "cuda:0", dtype, acc), backend=backend)
        assert called.pop() == backend


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_per_example_sums_of_device_tensors_go_to_triton(name, gpu, monkeypatch) -> None:
    from fastprune.ops import triton

    called = []
    monkeypatch.setattr(triton, "accumulate_per_example", lambda accs, dy, x, spans: called.append((spans, *accs)))
    getattr(ops, name)(
        *tensors(name, "cuda:0", torch.bfloat16, torch.float32), *map(torch.tensor, ([5, 3, 0], [2, 0, 1]))
    )
    assert called == [([(5, 7), (0, 1)], name.removeprefix("accumulate_"))]


def test_of_three_sums_the_plain_one_is_a_product_of_its_own(gpu, monkeypatch) -> None:
    """Two go through one sweep of the kernel; three tiles beside the product would not fit in its registers."""
    from fastprune.ops import triton

    called = []
    monkeypatch.setattr(triton, "accumulate_per_example", lambda accs, dy, x, spans: called.append(set(accs)))
    monkeypatch.setattr(reference, "add_product_", lambda acc, dy, x: called.append("product"))
    acc, dy, x = tensors("accumulate_gradients", "cuda:0", torch.bfloat16, torch.float32)
    one, two, three = ("grad_sum", "grad_abs_sum", "grad_sq_sum")
    for names in ((one, two), (two, three), (one, two, three)):
        ops.accumulate_gradients(dict.fromkeys(names, acc), dy, x, torch.tensor([0]), torch.tensor([2]))
    assert called == [{one, two}, {two, three}, "product", {two, three}]


def test_sums_of_squares_of_device_tensors_go_to_triton(gpu, monkeypatch) -> None:
    from fastprune.ops import triton

    called = []
    monkeypatch.setattr(triton, "accumulate_act_sq_sum", lambda acc, x: called.append((acc.shape, x.shape)))
    ops.accumulate_act_sq_sum(*tensors("accumulate_act_sq_sum", "cuda:0", torch.bfloat16, torch.float32))
    assert called == [((5,), (7, 5))]


def test_selection_and_sparse_writes_go_to_the_launchers_of_cuda(monkeypatch) -> None:
    """The plain functions stand in for the kernels, which test_cuda_emulated.py and test_cuda_ops_gpu.py run."""
    called, launchers = [], ["top_scores_of_each", "apply_sparse_each_", "restore_sparse_each_"]
    for name in launchers:

        def launcher(*args, name=name):
            called.append(name)
            return getattr(reference, name)(*args)

        monkeypatch.setattr(cuda, name, launcher)
    monkeypatch.setattr(dispatch, "choose", lambda backend, operation, *tensors: "cuda")
    weight = torch.randn(4, 6).T
    before = weight.clone()
    indices, _ = ops.top_scores(weight, None, "magnitude", 5)
    old = ops.apply_sparse_(weight, indices, 0.0)
    assert torch.equal(weight.reshape(-1)[indices], torch.zeros(5))
    ops.restore_sparse_(weight, indices, old)
    assert torch.equal(weight, before) and called == launchers


def test_a_name_that_is_no_backend_is_refused() -> None:
    with pytest.raises(ArgumentError, match="backend: expected one of torch, cpp, triton, cuda or None, got 'gpu'"):
        ops.accumulate_act_sq_sum(torch.zeros(3), torch.ones(2, 3), backend="gpu")


@pytest.mark.parametrize(("backend", "missing"), [("triton", "top_scores"), ("cuda", "accumulate_grad_abs_sum")])
def test_scoring_refuses_a_backend_that_serves_only_a_part_of_it_before_any_work(backend, missing) -> None:
    def loader():
        raise AssertionError("no data may be read")
        yield

    with pytest.raises(BackendError, match=f"backend '{backend}' has no {missing}; there are .*; None takes the best"):
        fastprune.score(build("Llama"), loader(), loader(), backend=backend)


def test_scoring_refuses_a_backend_that_is_missing_before_any_work(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "status", lambda name: "not built" if name == "cpp" else "available")
    with pytest.raises(BackendError, match=r"^backend 'cpp' is not available: not built$"):
        fastprune.score(build("Llama"), iter(()), backend="cpp")


def reasons(script: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_reasons_without_a_device_and_what_import_does_not_import() -> None:
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    script = """
import sys, fastprune, fastprune.ops
assert not {"triton", "fastprune._cuda", "fastprune.ops.triton"} & set(sys.modules)
found = fastprune.available_backends()
assert list(found) == ["torch", "cpp", "triton", "cuda"] and found["torch"] == "available"
assert found["cuda"] == "no CUDA device" or "CUDA extension was not built or cannot be loaded" in found["cuda"]
print(found["triton"])
"""
    assert reasons(script, TRITON_INTERPRET="0") == "no CUDA device\n"
    assert reasons(script, TRITON_INTERPRET="1") == "available\n"


def test_reasons_without_triton_and_without_the_extension() -> None:
    script = """
import sys
sys.modules["triton"] = sys.modules["fastprune._cuda"] = None
import fastprune
print(*fastprune.available_backends().values(), sep="\\n")
"""
    lines = reasons(script).splitlines()
    assert lines[2].startswith("triton is not installed or cannot be loaded (")
    assert lines[3].startswith("the CUDA extension was not built or cannot be loaded (")


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        ([], "no CUDA device"),
        ([(7, 5)], "no CUDA device of compute capability 8.0 or higher"),
        ([(7, 5), (8, 0)], "available"),
    ],
)
def test_reasons_of_devices(capabilities, reason, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "_too_old", dispatch._too_old.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert dispatch._devices() == reason


def _wrapped(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def _in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile(backend="eager")
    return model


def _blocks(model: torch.nn.Module) -> torch.nn.Module:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("error::fastprune.FastpruneWarning")  # scored block by block, as the plain model is
@pytest.mark.parametrize("compiled", [_wrapped, _in_place, _blocks])
def test_a_compiled_model_is_scored_as_the_model_itself(compiled) -> None:
    """The ops write in place through addresses, from hooks; neither may end up inside of what is compiled."""
    batches = [pad(HARM, "right")], [pad(BENIGN, "right")]
    plain = fastprune.score(build("Llama"), *batches, progress=False).select(0.05, 0.02)
    found = fastprune.score(compiled(build("Llama")), *batches, progress=False).select(0.05, 0.02)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda t, ends: ops.accumulate_grad_sum([1.0], t, t), "acc"),
        (lambda t, ends: ops.accumulate_grad_sum(t.clone(), [1.0], t), "dy"),
        (lambda t, ends: ops.accumulate_grad_abs_sum(t.clone(), t, t, [0], ends), "starts"),
        (lambda t, ends: ops.accumulate_gradients({"grad_sum": 3}, t, t, ends, ends), "accs"),
        (lambda t, ends: ops.accumulate_act_sq_sum(None, t), "acc"),
        (lambda t, ends: ops.top_scores(t, [1.0], "abs", 3), "statistic"),
        (lambda t, ends: ops.apply_sparse_(t, [0, 1], 0.0), "indices"),
        (lambda t, ends: ops.restore_sparse_(t, ends, [1.0]), "old"),
        (lambda t, ends: ops.restore_sparse_(t, [0], t), "indices"),
    ],
)
def test_what_is_no_tensor_is_named(call, argument: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^{argument}\b.*expected a tensor, got (list|int|NoneType)"):
        call(torch.ones(3, 3), torch.tensor([0, 3]))
