"""Several sums of the same gradients in one call: each is what a call of its own gives."""

from __future__ import annotations

import pytest
import torch
from support.accumulation import BACKENDS, GOOD, LENGTHS, N_TOKENS, STARTS, arguments, error, exact

from fastprune import ops
from fastprune.errors import ArgumentError

SEVERAL = [
    ("grad_abs_sum", "grad_sum"),
    ("grad_sq_sum", "grad_sum"),
    ("grad_abs_sum", "grad_sq_sum"),
    ("grad_sq_sum", "grad_abs_sum", "grad_sum"),
    ("grad_sum",),
]


@pytest.mark.parametrize("names", SEVERAL, ids="+".join)
@pytest.mark.parametrize("shape", [(1, 1), (8, 48), (9, 50), (67, 131), (131, 67), (0, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_sums_of_the_same_gradients(backend, shape, names):
    """Absolute values and squares have the bits of a call of their own; small whole numbers show a wrong sum in any."""
    generator = torch.Generator().manual_seed(0)
    real = torch.cat([torch.arange(start, start + length) for start, length in zip(STARTS, LENGTHS, strict=True)])
    for whole in (True, False):
        if whole:
            dy, x = (torch.randint(-8, 9, (N_TOKENS, n), generator=generator).float() for n in shape)
        else:
            dy, x = (torch.randn(N_TOKENS, n, generator=generator) for n in shape)
        dy = torch.zeros_like(dy).index_copy(0, real, dy[real])  # as padding's
        start = torch.randint(0, 99, shape, generator=generator).float()
        accs = {name: start.clone() for name in names}
        ops.accumulate_gradients(accs, dy, x, STARTS, LENGTHS, backend=backend)
        for name, found in accs.items():
            args = (dy, x) if name == "grad_sum" else (dy, x, STARTS, LENGTHS)
            wanted, alone = exact(f"accumulate_{name}", start, args), start.clone()
            getattr(ops, f"accumulate_{name}")(alone, *args, backend=backend)
            assert torch.equal(found, alone) or (name == "grad_sum" and not whole)
            assert torch.equal(found.double(), wanted) if whole else error(found, wanted) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_sums_may_be_stored_input_major(backend):
    dy, x, *spans = arguments("accumulate_grad_abs_sum", 6, 9, torch.float64)
    names = ("grad_abs_sum", "grad_sq_sum")
    wide, plain = ({name: torch.zeros(9, 14) for name in names} for _ in range(2))
    ops.accumulate_gradients({name: wide[name][:, 3:9].T for name in names}, dy, x, *spans, backend=backend)
    ops.accumulate_gradients({name: plain[name][:, 3:9].T for name in names[:1]}, dy, x, *spans, backend=backend)
    ops.accumulate_gradients({name: plain[name][:, 3:9].T for name in names[1:]}, dy, x, *spans, backend=backend)
    for name in names:
        assert torch.equal(wide[name], plain[name]) and not wide[name][:, :3].any() and not wide[name][:, 9:].any()
        assert error(wide[name][:, 3:9].T, exact(f"accumulate_{name}", torch.zeros(6, 9), (dy, x, *spans))) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 5), (5, 1)], ids=str)
def test_strides_of_a_single_row_or_column_mean_nothing(backend, shape):
    dy, x, *spans = arguments("accumulate_grad_abs_sum", *shape, torch.float32)
    names, other = ("grad_abs_sum", "grad_sq_sum"), (9, 1) if shape == (1, 5) else (1, 9)
    accs = dict(zip(names, (torch.zeros(shape), torch.zeros(50).as_strided(shape, other)), strict=True))
    ops.accumulate_gradients(accs, dy, x, *spans, backend=backend)
    for name in names:
        assert error(accs[name], exact(f"accumulate_{name}", torch.zeros(shape), (dy, x, *spans))) < 1e-6


@pytest.mark.parametrize("name", ops.criteria.GRADIENT_SUMS)
def test_spans_are_checked_whatever_is_summed(name):
    acc = torch.zeros(3, 5)
    with pytest.raises(ArgumentError, match="got start 0 and length 99 for example 0"):
        ops.accumulate_gradients({name: acc}, GOOD["dy"], GOOD["x"], torch.tensor([0]), torch.tensor([99]))


@pytest.mark.parametrize(
    "accs",
    [
        {},
        {"act_sq_sum": torch.zeros(3, 5)},
        {"grad_sum": torch.zeros(3, 5), "grad_sq_sum": torch.zeros(5, 3).T},
        {"grad_sum": torch.zeros(3, 5), "grad_sq_sum": torch.zeros(3, 5, dtype=torch.float64)},
        {"grad_abs_sum": torch.zeros(3, 4), "grad_sq_sum": torch.zeros(3, 5)},
        {"grad_abs_sum": torch.zeros(3, 5), "grad_sq_sum": torch.zeros(3, 5, device="meta")},
    ],
    ids=["none", "unknown", "layouts", "dtypes", "shapes", "devices"],
)
def test_sums_that_do_not_go_together_are_refused(accs):
    args = {name: value for name, value in GOOD.items() if name != "acc"}
    with pytest.raises(ArgumentError, match="accs"):
        ops.accumulate_gradients(accs, **args)
    assert not any(acc.any() for acc in accs.values() if acc.device.type != "meta")


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension was not built")
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("names", SEVERAL[:-1], ids="+".join)
def test_threads_and_instruction_sets_change_no_bit(names, acc_dtype):
    """On a processor without AVX-512 this compares AVX2 with itself; the number of threads is still compared."""
    from fastprune import _cpp

    args, before = arguments("accumulate_grad_abs_sum", 67, 131, torch.float32), torch.get_num_threads()
    found = []
    try:
        for avx512, threads in ((True, 1), (True, 3), (False, 1), (False, 2)):
            _cpp.allow_avx512(avx512)
            torch.set_num_threads(threads)
            found.append({name: torch.ones(67, 131, dtype=acc_dtype) for name in names})
            ops.accumulate_gradients(found[-1], *args, backend="cpp")
    finally:
        _cpp.allow_avx512(True)
        torch.set_num_threads(before)
    for name in names:
        assert all(torch.equal(accs[name], found[0][name]) for accs in found)
