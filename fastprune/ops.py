"""The narrow waist between fastprune and whatever does its arithmetic.

Every function checks its arguments, then serves them from a backend: ``torch`` (any device), ``cpp`` (the compiled
extension, CPU), ``triton`` and ``cuda`` (GPU kernels, not in this version). ``backend=None`` takes the best one that is
available for the tensors' device; a backend that is named never falls back. The same input gives the same bits from run
to run; selection and sparse writes give the same bits on every backend. Nothing here knows models, files or masks.

Accumulators are float32 or float64 and are added to in place; ``dy`` and ``x`` are converted to that dtype before the
product. A product that goes through BLAS (``accumulate_grad_sum``, and the other two in plain torch, or where the
processor has neither AVX2 nor AVX-512) may differ with the number of threads, norm-wise by 1e-6.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fastprune import checks, cpu, reference
from fastprune.errors import ArgumentError, BackendError

CRITERIA = reference.CRITERIA
BACKENDS = ("torch", "cpp", "triton", "cuda")


def available_backends() -> dict[str, str]:
    """What can serve the operations here: backend name -> ``"available"``, or the reason why not."""
    gpu = "no CUDA device" if not torch.cuda.is_available() else "this version of fastprune has no GPU kernels"
    return {"torch": "available", "cpp": _extension(), "triton": gpu, "cuda": gpu}


def accumulate_grad_sum(acc: Tensor, dy: Tensor, x: Tensor, *, backend: str | None = None) -> None:
    """Add the gradient of a Linear's weight, ``dy.T @ x``, summed over all tokens.

    Args:
        acc: ``(out, in)`` float32 or float64, changed in place.
        dy: ``(n_tokens, out)`` gradients of the outputs, any float dtype, may be strided.
        x: ``(n_tokens, in)`` inputs, of the dtype of ``dy``, may be strided.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    with torch.no_grad():
        acc, dy, x = checks.check_product(acc, dy, x)
        _choose(backend, acc)  # a plain product is BLAS on every backend
        acc.addmm_(dy.to(acc.dtype).T, x.to(acc.dtype))


def accumulate_grad_abs_sum(
    acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, *, backend: str | None = None
) -> None:
    """Add ``sum_i |dy_i.T @ x_i|``, the absolute gradient of each example i.

    Args:
        acc: ``(out, in)`` float32 or float64, changed in place.
        dy: ``(n_tokens, out)`` gradients of the outputs, any float dtype, may be strided. The weight of each example's
            loss is already in it.
        x: ``(n_tokens, in)`` inputs, of the dtype of ``dy``, may be strided.
        starts: int64 ``(n_examples,)``, first token of each example; an example of length 0 adds nothing.
        lengths: int64 ``(n_examples,)``, tokens of each example.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one.

    Raises:
        ArgumentError: Shapes, dtypes, devices or token ranges do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    _accumulate_per_example(acc, dy, x, starts, lengths, backend, square=False)


def accumulate_grad_sq_sum(
    acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, *, backend: str | None = None
) -> None:
    """Add ``sum_i (dy_i.T @ x_i)**2``, the squared gradient of each example i.

    The result is the diagonal of the empirical Fisher matrix. Arguments and errors are those of
    :func:`accumulate_grad_abs_sum`.
    """
    _accumulate_per_example(acc, dy, x, starts, lengths, backend, square=True)


def accumulate_act_sq_sum(acc: Tensor, x: Tensor, *, backend: str | None = None) -> None:
    """Add the sum over tokens of the squared inputs, ``acc[j] += sum_t x[t, j]**2``, formed in float64.

    Args:
        acc: ``(in,)`` float32 or float64, changed in place.
        x: ``(n_tokens, in)`` inputs, any float dtype, may be strided.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All give the same bits.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    checks.check_accumulator(acc, dims=1)
    checks.check_float("x", x, like=acc)
    if x.dim() != 2 or x.shape[1] != acc.shape[0]:
        raise ArgumentError(f"x: expected (n_tokens, {acc.shape[0]}) to fit acc, got {tuple(x.shape)}")
    with torch.no_grad():
        match _choose(backend, acc):
            case "torch":
                reference.accumulate_act_sq_sum(acc, x)
            case "cpp":
                cpu.accumulate_act_sq_sum(acc, x)


