"""Garbage given to masks is refused by the name of the argument, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.mask_models import SHAPES, Toy, bits, mask_of, same_bits

from fastprune import PruneMask, random_mask
from fastprune.errors import ArgumentError, FastpruneError, MaskError

ONE, SHAPE = torch.tensor([1]), (2, 3)


class Dispatching(torch.Tensor):
    """A subclass that answers every operation itself."""

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise TypeError("no operation is known")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneMask([1], {"w": SHAPE}), "indices: expected a mapping, got list"),
        (lambda: PruneMask(None, {"w": SHAPE}), "indices: expected a mapping, got NoneType"),
        (lambda: PruneMask({"w": ONE}, ["w"]), "shapes: expected a mapping, got list"),
        (lambda: PruneMask({"w": ONE}, {"w": SHAPE}, "text"), "metadata: expected a mapping, got str"),
        (lambda: PruneMask({"w": ONE}, {"w": SHAPE}, [3]), "metadata: expected a mapping, got list"),
        (
            lambda: PruneMask({"w": ONE, 1: ONE}, {"v": SHAPE, 2: SHAPE}),
            "indices and shapes: expected the same matrices in both, got these in one alone",
        ),
        (lambda: PruneMask({1: ONE}, {1: SHAPE}), "shapes: expected names of parameters, got 1"),
        (lambda: PruneMask({"w": ONE}, {"w": 6}), "w: expected a shape, a tuple of integers, got 6"),
        (lambda: PruneMask({"w": ONE}, {"w": None}), "w: expected a shape, a tuple of integers, got None"),
        (lambda: PruneMask({"w": ONE}, {"w": "ab"}), "w: expected a shape, a tuple of integers, got 'ab'"),
        (lambda: PruneMask({"w": ONE}, {"w": (2.0, 3)}), "w: shape: expected an integer of 0 or more, got 2.0"),
        (lambda: PruneMask({"w": ONE}, {"w": (True, 3)}), "w: shape: expected an integer of 0 or more, got True"),
        (lambda: PruneMask({"w": ONE}, {"w": (-2, -3)}), "w: shape: expected an integer of 0 or more, got -2"),
        (
            lambda: PruneMask({"w": ONE}, {"w": SHAPE}, nominal="3"),
            "nominal: expected an integer of 0 or more, got '3'",
        ),
        (
            lambda: PruneMask({"w": ONE}, {"w": SHAPE}, nominal=1.5),
            "nominal: expected an integer of 0 or more, got 1.5",
        ),
        (lambda: PruneMask({"w": ONE}, {"w": SHAPE}, nominal=-1), "nominal: expected an integer of 0 or more, got -1"),
        (lambda: PruneMask({"w": ONE.to("meta")}, {"w": SHAPE}), "w: indices: expected a dense tensor"),
        (lambda: PruneMask({"w": ONE.to_sparse()}, {"w": SHAPE}), "w: indices: expected a dense tensor"),
        (lambda: PruneMask({"w": ONE.as_subclass(Dispatching)}, {"w": SHAPE}), "w: indices: expected a dense tensor"),
        (lambda: mask_of() & 3, "expected a PruneMask, got int"),
        (lambda: mask_of() | None, "expected a PruneMask, got NoneType"),
        (lambda: mask_of() - {}, "expected a PruneMask, got dict"),
    ],
)
def test_what_is_no_mask_is_refused(make: Callable, message: str) -> None:
    with pytest.raises(MaskError, match=f"^{message}|{message}$"):
        make()


def test_integers_of_numpy_go_into_a_file(tmp_path) -> None:
    sizes = {"w": (np.int64(2), np.int32(3))}
    mask = PruneMask({"w": ONE}, sizes, nominal=np.int64(4))
    assert PruneMask.load(mask.save(tmp_path / "mask.safetensors")) == mask
    assert mask.digest == PruneMask({"w": ONE}, {"w": SHAPE}).digest and mask.nominal == 4


@pytest.mark.parametrize(
    "call",
    [
        lambda model, mask: mask.apply_(model, scale=10**400),
        lambda model, mask: mask.apply_(model, scale="0"),
        lambda model, mask: mask.apply_([model]),
        lambda model, mask: mask.applied(None).__enter__(),
        lambda model, mask: mask.density(3),
        lambda model, mask: mask.density(torch.nn.Module()),
        lambda model, mask: PruneMask(dict(mask), SHAPES, {"fingerprint": 3}).apply_(model),
        lambda model, mask: PruneMask(dict(mask), SHAPES, {"fingerprint": ["f"]}).apply_(model),
        lambda model, mask: random_mask(model, dict(mask)),
        lambda model, mask: random_mask(3, mask),
        lambda model, mask: random_mask(model, mask, seed=True),
        lambda model, mask: random_mask(model, mask, match=np.array(["count", "magnitude"])),
        lambda model, mask: random_mask(model, mask, match=None),
        lambda model, mask: mask.apply_(model).restore_(3),
    ],
)
def test_the_model_is_as_it_was(call: Callable) -> None:
    model, mask = Toy(), mask_of()
    before = bits(model)
    with pytest.raises(FastpruneError):
        call(model, mask)
    assert same_bits(bits(model), before)


def test_one_weight_under_two_names_is_pruned_once_or_not_at_all() -> None:
    """By two lists, what one wrote would be taken for the old value by the other, and be put back."""
    model = Toy()
    model.d = torch.nn.Linear(5, 6)
    model.d.weight = model.a.weight
    before = bits(model)
    shapes = {"a.weight": (6, 5), "d.weight": (6, 5)}
    for other in (6, 7):
        mask = PruneMask({"a.weight": torch.tensor([6, 8]), "d.weight": torch.tensor([other])}, shapes)
        if other == 6:
            with pytest.raises(ArgumentError, match=r"no element in two lists, got 'a.weight' and 'd.weight'"):
                mask.apply_(model)
        else:
            undo = mask.apply_(model, scale=0.5)
            assert not same_bits(bits(model), before)
            undo.restore_(model)
        assert same_bits(bits(model), before)
    with mask_of(a=[6]).applied(model):  # the error has left nothing behind
        pass
    assert same_bits(bits(model), before)


def test_a_model_of_inference_mode_is_refused_outside_of_it() -> None:
    with torch.inference_mode():
        model = Toy()
    before, mask = bits(model), mask_of(a=[6], b=[8])
    with pytest.raises(ArgumentError, match=r"a\.weight: weight: .* made under torch\.inference_mode"):
        mask.apply_(model)
    assert same_bits(bits(model), before)
    with torch.inference_mode(), mask.applied(model):
        assert model.a.weight.view(-1)[6] == 0
    assert same_bits(bits(model), before)
