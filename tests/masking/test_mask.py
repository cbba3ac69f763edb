"""Masks as values: mappings, sets and files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from support.mask_models import SHAPES, Toy, mask_of, masks, thorough

from fastprune.artifact import read_artifact, write_artifact
from fastprune.errors import ArtifactError, MaskError, NotFoundError
from fastprune.masking.mask import PruneMask


def test_a_mask_is_a_mapping_over_every_matrix():
    mask = mask_of({"kind": "selection"}, a=[0, 29], c=[4])
    assert list(mask) == list(SHAPES) and len(mask) == 3
    assert mask["b.weight"].tolist() == [] and mask["a.weight"].dtype == torch.int64
    assert mask.counts == {"a.weight": 2, "b.weight": 0, "c.weight": 1}
    assert (mask.total, mask.nominal) == (3, 3)
    assert mask.density(Toy()) == 3 / (30 + 6 + 42 + 7 + 21 + 3)
    assert repr(mask) == "PruneMask(3 of 93 weights (0.0323) in 3 matrices, nominal 3, kind 'selection')"


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 1], "expected a 1-D int64 tensor, got list"),
        (torch.tensor([0.0]), r"got torch.float32 \(1,\)"),
        (torch.tensor([0], dtype=torch.int32), r"got torch.int32"),
        (torch.tensor([[0]]), r"got torch.int64 \(1, 1\)"),
        (torch.tensor([1, 0]), r"expected ascending, unique ones in \[0, 4\)"),
        (torch.tensor([1, 1]), "expected ascending, unique"),
        (torch.tensor([0, 4]), r"in \[0, 4\) for the shape \(2, 2\)"),
        (torch.tensor([-1, 0]), r"in \[0, 4\)"),
    ],
)
def test_indices_are_checked(indices, message):
    with pytest.raises(MaskError, match=f"w: .*{message}"):
        PruneMask({"w": indices}, {"w": (2, 2)})
    with pytest.raises(MaskError, match=r"expected the same matrices in both, got these in one alone: \['v'\]"):
        PruneMask({"w": torch.tensor([0])}, {"w": (2, 2), "v": (1, 1)})


@thorough
@given(drawn=masks(3))
def test_algebra_is_that_of_sets(drawn):
    a, b, c = drawn
    sets = [{(n, i) for n, indices in mask.items() for i in indices.tolist()} for mask in drawn]

    def members(mask: PruneMask) -> set[tuple[str, int]]:
        return {(n, i) for n, indices in mask.items() for i in indices.tolist()}

    assert members(a & b) == sets[0] & sets[1]
    assert members(a | b) == sets[0] | sets[1]
    assert members(a - b) == sets[0] - sets[1]
    assert a & b == b & a and a | b == b | a and (a | b) & c == (a & c) | (b & c)
    assert a - b == a - (a & b) and (a - b) | (a & b) == a and a & a == a == a | a and (a - a).total == 0
    assert a.jaccard(b) == (len(sets[0] & sets[1]) / len(sets[0] | sets[1]) if sets[0] | sets[1] else 1.0)
    assert (a == b) == (sets[0] == sets[1])


def test_algebra_keeps_what_both_masks_agree_on_and_names_its_parents():
    a, b = mask_of({"fingerprint": "f", "model": {"id": "m"}, "q": 1}, a=[1]), mask_of({"fingerprint": "f"}, a=[2])
    union = a | b
    assert union.metadata == {
        "kind": "algebra", "operation": "or", "parents": [a.digest, b.digest], "fingerprint": "f",
    }  # fmt: skip
    assert "fingerprint" not in (a & mask_of({"fingerprint": "g"})).metadata
    assert "fingerprint" not in (mask_of() - mask_of()).metadata
    with pytest.raises(MaskError, match=r"a.weight has the shape \(6, 5\) in one and \(5, 6\) in the other"):
        a & PruneMask({n: i for n, i in a.items()}, {**SHAPES, "a.weight": (5, 6)})
    with pytest.raises(MaskError, match=r"c.weight has the shape .* and None in the other"):
        a.jaccard(PruneMask({n: a[n] for n in list(SHAPES)[:2]}, {n: SHAPES[n] for n in list(SHAPES)[:2]}))
    with pytest.raises(MaskError, match="expected a PruneMask, got dict"):
        a | {"a.weight": torch.tensor([1])}
    with pytest.raises(MaskError, match="expected a PruneMask, got dict"):
        a.jaccard({})
    assert a != {"a.weight": a["a.weight"]} and a != mask_of(a=[1, 2])


def test_a_file_gives_the_same_mask_again(tmp_path):
    mask = PruneMask(
        {"b": torch.tensor([1, 5]), "a[3]": torch.empty(0, dtype=torch.int64)},
        {"b": (2, 3), "a[3]": (1, 1)},
        {"q": 1e-5, "report": {"zero": ["a[3]"]}},
        nominal=7,
    )
    again = PruneMask.load(mask.save(tmp_path / "m.safetensors"))
    assert again == mask and list(again) == ["b", "a[3]"] and again.digest == mask.digest
    assert (again.metadata, again.nominal, again.shapes) == (mask.metadata, 7, mask.shapes)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]
    assert load_file(tmp_path / "m.safetensors")["b"].tolist() == [1, 5]  # any reader of safetensors finds the indices


def test_a_mask_is_not_changed_by_what_happens_to_the_tensors_that_it_was_made_of():
    indices = torch.tensor([0, 1, 2])
    mask = PruneMask({"a": indices}, {"a": (2, 2)})
    indices[0] = 3
    assert mask["a"].tolist() == [0, 1, 2]


def test_a_folder_is_not_taken_for_a_file(tmp_path):
    with pytest.raises(ArtifactError, match="it is a folder; name a file"):
        mask_of({}, a=[1]).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_are_refused(tmp_path):
    mask, path = mask_of({"q": 0.1}, a=[1, 2], b=[3]), tmp_path / "m"
    whole = mask.save(path).read_bytes()
    for length in (0, 7, 30, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="truncated or no safetensors file"):
            PruneMask.load(path)
    path.write_bytes(whole[:-8] + (4).to_bytes(8, "little"))  # another index, as valid as the one that was saved
    with pytest.raises(ArtifactError, match="damaged: its contents are not those that were written"):
        PruneMask.load(path)
    path.write_bytes(whole.replace(b"0.1", b"0.2"))
    with pytest.raises(ArtifactError, match="damaged: its contents are not those that were written"):
        PruneMask.load(path)
    tensors, content = read_artifact(mask.save(path), "mask")
    write_artifact(path, "mask", {**tensors, "b.weight": torch.tensor([999])}, content)
    with pytest.raises(ArtifactError, match=r"damaged \(.*expected ascending, unique"):
        PruneMask.load(path)
    write_artifact(path, "mask", {"a.weight": tensors["a.weight"]}, content)
    with pytest.raises(ArtifactError, match=r"damaged \(indices and shapes: expected the same"):
        PruneMask.load(path)
    save_file({"a.weight": torch.tensor([1])}, path)
    with pytest.raises(ArtifactError, match="was not written by fastprune"):
        PruneMask.load(path)
    with pytest.raises(NotFoundError, match=r"mask file .* does not exist"):
        PruneMask.load(tmp_path / "none")
