"""Triton kernels on a device, on layers of real models and full sets of examples (``-m gpu``).

test_kernels.py runs there too, on small and odd shapes.
"""

from __future__ import annotations

import pytest
import torch

from fastprune.ops import reference

pytest.importorskip("triton", reason="Triton has no build for this platform")

from fastprune_kernels import grad_abs_sum
from fastprune_kernels.act_sq_sum import accumulate_act_sq_sum
from fastprune_kernels.grad_sum import accumulate_grad_sum

pytestmark = pytest.mark.gpu

# (out, in): k and v of Llama-3.1-8B, its up projection, o of Qwen2.5-32B, down of Llama-70B.
LAYERS = [(1024, 4096), (14336, 4096), (5120, 5120), (8192, 28672)]
LENGTHS = {
    "short": [64] * 16,
    "medium": [250] * 8,
    "long": [1000, 1024],
    "ragged": [16, 0, 250, 1, 64, 33, 4096, 127],
}


def example_tensors(n_out, n_in, lengths, dtype):
    """Examples with a gap of NaN rows between them."""
    lengths = torch.tensor(lengths, device="cuda")
    starts = (lengths + 3).cumsum(0) - lengths
    n_tokens = int(starts[-1] + lengths[-1])
    dy, x = (torch.full((n_tokens, n), float("nan"), dtype=dtype, device="cuda") for n in (n_out, n_in))
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for tensor in (dy, x):
            tensor[start : start + length] = torch.randn(length, tensor.shape[1], device="cuda").to(dtype)
    return dy, x, starts, lengths


def relative_error(actual, expected) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("name", ["grad_abs_sum", "grad_sq_sum"])
def test_real_layers(name, lengths, layer) -> None:
    """Against float64 of the same bfloat16 inputs, on 1024 rows of the weight. Source of the bound: test_kernels.py."""
    dy, x, *spans = example_tensors(*layer, lengths, torch.bfloat16)
    acc = torch.rand(*layer, device="cuda")
    expected = acc[:1024].double()
    before = acc.clone()
    grad_abs_sum.accumulate_grad_statistics([(dy, {name: acc})], x, *spans)
    getattr(reference, f"accumulate_{name}")(expected, dy[:, :1024], x, *spans)
    assert relative_error(acc[:1024], expected) <= 2**-24 * (8 + max(lengths) / 8)
    again = before
    grad_abs_sum.accumulate_grad_statistics([(dy, {name: again})], x, *spans)
    assert torch.equal(again, acc)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "names", [("grad_abs_sum",), ("grad_abs_sum", "grad_sum"), ("grad_abs_sum", "grad_sq_sum")], ids="+".join
)
def test_other_dtypes_and_two_statistics(names, dtype) -> None:
    dy, x, starts, lengths = example_tensors(2048, 1536, LENGTHS["ragged"], dtype)
    accs = {name: torch.zeros(2048, 1536, device="cuda") for name in names}
    grad_abs_sum.accumulate_grad_statistics([(dy, accs)], x, starts, lengths)
    for name, acc in accs.items():
        expected = acc.double().zero_()
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            gradient = dy[start : start + length].double().T @ x[start : start + length].double()
            expected += {"grad_abs_sum": gradient.abs(), "grad_sq_sum": gradient.square(), "grad_sum": gradient}[name]
        assert relative_error(acc, expected) <= 2**-24 * (8 + 4096 / 8)


def test_query_key_and_value_in_one_launch() -> None:
    """The bits of three launches, at Llama-3.1-8B's sizes."""
    query, x, *spans = example_tensors(4096, 4096, LENGTHS["medium"], torch.bfloat16)
    dys = [query, *(example_tensors(1024, 1, LENGTHS["medium"], torch.bfloat16)[0] for _ in "kv")]
    together, alone = ([torch.zeros(dy.shape[1], 4096, device="cuda") for dy in dys] for _ in range(2))
    matrices = [(dy, {"grad_abs_sum": acc}) for dy, acc in zip(dys, together, strict=True)]
    grad_abs_sum.accumulate_grad_statistics(matrices, x, *spans)
    for dy, acc in zip(dys, alone, strict=True):
        grad_abs_sum.accumulate_grad_statistics([(dy, {"grad_abs_sum": acc})], x, *spans)
    assert all(map(torch.equal, together, alone))


def test_offsets_beyond_32_bits() -> None:
    """The last rows of an input of more than 2**31 elements."""
    n_tokens, n_out = 150_000, 14_400
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of device memory")
    dy = torch.zeros(n_tokens, n_out, dtype=torch.bfloat16, device="cuda")
    dy[-64:] = torch.randn(64, n_out, device="cuda")
    x = torch.randn(n_tokens, 128, device="cuda", dtype=torch.bfloat16)
    acc = torch.zeros(n_out, 128, device="cuda")
    span = torch.tensor([n_tokens - 64], device="cuda"), torch.tensor([64], device="cuda")
    grad_abs_sum.accumulate_grad_statistics([(dy, {"grad_abs_sum": acc})], x, *span)
    assert relative_error(acc, (dy[-64:].double().T @ x[-64:].double()).abs()) <= 2**-20


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_grad_sum_of_real_layers(dtype, layer) -> None:
    """10,000 tokens are two launches."""
    dy, x = (torch.randn(10_000, n, device="cuda").to(dtype) for n in layer)
    acc = torch.rand(*layer, device="cuda")
    expected = acc[:512].double() + dy[:, :512].double().T @ x.double()
    accumulate_grad_sum(acc, dy, x)
    assert relative_error(acc[:512], expected) <= 2**-24 * (8 + 8192 / 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_act_sq_sum_of_a_long_batch(dtype) -> None:
    x = torch.randn(16_384, 4096, device="cuda").to(dtype)
    acc = torch.rand(4096, device="cuda")
    expected = acc.cpu()
    accumulate_act_sq_sum(acc, x)
    reference.accumulate_act_sq_sum(expected, x.cpu())
    assert torch.equal(acc.cpu(), expected)
