"""Garbage in any argument of the operations: an error of fastprune, or the result of the reference."""

from __future__ import annotations

import decimal
import fractions
import random
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastprune import ops
from fastprune.errors import ArgumentError, FastpruneError
from fastprune.ops.criteria import CRITERIA

SCALARS = [
    *(None, True, False, 0, 1, 3, -1, 2**31, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, 1e-320, 10**400),
    *(float("nan"), float("inf"), 1j, "", "abs", "signed", "wanda", "magnitude", "cpp", "torch", "triton", b"abs"),
    *((), (1,), [], [1, 2], {}, {"": 1}, set(), object(), int, len, range(3), ..., slice(2), lambda: 0),
    *(np.int64(2), np.int8(-3), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([1, 2]), np.ones((3, 5))),
    *(np.array("abs"), np.array(3), fractions.Fraction(1, 3), decimal.Decimal(1), decimal.Decimal("nan")),
]
SHAPES = [(), (0,), (1,), (2,), (5,), (3, 5), (5, 3), (4, 3), (4, 5), (0, 5), (3, 0), (0, 0), (1, 1), (2, 3, 5)]
DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool),
    *(torch.complex64, torch.float8_e5m2),
]


def tensor(rng: random.Random) -> torch.Tensor:
    """Of any shape, dtype and layout, with odd values."""
    shape, dtype = rng.choice(SHAPES), rng.choice(DTYPES[:5] * 4 + DTYPES)
    wide = torch.rand(shape) * rng.choice([0, 1, 8, 1e30]) - rng.choice([0, 0, 4])
    if rng.random() < 0.2 and wide.numel():
        wide.view(-1)[rng.randrange(wide.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf, -0.0])
    made = wide.to(dtype)
    match rng.randrange(12):
        case 0 if made.dim():
            made = made[..., ::2]
        case 1:
            made = made.mT if made.dim() > 1 else made
        case 2 if made.dim():
            made = made[:1].expand(made.shape) if made.shape[0] else made
        case 3:
            made = made.to("meta")
        case 4 if made.is_floating_point() and dtype.itemsize > 1:
            made = made.requires_grad_()
        case 5 if dtype.itemsize > 1 and dtype.is_floating_point:
            made = torch._neg_view(made)
        case 6 if made.dim() == 2 and dtype.itemsize > 1:
            made = made.to_sparse()
    return made


def anything(rng: random.Random) -> object:
    return tensor(rng) if rng.random() < 0.5 else rng.choice(SCALARS)


def fitting() -> dict[Callable, dict[str, Callable[[], object]]]:
    """Each operation with arguments that fit, made anew for each call."""
    acc, dy, x = (lambda: torch.zeros(3, 5)), (lambda: torch.ones(4, 3)), (lambda: torch.ones(4, 5))
    spans = {"starts": lambda: torch.tensor([0, 2]), "lengths": lambda: torch.tensor([2, 1])}
    weight, indices = (lambda: torch.arange(15.0).view(3, 5)), lambda: torch.tensor([1, 7])
    several = {"acc": acc, "dy": dy, "x": x}
    return {
        ops.accumulate_grad_sum: several,
        ops.accumulate_grad_abs_sum: {**several, **spans},
        ops.accumulate_grad_sq_sum: {**several, **spans},
        ops.accumulate_gradients: {
            "accs": lambda: {"grad_sum": acc(), "grad_sq_sum": acc()}, "dy": dy, "x": x, **spans
        },
        ops.accumulate_act_sq_sum: {"acc": lambda: torch.zeros(5), "x": x},
        ops.top_scores: {"weight": weight, "statistic": weight, "criterion": lambda: "signed", "k": lambda: 3},
        ops.top_scores_of_each: {
            "matrices": lambda: {"a": (weight(), weight())}, "criterion": lambda: "fisher", "ks": lambda: {"a": 2}
        },
        ops.apply_sparse_: {"weight": weight, "indices": indices, "scale": lambda: 0.5},
        ops.apply_sparse_each_: {
            "weights": lambda: {"a": weight()}, "indices": lambda: {"a": indices()}, "scale": lambda: 0.5
        },
        ops.restore_sparse_: {"weight": weight, "indices": indices, "old": lambda: torch.zeros(2)},
        ops.restore_sparse_each_: {
            "weights": lambda: {"a": weight()},
            "indices": lambda: {"a": indices()},
            "old": lambda: {"a": torch.zeros(2)},
        },
    }  # fmt: skip


def within(rng: random.Random, argument: object) -> object:
    """Garbage, or a mapping of the right kind with garbage in it."""
    if isinstance(argument, dict) and rng.random() < 0.7:
        (name, value), *others = argument.items()
        inside = (anything(rng), value[1]) if isinstance(value, tuple) and rng.random() < 0.5 else anything(rng)
        return {rng.choice([name, name, name, "b", 3, None]): inside, **dict(others)}
    return anything(rng)


