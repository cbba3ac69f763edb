"""The numerical operations: one function for each, served by one of several backends.

Every function checks its arguments and calls a backend: ``torch`` (any device), ``cpp`` (the compiled extension, CPU),
``triton`` (kernels for sums, GPU) or ``cuda`` (kernels for selection and sparse writes, GPU). ``backend=None`` selects
the best backend that can serve the call; a named backend never falls back to another one. Results are bit-identical
from run to run. Those of selection and sparse writes are also bit-identical across backends.

Accumulators are float32 or float64 and are updated in place. Products are formed in that dtype; 16-bit inputs may be
multiplied as they are and summed in it. ``triton`` forms a float32 product from three TF32 products, which leaves out
2^-21 of it. Products that go through BLAS (``accumulate_grad_sum``, and the others in plain torch or on a processor
without AVX2 and AVX-512) may depend on the number of threads and on the alignment of the inputs, norm-wise by 1e-6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from types import ModuleType

import torch
from torch import Tensor

from fastprune.errors import ArgumentError
from fastprune.ops import cpp, criteria, dispatch, memory, reference, validate

CRITERIA = tuple(criteria.CRITERIA)
BACKENDS = dispatch.BACKENDS


def available_backends() -> dict[str, str]:
    """Backend name -> ``"available"``, or the reason why the backend cannot be used in this process."""
    return {name: dispatch.status(name) for name in BACKENDS}


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
        acc, dy, x = validate.check_product(acc, dy, x)
        memory.check_apart({"": acc}, {"dy": dy, "x": x})
        # BLAS wherever it accepts the inputs as they are: without examples to keep apart, a kernel of our own saves
        # nothing. Where torch would convert 16-bit inputs first (a fifteenth of the rate by an H100's data sheet),
        # kernels/grad_sum.py serves. Torch uses TF32 only if the process has enabled it for the model.
        if backend is None and reference.takes_as_they_are(acc, dy):
            backend = "torch"
        match dispatch.choose(backend, "accumulate_grad_sum", acc, dy, x):
            case "triton":
                from fastprune.ops import triton

                triton.accumulate_grad_sum(acc, dy, x)
            case _:  # BLAS on every other backend
                reference.add_product_(acc, dy, x)


def accumulate_grad_abs_sum(
    acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, *, backend: str | None = None
) -> None:
    """Add ``sum_i |dy_i.T @ x_i|``, the absolute gradient of each example i.

    Args:
        acc: ``(out, in)`` float32 or float64, changed in place.
        dy: ``(n_tokens, out)`` gradients of the outputs, any float dtype, may be strided. The weight of each example's
            loss is already in it.
        x: ``(n_tokens, in)`` inputs, of the dtype of ``dy``, may be strided.
        starts: int64 ``(n_examples,)``, first token of each example; an example of length 0 adds nothing. On the CPU,
            or on any device at the cost of a synchronization.
        lengths: int64 ``(n_examples,)``, tokens of each example; on the CPU or on a device, as ``starts``.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one.

    Raises:
        ArgumentError: Shapes, dtypes, devices or token ranges do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    _accumulate_per_example({"grad_abs_sum": acc}, dy, x, starts, lengths, backend)


def accumulate_grad_sq_sum(
    acc: Tensor, dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, *, backend: str | None = None
) -> None:
    """Add ``sum_i (dy_i.T @ x_i)**2``, the squared gradient of each example i.

    The result is the diagonal of the empirical Fisher matrix. Arguments and errors are those of
    :func:`accumulate_grad_abs_sum`.
    """
    _accumulate_per_example({"grad_sq_sum": acc}, dy, x, starts, lengths, backend)


