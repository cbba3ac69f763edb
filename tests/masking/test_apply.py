"""What applying a mask does to a model: nothing outside it, and nothing at all once it is undone."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.mask_models import SHAPES, Toy, bits, fingerprint_of, mask_of, masks, same_bits, thorough
from torch import nn

from fastprune import ops
from fastprune.errors import ArgumentError, MaskError, ModelError
from fastprune.masking.apply import _live, matrices_of
from fastprune.masking.mask import PruneMask
from fastprune.model.fingerprint import fingerprint, fingerprint_of_samples, sample_positions
from fastprune.ops import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@settings(thorough, max_examples=20)
@given(drawn=masks())
def test_applied_changes_the_masked_weights_alone_and_gives_the_same_bits_back(dtype, drawn):
    mask, model = drawn[0], Toy(dtype)
    before = bits(model)
    with mask.applied(model) as inside:
        assert inside is model
        for name, weight in matrices_of(model, SHAPES).items():
            pruned = torch.zeros(weight.numel(), dtype=torch.bool)
            pruned[mask[name]] = True
            assert (weight.view(-1)[pruned] == 0).all() and not torch.signbit(weight.view(-1)[pruned]).any()
            width = weight.element_size()
            was = before[name].view(-1, width)[~pruned]
            assert torch.equal(weight.view(torch.uint8).view(-1, width)[~pruned], was)
    assert same_bits(bits(model), before)
    undo = mask.apply_(model, scale=-1.5)
    undo.restore_(model)
    assert same_bits(bits(model), before)


def test_a_scale_multiplies():
    model, mask = Toy(), mask_of(a=[10, 11])
    old = model.a.weight.detach().view(-1)[10:12].clone()
    with mask.applied(model, scale=0.25):
        assert torch.equal(model.a.weight.detach().view(-1)[10:12], old * 0.25)
    for scale in (np.float32(0.25), np.float16(0.25), Fraction(1, 4)):
        with mask.applied(model, scale=scale):
            assert torch.equal(model.a.weight.detach().view(-1)[10:12], old * 0.25)
    with mask.applied(model, scale=np.int64(2)):
        assert torch.equal(model.a.weight.detach().view(-1)[10:12], old * 2)
    for scale in (math.nan, math.inf, "0", None, True, np.bool_(True), np.float32("nan"), 1j, 10**400):
        with pytest.raises(ArgumentError, match="scale: expected a finite number"):
            mask.apply_(model, scale=scale)


def test_an_exception_inside_the_block_restores_and_goes_on():
    model, mask = Toy(), mask_of(a=[10], b=[20])
    before = bits(model)
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), mask.applied(model):
            raise error
        assert same_bits(bits(model), before) and not _live[model]


def test_an_interrupt_between_the_writes_of_a_backend_leaves_the_model_as_it_was(monkeypatch):
    """Each backend of the CPU scales what stood in a matrix, then writes it."""
    model, mask = Toy(), mask_of(a=[1, 10], b=[0, 20], c=[2, 3])
    before, genuine, written = bits(model), reference.scaled, []

    def interrupted(old, scale):
        written.append(not same_bits(bits(model), before))
        if len(written) == 3:
            raise KeyboardInterrupt
        return genuine(old, scale)

    monkeypatch.setattr(reference, "scaled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mask.apply_(model)
    assert written == [False, True, True] and same_bits(bits(model), before) and not _live[model]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["apply_", "applied"])
def test_an_interrupt_half_way_leaves_the_model_as_it_was(monkeypatch, when, way):
    """Ctrl-C while all matrices are written: at the third, before it is or when it just has been."""
    model, mask = Toy(), mask_of(a=[1, 10], b=[0, 20], c=[2, 3])
    before, genuine, calls = bits(model), ops.apply_sparse_each_, []

    def interrupted(weights, indices, scale):
        assert list(weights) == list(indices) == list(SHAPES)
        for name, weight in weights.items():
            calls.append(name)
            if len(calls) == 3 and when == "before":
                raise KeyboardInterrupt
            genuine({name: weight}, {name: indices[name]}, scale)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "apply_sparse_each_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if way == "apply_":
            mask.apply_(model)
        else:
            with mask.applied(model):
                pytest.fail("the block was entered")
    assert len(calls) == 3 and same_bits(bits(model), before)
    monkeypatch.undo()
    mask.apply_(model).restore_(model)  # and nothing of the failed attempt is left over
    assert same_bits(bits(model), before)


def test_an_undo_works_once_and_on_its_own_model():
    model, mask = Toy(), mask_of(a=[10])
    undo = mask.apply_(model)
    with pytest.raises(MaskError, match="got another one"):
        undo.restore_(Toy())
    undo.restore_(model)
    after = bits(model)
    with pytest.raises(MaskError, match="an undo works once"):
        undo.restore_(model)
    assert same_bits(bits(model), after)


def test_masks_that_overlap_are_undone_in_the_opposite_order():
    model = Toy()
    before = bits(model)
    first, second, apart = mask_of(a=[10, 11]), mask_of(a=[11, 12]), mask_of(a=[13], b=[11])
    undo_first, undo_second, undo_apart = first.apply_(model), second.apply_(model), apart.apply_(model)
    inside = bits(model)
    with pytest.raises(MaskError, match=r"a mask applied later also changes a.weight; restore that one first"):
        undo_first.restore_(model)
    assert same_bits(bits(model), inside)
    undo_second.restore_(model)  # the mask applied after it has no weight in common
    undo_first.restore_(model)
    undo_apart.restore_(model)
    assert same_bits(bits(model), before)


def test_models_that_the_mask_does_not_fit_are_refused_untouched():
    mask = mask_of(a=[10])
    odd = Toy()
    odd.b = nn.Linear(7, 6)
    before = bits(odd)
    for strict in (True, False):
        with pytest.raises(MaskError, match=r"b.weight has the shape \(6, 7\) in the model and \(7, 6\) in the mask"):
            mask.apply_(odd, strict=strict)
        with pytest.raises(MaskError, match=r"lacks 2 of the 3 matrices of the mask, the first is b\.weight"):
            mask.apply_(nn.ModuleDict({"a": nn.Linear(5, 6)}), strict=strict)
    assert same_bits(bits(odd), before)


def test_another_model_is_refused_unless_strict_is_off():
    model = Toy()
    mask = mask_of({"fingerprint": fingerprint_of(model)}, a=[10])
    with mask.applied(model), mask.applied(copy.deepcopy(model), strict=False):
        pass
    other = Toy()
    before = bits(other)
    with pytest.raises(
        MaskError, match=r"made for a model with the fingerprint .*strict=False applies it all the same"
    ):
        mask.apply_(other)
    assert same_bits(bits(other), before)
    with mask.applied(other, strict=False):
        assert other.a.weight.view(-1)[10] == 0
    with mask_of(a=[10]).applied(other):  # a mask that does not say what it was made for
        pass


def test_a_masked_model_counts_as_the_model_without_the_mask():
    """Every weight of these small matrices is a sample of the fingerprint, so the first mask changes it."""
    model = Toy()
    clean = fingerprint_of(model)
    first, second = (mask_of({"fingerprint": clean}, a=[i], b=[i, 30]) for i in (10, 11))
    with first.applied(model):
        assert fingerprint_of(model) != clean
        later = mask_of({"fingerprint": fingerprint_of(model)}, c=[10])  # made for the model as pruned by the first
        with second.applied(model), later.applied(model):
            assert model.a.weight.view(-1)[10:12].tolist() == [0, 0]
    assert fingerprint_of(model) == clean
    with pytest.raises(MaskError, match="strict=False"):
        later.apply_(model)


def test_models_that_cannot_be_written_are_refused():
    mask = mask_of(a=[10])
    with pytest.raises(ModelError, match=r"a.weight is on the meta device \(not loaded, or offloaded\)"):
        mask.apply_(Toy().to("meta"))
    odd = Toy()
    odd.b.weight = nn.Parameter(torch.zeros(7, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"b.weight: expected a plain float tensor, got Tensor of torch.int8"):
        mask.apply_(odd)
    odd.b.weight = nn.Parameter(torch.zeros(1, 6).expand(7, 6))
    with pytest.raises(ModelError, match=r"b.weight is an expanded tensor"):
        mask.apply_(odd)


def test_a_folder_is_no_module():
    with pytest.raises(ArgumentError, match=r"expected a torch\.nn\.Module, got str; patch_checkpoint takes folders"):
        mask_of(a=[10]).apply_("some/folder")


def test_a_weight_that_is_a_transposed_view_is_indexed_in_row_major_order():
    model = Toy()
    model.a.weight = nn.Parameter(torch.arange(30.0).reshape(5, 6).T)
    stored = model.a.weight.detach().clone(memory_format=torch.contiguous_format)
    before = model.a.weight.detach().clone()
    with mask_of(a=[7]).applied(model):
        changed = (model.a.weight != before).nonzero().tolist()
        assert changed == [[1, 2]] and stored.view(-1)[7] == before[1, 2]
    assert torch.equal(model.a.weight, before)


def test_one_expert_of_a_fused_tensor():
    model = nn.Module()
    model.down_proj = nn.Parameter(torch.arange(1.0, 25).reshape(4, 2, 3))
    mask = PruneMask({"down_proj[2]": torch.tensor([0, 5])}, {"down_proj[2]": (2, 3)})
    before = bits(model)
    with mask.applied(model):
        assert (model.down_proj == 0).nonzero().tolist() == [[2, 0, 0], [2, 1, 2]]
    assert same_bits(bits(model), before)
    outside = PruneMask({"down_proj[4]": torch.tensor([0])}, {"down_proj[4]": (2, 3)})
    with pytest.raises(
        MaskError, match=r"down_proj has the shape \(4, 2, 3\) in the model, so there is no down_proj\[4\]"
    ):
        outside.apply_(model)


def test_a_compiled_model_is_the_model_inside_it():
    """What torch.compile returns holds the model under this name; to import dynamo for it takes ten seconds."""
    model, mask = Toy(), mask_of(a=[10])
    before, compiled = bits(model), nn.Module()
    compiled._orig_mod = model
    with mask.applied(compiled):
        assert model.a.weight.view(-1)[10] == 0
    undo = mask.apply_(compiled)
    undo.restore_(model)
    assert same_bits(bits(model), before)


def test_training_goes_on_and_autograd_sees_the_change():
    model, mask = Toy(), mask_of(a=[10])
    with mask.applied(model):
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        model(torch.ones(1, 5)).sum().backward()
        assert model.a.weight.grad is not None
    out = (model.a.weight * model.a.weight).sum()
    with mask.applied(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_model_of_another_dtype_or_shape_is_not_restored():
    model, mask = Toy(), mask_of(a=[10])
    undo = mask.apply_(model)
    model.to(torch.bfloat16)
    with pytest.raises(MaskError, match=r"a.weight is torch.bfloat16 now and was torch.float32"):
        undo.restore_(model)
    model.a = nn.Linear(4, 4)
    with pytest.raises(MaskError, match=r"a.weight has the shape \(4, 4\) in the model"):
        undo.restore_(model)


def test_what_the_end_of_a_block_cannot_restore_is_in_the_error():
    model, mask = Toy(), mask_of(a=[10])
    before = model.a.weight.detach().view(torch.int32).clone()  # it holds a NaN
    with pytest.raises(MaskError, match=r"was torch\.float32") as caught, mask.applied(model):
        model.double()
    assert "still on the model" in caught.value.__notes__[0] and caught.value.undo.live
    model.float()
    caught.value.undo.restore_(model)
    assert torch.equal(model.a.weight.view(torch.int32), before) and not caught.value.undo.live
    with pytest.raises(MaskError, match="applied later") as caught, mask.applied(model):
        other = mask.apply_(model)
    other.restore_(model)
    caught.value.undo.restore_(model)
    assert torch.equal(model.a.weight.view(torch.int32), before)


def test_a_model_with_a_mask_on_it_can_be_freed():
    model = Toy()
    undo, gone = mask_of(a=[10]).apply_(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not undo.live
    with pytest.raises(MaskError, match="got another one"):
        undo.restore_(Toy())


def test_the_fingerprint_is_that_of_the_weights_whatever_holds_them():
    weights = {"a": torch.randn(40, 30), "b": torch.randn(3, 5)}
    plain = fingerprint(weights)
    assert len(plain) == 64 and fingerprint(dict(reversed(weights.items()))) == plain
    assert fingerprint({name: w.bfloat16() for name, w in weights.items()}) == plain
    assert fingerprint({name: w.double() for name, w in weights.items()}) == plain
    assert fingerprint({name: w.T.contiguous().T for name, w in weights.items()}) == plain
    assert fingerprint({"a": weights["a"], "c": weights["b"]}) != plain
    assert fingerprint({"a": weights["a"].reshape(30, 40), "b": weights["b"]}) != plain
    for name in weights:
        changed = {**weights, name: weights[name].clone()}
        changed[name].view(-1)[sample_positions(changed[name].numel())[-1]] += 1
        assert fingerprint(changed) != plain
    zeros = torch.zeros(2, 2)
    assert fingerprint({"a": zeros}) == fingerprint({"a": -zeros})
    nans = torch.tensor([0x7FC00000, 0x7FC12345, -0x400000], dtype=torch.int32).view(torch.float32)
    assert len({fingerprint({"a": nan[None]}) for nan in nans}) == 1
    samples = {n: (tuple(w.shape), w.view(-1)[sample_positions(w.numel())]) for n, w in weights.items()}
    assert fingerprint_of_samples(samples) == plain
    with pytest.raises(ModelError, match=r"^a: expected a weight with values, got one on the meta device"):
        fingerprint({"a": torch.empty(2, 2, device="meta")})


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 1000, 58_720_256])
def test_sample_positions_are_inside_and_different(numel):
    positions = sample_positions(numel)
    assert len(positions) == min(numel, 64) == len(positions.unique())
    assert positions[0] == 0 and positions[-1] < numel and positions[-1] >= numel - 1 - numel // 64