def top_scores(
    weight: Tensor, statistic: Tensor | None, criterion: str, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Select the k weights with the highest scores.

    Args:
        weight: ``(rows, cols)``, any float dtype, may be strided.
        statistic: float32 or float64 of the weight's shape; for ``wanda`` broadcastable to it (``(cols,)`` for a
            Linear, ``(rows, 1)`` for a Conv1D); ``None`` for ``magnitude``.
        criterion: One of :data:`CRITERIA`; :func:`fastprune.reference.form_scores` has the formulas.
        k: How many; all of them if the weight has fewer.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All give the same bits.

    Returns:
        ``indices`` int64 ``(k,)``, flat in row-major order, and ``values`` float32 ``(k,)``, on the weight's device, by
        descending score, ties by ascending index. A score of -0 counts and is returned as 0.

    Raises:
        ArgumentError: Shapes, dtypes, devices, criterion or k do not fit.
        BackendError: The backend that was asked for cannot serve.
        ScoringError: A score is not a number; the message names the first flat index.
    """
    k = checks.check_scores(weight, statistic, criterion, k)
    match _choose(backend, weight):
        case "cpp":
            return cpu.top_scores(weight, statistic, criterion, k)
        case _:
            return reference.top_scores(weight, statistic, criterion, k)


def apply_sparse_(weight: Tensor, indices: Tensor, scale: float = 0.0, *, backend: str | None = None) -> Tensor:
    """Multiply some weights by ``scale`` in place.

    Args:
        weight: Any float dtype and shape, may be strided; a parameter that requires a gradient is allowed.
        indices: int64 ``(n,)``, flat in row-major order of the weight's shape, on its device.
        scale: 0 writes +0 whatever stood there; else the product is formed in float32 (float64 for a float64 weight)
            and rounded.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All give the same bits.

    Returns:
        The old values ``(n,)`` in the weight's dtype, for :func:`restore_sparse_`.

    Raises:
        ArgumentError: Indices out of range, a scale that is not finite, or a weight whose elements share memory.
        BackendError: The backend that was asked for cannot serve.
    """
    if not math.isfinite(scale):
        raise ArgumentError(f"scale: expected a finite number, got {scale}")
    with torch.no_grad():
        elements, offsets = checks.check_elements(weight, indices)
        match _choose(backend, weight):
            case "cpp":
                return cpu.apply_sparse_(elements, offsets, scale)
            case _:
                return reference.apply_sparse_(elements, offsets, scale)


def restore_sparse_(weight: Tensor, indices: Tensor, old: Tensor, *, backend: str | None = None) -> None:
    """Write back what :func:`apply_sparse_` returned, bit by bit.

    Args:
        weight: As for :func:`apply_sparse_`.
        indices: As for :func:`apply_sparse_`.
        old: ``(n,)`` in the weight's dtype, on its device.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All give the same bits.

    Raises:
        ArgumentError: Shapes, dtypes, devices or indices do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    if old.dtype != weight.dtype or old.shape != indices.shape or old.device != weight.device:
        raise ArgumentError(
            f"old: expected {weight.dtype} {tuple(indices.shape)} on {weight.device}, as apply_sparse_ returned it, "
            f"got {old.dtype} {tuple(old.shape)} on {old.device}"
        )
    with torch.no_grad():
        elements, offsets = checks.check_elements(weight, indices)
        match _choose(backend, weight):
            case "cpp":
                cpu.restore_sparse_(elements, offsets, old.detach())
            case _:
                reference.restore_sparse_(elements, offsets, old.detach())


def _accumulate_per_example(
    acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, backend: str | None, *, square: bool
) -> None:
    with torch.no_grad():
        acc, dy, x = checks.check_product(acc, dy, x)
        spans = checks.check_spans(starts, lengths, len(x))
        if _choose(backend, acc) == "cpp" and cpu.has_gradient_kernel():
            cpu.accumulate_per_example(acc, dy, x, spans, square=square)
        elif square:
            reference.accumulate_grad_sq_sum(acc, dy, x, starts, lengths)
        else:
            reference.accumulate_grad_abs_sum(acc, dy, x, starts, lengths)


@functools.cache
def _extension() -> str:
    try:
        from fastprune import _cpp  # noqa: F401
    except ImportError as error:
        return f"the C++ extension was not built or cannot be loaded ({error}); installing with a compiler builds it"
    return "available"


def _choose(backend: str | None, tensor: Tensor) -> str:
    if backend is None:
        return "cpp" if tensor.device.type == "cpu" and _extension() == "available" else "torch"
    if backend not in BACKENDS:
        raise ArgumentError(f"backend: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")
    reason = available_backends()[backend]
    if reason != "available":
        raise BackendError(f"backend {backend!r} is not available: {reason}")
    if backend == "cpp" and tensor.device.type != "cpu":
        raise BackendError(f"backend 'cpp' works on CPU tensors, got one on {tensor.device}")
    return backend