def called(function: Callable, arguments: dict[str, object]) -> object:
    """What comes out, all of it."""
    found = function(**arguments)
    return list(found) if function is ops.top_scores_of_each else found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", fitting(), ids=lambda function: function.__name__)
def test_garbage_is_refused_or_served(function: Callable) -> None:
    rng, made = random.Random(function.__name__), fitting()[function]
    refused = 0
    for _ in range(400):
        arguments = {name: make() for name, make in made.items()}
        for name in rng.sample(list(made), rng.choice([1, 1, 1, 2])):
            arguments[name] = within(rng, arguments[name])
        arguments["backend"] = anything(rng) if rng.random() < 0.1 else rng.choice([None, "torch", "cpp", "cuda"])
        try:
            called(function, arguments)
        except FastpruneError as error:
            refused += 1
            assert str(error)
        except Exception as error:
            raise AssertionError(f"{function.__name__}: {arguments}") from error
    assert refused > 100


def test_backends_agree_on_garbage_that_is_served() -> None:
    """Both refuse it, or both give the same bits."""
    rng = random.Random(5)
    served = 0
    for _ in range(1500):
        weight, statistic, criterion, k = (
            tensor(rng),
            tensor(rng),
            rng.choice(ops.CRITERIA),
            rng.choice([0, 1, 4, 2**70]),
        )
        if CRITERIA[criterion].statistic is None:
            statistic = None
        outcomes = []
        for backend in ("torch", "cpp"):
            try:
                indices, values = ops.top_scores(weight, statistic, criterion, k, backend=backend)
                outcomes.append((indices.tolist(), values.view(torch.int32).tolist()))
            except FastpruneError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        served += isinstance(outcomes[0], tuple)
    assert served > 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: ops.top_scores(w, w, "signed", True), "k: expected an integer, got True"),
        (lambda w: ops.top_scores(w, w, "signed", np.ones(2)), "k: expected an integer"),
        (lambda w: ops.top_scores(w, w, np.array(["signed", "abs"]), 1), "criterion: expected one of"),
        (lambda w: ops.top_scores(w, w, ["signed"], 1), "criterion: expected one of"),
        (lambda w: ops.top_scores(w, w, "signed", 1, backend={}), "backend: expected one of"),
        (lambda w: ops.top_scores(w, w, "signed", 1, backend=np.array(["cpp", "a"])), "backend: expected one of"),
        (lambda w: ops.top_scores_of_each([w], "signed", {"a": 1}), "matrices: expected a mapping"),
        (lambda w: ops.top_scores_of_each({"a": (w, w)}, "signed", 3), "ks: expected a mapping"),
        (lambda w: ops.top_scores_of_each({"a": (w, w)}, "signed", {}), "ks: expected the names of the 1 matrices"),
        (lambda w: ops.top_scores_of_each({"a": w}, "signed", {"a": 1}), "a: matrices: expected a weight and its"),
        (lambda w: ops.accumulate_gradients([w], w, w, w, w), "accs: expected a mapping"),
        (lambda w: ops.accumulate_gradients({3: w}, w, w, w, w), "accs: expected one or more of"),
        (lambda w: ops.apply_sparse_each_(w, {}), "weights: expected a mapping"),
        (lambda w: ops.apply_sparse_each_({"a": w}, [w]), "indices: expected a mapping"),
        (lambda w: ops.apply_sparse_each_({"a": w}, {1: w, None: w}), "indices: expected the names"),
        (lambda w: ops.apply_sparse_(w, torch.tensor([0]), 10**400), "scale: expected a finite number"),
        (lambda w: ops.apply_sparse_(w, torch.tensor([0]), True), "scale: expected a finite number"),
        (lambda w: ops.apply_sparse_(w, torch.tensor([2**62])), "indices: expected 0 to 14"),
        (
            lambda w: ops.accumulate_grad_abs_sum(
                w, torch.ones(4, 3), torch.ones(4, 5), torch.tensor([2**63 - 1]), torch.tensor([2**63 - 1])
            ),
            "starts, lengths: expected spans within 4 tokens, got start 9223372036854775807",
        ),
    ],
)
def test_the_argument_is_named(call: Callable, message: str) -> None:
    weight = torch.arange(15.0).view(3, 5)
    with warnings.catch_warnings(), pytest.raises(ArgumentError, match=f"^{message}"):
        warnings.simplefilter("error")
        call(weight)
    assert torch.equal(weight, torch.arange(15.0).view(3, 5))


def test_numbers_of_other_libraries_are_numbers() -> None:
    weight = torch.arange(15.0).view(3, 5)
    for k in (2, np.int64(2), np.uint8(2), torch.tensor(2)):
        assert ops.top_scores(weight, None, "magnitude", k)[0].tolist() == [14, 13]
    assert len(ops.top_scores(weight, None, "magnitude", 2**70)[0]) == 15
    for scale in (np.float16(0.5), fractions.Fraction(1, 2)):
        once = weight.clone()
        ops.apply_sparse_(once, torch.tensor([4]), scale)
        assert once[0, 4] == 2
