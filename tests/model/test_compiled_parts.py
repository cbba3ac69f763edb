"""Parts of a model compiled one by one: names, masks and fingerprints are those of the plain model.

The backend is the one that generates no code, and compilation waits for the first call: only names matter here, and
that operations which dynamo cannot trace are called as they are.
"""

from __future__ import annotations

import pytest
import torch
from support.architectures import BENIGN, HARM, build
from support.statistics import kept
from torch import nn

import fastprune
from fastprune import ops
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError
from fastprune.model.matrices import eligible_matrices
from fastprune.model.weights import Resident


def compile_part(parent: nn.Module, name: str) -> None:
    setattr(parent, name, torch.compile(getattr(parent, name), backend="eager"))


def compile_blocks(model: nn.Module) -> nn.Module:
    for index in range(len(model.model.layers)):
        compile_part(model.model.layers, str(index))
    return model


def score(model: nn.Module) -> fastprune.Scores:
    return fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), progress=False)


def test_masks_fit_both_ways_and_the_checkpoint(tmp_path) -> None:
    plain, compiled = build("Llama"), compile_blocks(build("Llama"))
    scores, reference = score(compiled), score(plain)
    assert scores.names == reference.names and kept(scores) == kept(reference)
    assert scores.provenance["model"] == reference.provenance["model"]
    from_compiled, from_plain = scores.select(0.05, 0.02), reference.select(0.05, 0.02)
    assert from_compiled == from_plain and from_compiled.metadata["fingerprint"] == from_plain.metadata["fingerprint"]
    before = [p.detach().clone() for p in compiled.parameters()]
    undo = from_plain.apply_(compiled)
    with from_compiled.applied(plain):
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), compiled.parameters(), strict=True))
    for match in ("count", "magnitude"):
        masks = [fastprune.random_mask(model, like=from_plain, match=match) for model in (compiled, plain)]
        assert masks[0] == masks[1] and masks[0].metadata == masks[1].metadata
    undo.restore_(compiled)
    assert all(torch.equal(p, b) for p, b in zip(compiled.parameters(), before, strict=True))
    plain.save_pretrained(tmp_path / "plain")
    fastprune.patch_checkpoint(tmp_path / "plain", from_compiled, tmp_path / "pruned")


def test_a_mask_is_taken_off_blocks_that_were_compiled_under_it() -> None:
    model = build("Llama")
    mask, before = score(model).select(None, 0.02), [p.detach().clone() for p in model.parameters()]
    undo = mask.apply_(model)
    undo.restore_(compile_blocks(model))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("name", ["Qwen2Moe", "Mixtral"])
def test_parts_of_a_mixture(name: str) -> None:
    """What is around compiled experts or a compiled router has their attributes, and is neither."""
    plain, model = build(name), build(name)
    mlp = model.model.layers[0].mlp
    for part in ("experts", "gate"):
        compile_part(mlp, part)
    if name == "Qwen2Moe":
        compile_part(mlp, "shared_expert_gate")
        compile_part(mlp.shared_expert, "up_proj")
    compile_part(model, "model")
    assert [matrix.name for matrix in eligible_matrices(model)] == [matrix.name for matrix in eligible_matrices(plain)]
    assert kept(score(model)) == kept(score(plain))


def test_weights_are_the_same_for_a_journal_and_called_by_their_plain_name() -> None:
    model = build("Llama")
    identity = Resident(model).identity()
    model.model.layers[1].extra = nn.Bilinear(2, 2, 2)
    with pytest.raises(ModelError, match=r"model: model\.layers\.1\.extra\.weight of shape"):
        score(compile_blocks(model))
    assert Resident(compile_blocks(build("Llama"))).identity() == identity


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo d")  # that it does not see into an extension
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_operations_inside_a_compiled_function(backend: str) -> None:
    def prune(weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        acc, ends = torch.zeros_like(weight), torch.tensor([8, 20])
        ops.accumulate_grad_abs_sum(
            acc, dy, x * 2, ends - torch.tensor([8, 12]), torch.tensor([8, 12]), backend=backend
        )
        indices, values = ops.top_scores(weight, acc, "abs", 5, backend=backend)
        return ops.apply_sparse_(weight, indices, 0.0, backend=backend), indices + 0, values, acc, weight

    generator = torch.Generator().manual_seed(0)
    weight, dy, x = (torch.randn(size, generator=generator) for size in ((6, 9), (20, 6), (20, 9)))
    plain = prune(weight.clone(), dy, x)
    compiled = torch.compile(prune, backend="eager")(weight.clone(), dy, x)
    assert all(map(torch.equal, plain, compiled))
    assert int((plain[-1] == 0).sum()) == 5