def accumulate_gradients(
    accs: Mapping[str, Tensor], dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, *, backend: str | None = None
) -> None:
    """Add several statistics of the same gradients, forming each product once where the backend can.

    ``cpp`` forms it once for all statistics, ``triton`` once for any two, ``torch`` once for each. A ``grad_sum`` among
    others is summed example by example and rounds differently from a ``grad_sum`` alone, which BLAS forms.

    Args:
        accs: One to three of ``grad_sum``, ``grad_abs_sum`` and ``grad_sq_sum``, each with its accumulator as for the
            function of that name; of one dtype, device and layout.
        dy: As for :func:`accumulate_grad_abs_sum`. Zero for tokens of no example, since ``grad_sum`` may include them.
        x: As for :func:`accumulate_grad_abs_sum`.
        starts: As for :func:`accumulate_grad_abs_sum`; no token is in two examples.
        lengths: As for :func:`accumulate_grad_abs_sum`.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one.

    Raises:
        ArgumentError: Names, shapes, dtypes, devices or token ranges do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    validate.check_accumulators(accs)
    if set(accs) == {"grad_sum"}:
        validate.check_product(accs["grad_sum"], dy, x)
        validate.check_spans(starts, lengths, len(x), disjoint=True)
        accumulate_grad_sum(accs["grad_sum"], dy, x, backend=backend)
    else:
        _accumulate_per_example(accs, dy, x, starts, lengths, backend)


def accumulate_act_sq_sum(acc: Tensor, x: Tensor, *, backend: str | None = None) -> None:
    """Add the sum over tokens of the squared inputs, ``acc[j] += sum_t x[t, j]**2``, formed in float64.

    Args:
        acc: ``(in,)`` float32 or float64, changed in place.
        x: ``(n_tokens, in)`` inputs, any float dtype, may be strided.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All are bit-identical.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    validate.check_accumulator(acc, dims=1)
    validate.check_float("x", x, like=acc)
    if x.dim() != 2 or x.shape[1] != acc.shape[0]:
        raise ArgumentError(f"expected (n_tokens, {acc.shape[0]}) to fit acc, got {tuple(x.shape)}", argument="x")
    acc, x = acc.detach(), x.detach()
    memory.check_apart({"": acc}, {"x": x})
    with torch.no_grad():
        match dispatch.choose(backend, "accumulate_act_sq_sum", acc, x):
            case "torch":
                reference.accumulate_act_sq_sum(acc, x)
            case "cpp":
                cpp.accumulate_act_sq_sum(acc, x)
            case "triton":
                from fastprune.ops import triton

                triton.accumulate_act_sq_sum(acc, x)


def top_scores(
    weight: Tensor, statistic: Tensor | None, criterion: str, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Select the k weights with the highest scores.

    Args:
        weight: ``(rows, cols)``, any float dtype, may be strided.
        statistic: float32 or float64 of the weight's shape; for ``wanda`` broadcastable to it (``(cols,)`` for a
            Linear, ``(rows, 1)`` for a Conv1D); ``None`` for ``magnitude``.
        criterion: One of :data:`CRITERIA`; :mod:`fastprune.ops.criteria` has the formulas.
        k: How many; all of them if the weight has fewer.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All are bit-identical.

    Returns:
        ``indices`` int64 ``(k,)``, flat in row-major order, and ``values`` float32 ``(k,)``, on the weight's device, by
        descending score, ties by ascending index. A score of -0 counts and is returned as 0.

    Raises:
        ArgumentError: Shapes, dtypes, devices, criterion or k do not fit.
        BackendError: The backend that was asked for cannot serve.
        ScoringError: A score is not a number; the message names the first flat index.
    """
    [(_, found)] = top_scores_of_each({"": (weight, statistic)}, criterion, {"": k}, backend=backend)
    return found


def top_scores_of_each(
    matrices: Mapping[str, tuple[Tensor, Tensor | None]],
    criterion: str,
    ks: Mapping[str, int],
    *,
    backend: str | None = None,
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Select the highest scores of each of several matrices.

    Fixed costs are paid once: ``cuda`` selects from all matrices in one launch (up to a million entries), ``cpp``
    selects from small matrices in parallel.

    Args:
        matrices: Name to weight and statistic, each as for :func:`top_scores`; dtypes and devices may differ. Messages
            about a matrix begin with its name, unless that is empty.
        criterion: As for :func:`top_scores`.
        ks: Name to how many.
        backend: As for :func:`top_scores`.

    Returns:
        Pairs of a name and what :func:`top_scores` returns for it, bit-identical. They are yielded as they become
        ready: a caller that moves each off the device needs no memory there for all.

    Raises:
        ArgumentError, BackendError: As :func:`top_scores`, at once.
        ScoringError: As :func:`top_scores`, while pairs are taken.
    """
    together: dict[tuple[str, torch.device], dict[str, tuple[Tensor, Tensor | None]]] = {}
    checked = {}
    validate.check_names("ks", ks, matrices, of="matrices")
    for name, pair in matrices.items():
        with validate.naming(name):
            weight, statistic = validate.checked_pair(pair)
            checked[name] = validate.check_scores(weight, statistic, criterion, ks[name])
            server = dispatch.choose(backend, "top_scores", weight)
        together.setdefault((server, weight.device), {})[name] = (weight, statistic)
    servers = [_server(server) for server, _ in together]
    parts = zip(servers, together.values(), strict=True)
    return itertools.chain.from_iterable(server.top_scores_of_each(some, criterion, checked) for server, some in parts)


def apply_sparse_(weight: Tensor, indices: Tensor, scale: float = 0.0, *, backend: str | None = None) -> Tensor:
    """Multiply some weights by ``scale`` in place.

    Args:
        weight: Any float dtype and shape, may be strided; a parameter that requires a gradient is allowed.
        indices: int64 ``(n,)``, flat in row-major order of the weight's shape, on its device, none twice.
        scale: 0 writes +0 regardless of the old value; otherwise the product is formed in float32 (float64 for a
            float64 weight) and rounded.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All are bit-identical.

    Returns:
        The old values ``(n,)`` in the weight's dtype, for :func:`restore_sparse_`.

    Raises:
        ArgumentError: Indices out of range, a scale that is not finite, or a weight whose elements share memory.
        BackendError: The backend that was asked for cannot serve.
    """
    return apply_sparse_each_({"": weight}, {"": indices}, scale, backend=backend)[""]


