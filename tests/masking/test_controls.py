"""Control masks: as many weights, drawn without looking at behaviour, the same for the same seed."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fastprune.errors import ArgumentError, MaskError, ModelError
from fastprune.masking.apply import matrices_of
from fastprune.masking.controls import _distinct, largest_magnitude_mask, random_mask
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint

SHAPES = {"a.weight": (60, 50), "b.weight": (40, 60), "c.weight": (4, 4)}


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({name[0]: nn.Linear(shape[1], shape[0]) for name, shape in SHAPES.items()})


@pytest.fixture
def like() -> PruneMask:
    indices = {"a.weight": torch.arange(0, 3000, 30), "b.weight": torch.arange(7), "c.weight": torch.empty(0).long()}
    return PruneMask(indices, SHAPES, {"model": {"id": "toy"}, "q": 0.1})


@pytest.mark.parametrize("match", ["count", "magnitude"])
def test_a_random_mask_has_the_counts_and_depends_on_the_seed_alone(model, like, match):
    mask = random_mask(model, like=like, seed=3, match=match)
    assert mask.counts == like.counts and list(mask) == list(like)
    assert mask == random_mask(model, like=like, seed=3, match=match)
    assert mask != random_mask(model, like=like, seed=4, match=match)
    assert mask.metadata == {
        "kind": f"random ({match})",
        "seed": 3,
        "like": like.digest,
        "model": {"id": "toy"},
        "fingerprint": fingerprint(matrices_of(model, SHAPES)),
    }
    torch.manual_seed(0)
    state = torch.get_rng_state()
    random_mask(model, like=like, match=match)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is left alone


def test_each_matrix_has_a_stream_of_its_own(model, like):
    alone = PruneMask({"b.weight": like["b.weight"]}, {"b.weight": SHAPES["b.weight"]})
    whole, part = random_mask(model, like=like), random_mask(model, like=alone)
    assert torch.equal(whole["b.weight"], part["b.weight"])
    two = nn.ModuleDict({"x": nn.Linear(10, 10), "y": nn.Linear(10, 10)})
    shapes = {"x.weight": (10, 10), "y.weight": (10, 10)}
    mask = random_mask(two, like=PruneMask({n: torch.arange(10) for n in shapes}, shapes))
    assert not torch.equal(mask["x.weight"], mask["y.weight"])


def test_every_weight_is_equally_likely():
    generator = torch.Generator().manual_seed(0)
    for n, k in ((20, 3), (20, 15), (5, 5)):
        counts = torch.zeros(n)
        for _ in range(4000):
            drawn = _distinct(n, k, generator)
            assert len(drawn.unique()) == len(drawn) == k
            counts[drawn] += 1
        expected = 4000 * k / n
        spread = math.sqrt(4000 * (k / n) * (1 - k / n))
        assert (counts - expected).abs().max() <= 5 * spread  # 5 standard deviations, fixed seed


def test_magnitude_matched_weights_are_others_of_nearly_the_same_size(model, like):
    mask = random_mask(model, like=like, match="magnitude")
    assert (mask & like).total == 0
    for name, weight in matrices_of(model, SHAPES).items():
        ranks = weight.view(-1).abs().argsort().argsort()
        theirs, ours = ranks[like[name]].sort().values, ranks[mask[name]].sort().values
        # the first window is 32 ranks wide, and widens only where stand-ins are short
        assert len(ours) == 0 or (theirs - ours).abs().max() <= 64
    sizes = [model["a"].weight.view(-1)[m["a.weight"]].abs() for m in (like, mask, random_mask(model, like=like))]
    assert abs(sizes[0].mean() - sizes[1].mean()) < abs(sizes[0].mean() - sizes[2].mean())


def test_the_largest_weights_have_the_next_largest_as_stand_ins(model):
    """All of the top is masked: the stand-ins have to be the nearest free ones below, not draws from far away."""
    order = model["a"].weight.view(-1).abs().argsort(descending=True)
    shapes = {"a.weight": SHAPES["a.weight"]}
    mask = random_mask(model, like=PruneMask({"a.weight": order[:300].sort().values}, shapes), match="magnitude")
    ranks = order.argsort()[mask["a.weight"]]
    assert int(ranks.min()) >= 300 and int(ranks.max()) < 300 + 4 * 300


def test_half_of_a_matrix_is_the_most_that_can_be_matched(model):
    shapes = {"c.weight": (4, 4)}
    half = PruneMask({"c.weight": torch.arange(8)}, shapes)
    assert random_mask(model, like=half, match="magnitude")["c.weight"].tolist() == list(range(8, 16))
    with pytest.raises(MaskError, match=r"c.weight: 9 of 16 weights are masked, too many"):
        random_mask(model, like=PruneMask({"c.weight": torch.arange(9)}, shapes), match="magnitude")
    whole = PruneMask({"c.weight": torch.arange(16)}, shapes)
    assert random_mask(model, like=whole) == whole


def test_the_largest_magnitude_mask_is_the_largest_by_size(model, like):
    mask = largest_magnitude_mask(model, like=like)
    assert mask.counts == like.counts
    for name, weight in matrices_of(model, SHAPES).items():
        k = len(like[name])
        assert set(mask[name].tolist()) == set(weight.view(-1).abs().topk(k).indices.tolist())
    assert mask.metadata["kind"] == "largest magnitude" and mask.metadata["like"] == like.digest


def test_the_fingerprint_is_that_of_the_model_without_masks(model, like):
    clean = fingerprint(matrices_of(model, SHAPES))
    everywhere = PruneMask({n: torch.arange(math.prod(s)) for n, s in SHAPES.items()}, SHAPES)
    with everywhere.applied(model):
        assert random_mask(model, like=like).metadata["fingerprint"] == clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_on_the_model_change_no_control(model, like, dtype):
    """Magnitudes are those of the original weights, which the fingerprint is of; not of zeros that masks have put."""
    model["a"].weight = nn.Parameter(torch.randn(50, 60).T)  # the transpose of what is stored
    model.to(dtype)
    draws = [partial(random_mask, model, like=like, match=match) for match in ("count", "magnitude")]
    draws.append(partial(largest_magnitude_mask, model, like=like))
    overlapping = PruneMask({n: torch.arange(0, math.prod(s), 3) for n, s in SHAPES.items()}, SHAPES)
    clean = [draw() for draw in draws]
    undos = [like.apply_(model), overlapping.apply_(model, scale=50.0), like.apply_(model, scale=0.5)]
    while undos:
        weights = [p.detach().clone() for p in model.parameters()]
        for draw, expected in zip(draws, clean, strict=True):
            assert draw() == expected and draw().metadata == expected.metadata
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
        undos.pop().restore_(model)


def test_arguments_are_checked(model, like):
    with pytest.raises(ArgumentError, match=r"match: expected one of \('count', 'magnitude'\), got 'size'"):
        random_mask(model, like=like, match="size")
    same = random_mask(model, like=like, seed=np.int64(3))
    assert same == random_mask(model, like=like, seed=3) and type(same.metadata["seed"]) is int
    for seed in (1.5, None, True, np.bool_(True)):
        with pytest.raises(ArgumentError, match="seed: expected an integer"):
            random_mask(model, like=like, seed=seed)
    with pytest.raises(MaskError, match="like: expected a PruneMask, got dict"):
        random_mask(model, like={})
    for draw in (random_mask, largest_magnitude_mask):
        with pytest.raises(MaskError, match="the model lacks 3 of the 3 matrices"):
            draw(nn.Linear(2, 2), like=like)
        with pytest.raises(ModelError, match="meta device"):
            draw(model.to("meta"), like=like)
        model = nn.ModuleDict({name[0]: nn.Linear(shape[1], shape[0]) for name, shape in SHAPES.items()})
