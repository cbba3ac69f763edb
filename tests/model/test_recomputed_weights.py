"""Weights that a module forms anew in each forward: refused by name, with the call that gives a plain weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fastprune
from fastprune.errors import MaskError, ModelError

NAME = "model.layers.0.mlp.up_proj.weight"


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1


class Doubled(nn.Linear):
    """Its weight is a property."""

    weight = property(lambda self: 2 * self.held)


def doubled(model: nn.Module) -> None:
    model.model.layers[0].mlp.up_proj = Doubled.__new__(Doubled)
    nn.Module.__init__(model.model.layers[0].mlp.up_proj)
    linear = model.model.layers[0].mlp.up_proj
    linear.in_features, linear.out_features, linear.bias = 16, 24, None
    linear.held = nn.Parameter(torch.randn(24, 16))


def plain_tensor(linear: nn.Linear) -> None:
    """As sharding leaves it, whose parameters are flat."""
    values = linear.weight.detach()
    del linear.weight
    linear.weight = values


def up(change: Callable[[nn.Linear], object]) -> Callable[[nn.Module], object]:
    return lambda model: change(model.model.layers[0].mlp.up_proj)


# How the weight comes to be recomputed, what the message says of it, and what undoes it as the message says.
KINDS = {
    "pruned": (
        up(lambda linear: prune.l1_unstructured(linear, "weight", 0.3)),
        r"pruned by torch\.nn\.utils\.prune \(L1Unstructured\).* torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
        up(lambda linear: prune.remove(linear, "weight")),
    ),
    "pruned twice": (
        up(lambda linear: [prune.random_unstructured(linear, "weight", 0.1) for _ in range(2)]),
        r"pruned by torch\.nn\.utils\.prune \(PruningContainer\).* torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
        up(lambda linear: prune.remove(linear, "weight")),
    ),
    "pruned globally": (
        up(lambda linear: prune.global_unstructured([(linear, "weight")], prune.L1Unstructured, amount=0.2)),
        r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
        up(lambda linear: prune.remove(linear, "weight")),
    ),
    "parametrized": (
        up(lambda linear: parametrize.register_parametrization(linear, "weight", Same())),
        r"parametrized \(Same\).* torch\.nn\.utils\.parametrize\.remove_parametrizations\(module, 'weight'\)",
        up(lambda linear: parametrize.remove_parametrizations(linear, "weight")),
    ),
    "weight norm": (
        up(parametrizations.weight_norm),
        r"parametrized \(_WeightNorm\).* torch\.nn\.utils\.parametrize\.remove_parametrizations\(module, 'weight'\)",
        up(lambda linear: parametrize.remove_parametrizations(linear, "weight")),
    ),
    "spectral norm": (up(parametrizations.spectral_norm), r"parametrized \(_SpectralNorm\)", None),
    "orthogonal": (up(parametrizations.orthogonal), r"parametrized \(_Orthogonal\)", None),
    "old weight norm": (
        up(weight_norm),
        r"normalized \(WeightNorm\).* torch\.nn\.utils\.remove_weight_norm\(module, 'weight'\)",
        up(lambda linear: torch.nn.utils.remove_weight_norm(linear, "weight")),
    ),
    "old spectral norm": (
        up(spectral_norm),
        r"normalized \(SpectralNorm\).* torch\.nn\.utils\.remove_spectral_norm\(module, 'weight'\)",
        up(lambda linear: torch.nn.utils.remove_spectral_norm(linear, "weight")),
    ),
    "property": (doubled, r"no parameter of its module.* make it an nn\.Parameter", None),
    "plain tensor": (
        up(plain_tensor),
        r"no parameter of its module.* make it an nn\.Parameter",
        up(lambda linear: linear.register_parameter("weight", nn.Parameter(linear.__dict__.pop("weight")))),
    ),
}


def batch(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def scored(model: nn.Module) -> fastprune.PruneMask:
    return fastprune.score(model, [batch(0)], [batch(1)], progress=False).select(p=0.05, q=0.05)


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_everywhere_and_the_way_out_is_one(model, kind: str) -> None:
    change, message, undo = KINDS[kind]
    mask = scored(model)
    change(model)
    before = values_of(model)
    for call in (
        lambda: scored(model),
        lambda: fastprune.plan(model, 3, 9),
        lambda: mask.apply_(model, strict=False),
        lambda: mask.applied(model, strict=False).__enter__(),
        lambda: fastprune.random_mask(model, mask),
        lambda: fastprune.random_mask(model, mask, match="magnitude"),
    ):
        with pytest.raises(ModelError, match=rf"model: {NAME} is .*{message}"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())
    if undo is not None:
        undo(model)
        with mask.applied(model, strict=False):
            assert (model.model.layers[0].mlp.up_proj.weight.view(-1)[mask[NAME]] == 0).all()
        assert set(scored(model)) == set(mask)


def test_what_is_recomputed_outside_of_the_matrices_is_no_matter(model) -> None:
    """A head, an embedding, a norm or a bias is neither scored nor written."""
    block = model.model.layers[0]
    prune.l1_unstructured(model.lm_head, "weight", 0.3)
    parametrize.register_parametrization(model.model.embed_tokens, "weight", Same())
    parametrize.register_parametrization(block.input_layernorm, "weight", Same())
    block.mlp.up_proj.bias = nn.Parameter(torch.zeros(24))
    prune.l1_unstructured(block.mlp.up_proj, "bias", 0.3)
    mask = scored(model)
    with mask.applied(model):
        assert (block.mlp.up_proj.weight.view(-1)[mask[NAME]] == 0).all()


def test_a_mask_on_a_model_that_is_then_pruned_by_torch_can_still_be_undone(model) -> None:
    mask = scored(model)
    before = values_of(model)
    linear = model.model.layers[0].mlp.up_proj
    with pytest.raises(ModelError, match=r"prune\.remove") as raised, mask.applied(model):
        prune.identity(linear, "weight")
    prune.remove(linear, "weight")
    raised.value.undo.restore_(model)
    assert all(torch.equal(value, before[name]) for name, value in values_of(model).items())


def test_a_matrix_that_the_model_lacks_is_still_missing(model) -> None:
    mask = fastprune.PruneMask(
        {"model.layers.9.mlp.up_proj.weight": torch.tensor([0])}, {"model.layers.9.mlp.up_proj.weight": (24, 16)}
    )
    with pytest.raises(MaskError, match="lacks 1 of the 1 matrices"):
        mask.apply_(model)


def test_two_parameters_over_one_memory_are_one_weight(model) -> None:
    """What is pruned in one is pruned in the other, so that their scores say nothing."""
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.weight = nn.Parameter(mlp.up_proj.weight.detach())
    with pytest.raises(ModelError, match=r"mlp\.gate_proj\.weight and .*mlp\.up_proj\.weight are one shared weight"):
        scored(model)