def apply_sparse_each_(
    weights: Mapping[str, Tensor], indices: Mapping[str, Tensor], scale: float = 0.0, *, backend: str | None = None
) -> dict[str, Tensor]:
    """:func:`apply_sparse_` of several matrices: one synchronization per device and, with ``cuda``, one launch.

    Nothing is written before all arguments are checked. An interrupt between two matrices loses the old values of the
    first: a caller that must be able to restore them reads them beforehand.

    Args:
        weights: Name to weight; dtypes and devices may differ. Messages about a matrix begin with its name, unless that
            is empty. No two lists name the same element in memory.
        indices: Name to indices, for the same names.
        scale: As for :func:`apply_sparse_`.
        backend: As for :func:`apply_sparse_`.

    Returns:
        Name to old values, for :func:`restore_sparse_each_`.

    Raises:
        ArgumentError: As :func:`apply_sparse_`, or the names differ.
        BackendError: As :func:`apply_sparse_`.
    """
    scale = validate.checked_scale(scale)
    old: dict[str, Tensor] = {}
    with torch.no_grad():
        groups = validate.check_elements(weights, indices)
        servers = [_server(dispatch.choose(backend, "apply_sparse_", group.elements[0])) for group in groups]
        for server, group in zip(servers, groups, strict=True):
            found = server.apply_sparse_each_(group.elements, group.offsets, scale)
            old.update(zip(group.names, found, strict=True))
    return {name: old[name] for name in weights}


def restore_sparse_(weight: Tensor, indices: Tensor, old: Tensor, *, backend: str | None = None) -> None:
    """Write back what :func:`apply_sparse_` returned, bit-identical.

    Args:
        weight: As for :func:`apply_sparse_`.
        indices: As for :func:`apply_sparse_`.
        old: ``(n,)`` in the weight's dtype, on its device.
        backend: One of :data:`BACKENDS`, or ``None`` for the best available one. All are bit-identical.

    Raises:
        ArgumentError: Shapes, dtypes, devices or indices do not fit.
        BackendError: The backend that was asked for cannot serve.
    """
    restore_sparse_each_({"": weight}, {"": indices}, {"": old}, backend=backend)


def restore_sparse_each_(
    weights: Mapping[str, Tensor],
    indices: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    *,
    backend: str | None = None,
) -> None:
    """Write back what :func:`apply_sparse_each_` returned: :func:`restore_sparse_` of several matrices, checked first.

    Arguments, synchronizations and errors are those of :func:`apply_sparse_each_`; ``old`` has the same names.
    """
    validate.check_old(weights, indices, old)
    with torch.no_grad():
        groups = validate.check_elements(weights, indices)
        servers = [_server(dispatch.choose(backend, "restore_sparse_", group.elements[0])) for group in groups]
        for server, group in zip(servers, groups, strict=True):
            server.restore_sparse_each_(group.elements, group.offsets, [old[name].detach() for name in group.names])


def _server(backend: str) -> ModuleType:
    """The module that selects and writes for a backend."""
    match backend:
        case "cpp":
            return cpp
        case "cuda":
            from fastprune.ops import cuda

            return cuda
        case _:
            return reference


def _accumulate_per_example(
    accs: Mapping[str, Tensor], dy: Tensor, x: Tensor, starts: Tensor, lengths: Tensor, backend: str | None
) -> None:
    operation = "accumulate_gradients" if len(accs) > 1 else f"accumulate_{next(iter(accs))}"
    with torch.no_grad():
        # Accumulators of one layout are turned over together, or not at all.
        products_of = {name: validate.check_product(acc, dy, x) for name, acc in accs.items()}
        accs = {name: acc for name, (acc, _, _) in products_of.items()}
        acc, dy, x = next(iter(products_of.values()))
        spans = validate.check_spans(starts, lengths, len(x), disjoint=len(accs) > 1)
        memory.check_apart(accs, {"dy": dy, "x": x})
        match dispatch.choose(backend, operation, acc, dy, x):
            case "cpp" if cpp.has_gradient_kernel():
                cpp.accumulate_per_example(accs, dy, x, spans)
            case "triton":
                from fastprune.ops import triton

                if len(accs) > 2:  # more tiles than registers; the plain sum loses nothing by a product of its own
                    accumulate_grad_sum(accs.pop("grad_sum"), dy, x, backend=backend)
                triton.accumulate_per_example(accs, dy, x, spans)
            case _:
                for name, acc in accs.items():
                    if name == "grad_sum":
                        reference.add_product_(acc, dy, x)
                    else:
                        getattr(reference, f"accumulate_{name}")(acc, dy, x, starts, lengths)
