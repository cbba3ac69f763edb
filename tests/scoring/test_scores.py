"""Which scores are kept, and the file that holds them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastprune import ops
from fastprune.artifact import read_artifact, write_artifact
from fastprune.errors import ArgumentError, ArtifactError, NotFoundError, ScoringError, SelectionError
from fastprune.masking.mask import PruneMask
from fastprune.planning import list_lengths
from fastprune.scoring.scores import Scores
from fastprune.scoring.top_scores import TopScores, TopScoresCollector

# how long an example takes is not what these tests are about
thorough = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def no_small_matrices(monkeypatch):
    """Tiny matrices are otherwise kept whole, and nothing of what follows would be seen."""
    monkeypatch.setattr(list_lengths, "SMALL_MATRIX", 0)


def dense_order(scores: torch.Tensor) -> list[tuple[float, int]]:
    """Every (score, flat index) by descending score, ties by ascending index: a plain sort."""
    return sorted(((float(s), i) for i, s in enumerate(scores.flatten())), key=lambda item: (-item[0], item[1]))


def run_keeper(
    matrices: dict[str, torch.Tensor], fraction: float, visits: list[str] | None = None, together: int = 1
) -> dict[str, TopScores]:
    """Keep scores that are given, so many matrices at a time: weight -1 makes ``signed`` the statistic itself."""
    keeper = TopScoresCollector({name: scores.numel() for name, scores in matrices.items()}, fraction, n_lists=1)
    visits = visits or list(reversed(matrices))
    for start in range(0, len(visits), together):
        some = visits[start : start + together]
        keeper.add({name: (-torch.ones_like(matrices[name]), matrices[name]) for name in some}, "signed")
    return keeper.finish()


@st.composite
def score_matrices(draw) -> dict[str, torch.Tensor]:
    matrices = {}
    for number in range(draw(st.integers(1, 5))):
        numel = draw(st.integers(1, 30))
        values = draw(st.lists(st.integers(-3, 6), min_size=numel, max_size=numel))
        hot = draw(st.sampled_from([1.0, 1.0, 100.0]))
        matrices[f"m{number}"] = torch.tensor(values, dtype=torch.float32)[None] * hot
    return matrices


def with_small_matrices(n: int):
    """Hypothesis does not reset fixtures between examples, so this one sets the constant itself."""
    patch = pytest.MonkeyPatch()
    patch.setattr(list_lengths, "SMALL_MATRIX", n)
    return patch


@thorough
@given(matrices=score_matrices(), fraction=st.sampled_from([0.01, 0.05, 0.2, 0.5, 1.0]), data=st.data())
def test_kept_lists_are_prefixes_that_hold_the_local_and_the_global_top(matrices, fraction, data):
    visits = data.draw(st.permutations(list(matrices)))
    together = data.draw(st.integers(1, len(visits)))
    patch = with_small_matrices(0)
    kept = run_keeper(matrices, fraction, visits, together)
    patch.undo()
    assert list(kept) == list(matrices)
    everything = []
    for position, (name, scores) in enumerate(matrices.items()):
        order, some = dense_order(scores), kept[name]
        assert list(zip(some.values.tolist(), some.indices.tolist(), strict=True)) == order[: len(some)]
        assert some.indices.dtype == torch.int64 and some.values.dtype == torch.float32
        assert some.floor == (order[len(some)][0] if len(some) < len(order) else -math.inf)
        assert some.complete == (len(some) == scores.numel())
        assert len(some) >= math.ceil(fraction * scores.numel())
        everything += [(-score, position, index, name) for score, index in order if score > 0]
    n_global = math.ceil(fraction * sum(scores.numel() for scores in matrices.values()))
    for _, _, index, name in sorted(everything)[:n_global]:
        assert index in kept[name].indices
    for name, scores in matrices.items():  # and nothing more than that
        local = math.ceil(fraction * scores.numel())
        highest = sum(owner == name for _, _, _, owner in sorted(everything)[:n_global])
        assert len(kept[name]) == max(local, highest)


def test_small_matrices_are_kept_whole_unless_all_lists_together_are_too_large(monkeypatch):
    monkeypatch.setattr(list_lengths, "SMALL_MATRIX", 8)
    matrices = {"a": torch.randn(4, 25), "b": torch.randn(1, 5), "c": torch.randn(4, 25)}
    lengths = {name: len(some) for name, some in run_keeper(matrices, 0.01).items()}
    assert lengths == {"a": 8, "b": 5, "c": 8}
    monkeypatch.setattr(list_lengths, "SMALL_BYTES", 12 * 21)  # the limit itself is too much
    assert sum(len(some) for some in run_keeper(matrices, 0.01).values()) < 8
    monkeypatch.setattr(list_lengths, "SMALL_BYTES", 12 * 21 + 1)
    assert {name: len(some) for name, some in run_keeper(matrices, 0.01).items()} == lengths
    keeper = TopScoresCollector({"a": 100, "b": 5, "c": 100}, 0.01, n_lists=2)  # two lists share the limit
    keeper.add({"a": (torch.ones(100, 1), None)}, "magnitude")
    keeper.add({"b": (torch.ones(5, 1), None)}, "magnitude")
    keeper.add({"c": (torch.ones(100, 1), None)}, "magnitude")
    assert [len(some) for some in keeper.finish().values()] == [3, 1, 1]  # a has the global top 3, ties by order


def test_a_fraction_of_one_keeps_everything(no_small_matrices):
    matrices = {"a": torch.randn(7, 3), "b": torch.randn(2, 2)}
    assert all(some.complete and some.floor == -math.inf for some in run_keeper(matrices, 1.0).values())


def test_cold_matrices_are_asked_for_no_more_than_their_share(no_small_matrices, monkeypatch):
    """Growing the request where nothing can come of it would sort the whole model."""
    asked = []
    genuine = ops.top_scores_of_each

    def spy(matrices, criterion, ks, *, backend=None):
        asked.append(list(ks.values()))
        return genuine(matrices, criterion, ks, backend=backend)

    monkeypatch.setattr(ops, "top_scores_of_each", spy)
    cold = torch.linspace(0.1, 0.2, 1000)[None]
    matrices = {"cold1": cold, "cold2": cold, "hot": torch.linspace(10, 20, 1000)[None]}
    # The hot matrix is visited first.
    for together, expected in ((1, [[11], [31], [11], [11]]), (3, [[11, 11, 11], [31]])):
        kept = run_keeper(matrices, 0.01, together=together)
        assert [len(kept[name]) for name in matrices] == [10, 10, 30]
        assert asked == expected
        asked.clear()


def test_what_is_kept_meanwhile_stays_bounded(no_small_matrices):
    """With scores that rise from matrix to matrix every one of them holds all of the top of those before it."""
    keeper = TopScoresCollector({f"m{i}": 100 for i in range(40)}, 0.02, n_lists=1)
    for i in range(40):
        keeper.add({f"m{i}": (torch.full((100, 1), i + 1.0), None)}, "magnitude")
        assert sum(map(len, keeper._kept.values())) <= 40 * 2 + 2 * 80
    assert [len(some) for some in keeper.finish().values()] == [2] * 39 + [80]


def test_lists_of_a_journal_can_be_inserted(no_small_matrices):
    matrices = {f"m{i}": torch.randn(5, 20) * (i + 1) for i in range(4)}
    expected = run_keeper(matrices, 0.1)
    keeper = TopScoresCollector({name: 100 for name in matrices}, 0.1, n_lists=1)
    for name in ("m3", "m1"):
        keeper.insert(name, expected[name])
    for name in ("m2", "m0"):
        keeper.add({name: (-torch.ones(5, 20), matrices[name])}, "signed")
    for name, some in keeper.finish().items():
        assert torch.equal(some.indices, expected[name].indices) and some.floor == expected[name].floor


def test_a_matrix_without_elements(no_small_matrices):
    keeper = TopScoresCollector({"a": 0, "b": 4}, 0.5, n_lists=1)
    keeper.add({"a": (torch.ones(0, 3), None), "b": (torch.ones(2, 2), None)}, "magnitude")
    assert {name: len(kept) for name, kept in keeper.finish().items()} == {"a": 0, "b": 2}


def test_a_keeper_refuses_what_it_cannot_place():
    keeper = TopScoresCollector({"a": 4, "b": 4}, 0.5, n_lists=1)
    with pytest.raises(ArgumentError, match="c: expected one of the 2 matrices"):
        keeper.add({"c": (torch.ones(2, 2), None)}, "magnitude")
    with pytest.raises(ArgumentError, match="a: expected 4 weights, got 6"):
        keeper.add({"a": (torch.ones(2, 3), None)}, "magnitude")
    keeper.add({"a": (torch.ones(2, 2), None)}, "magnitude")
    with pytest.raises(ArgumentError, match="a: expected a matrix that was not added before"):
        keeper.add({"a": (torch.ones(2, 2), None)}, "magnitude")
    with pytest.raises(ScoringError, match=r"b: .* flat index 1,.* is not a number"):
        keeper.add({"b": (torch.ones(2, 2), torch.tensor([[1.0, math.nan], [1, 1]]))}, "signed")
    with pytest.raises(ScoringError, match="1 of 2 matrices were never scored, the first is b"):
        keeper.finish()
    for fraction in (0, -1, 1.1, math.nan):
        with pytest.raises(ArgumentError, match=r"expected a number in \(0, 1\]"):
            TopScoresCollector({"a": 4}, fraction, n_lists=1)
    with pytest.raises(ArgumentError, match="at least one matrix"):
        TopScoresCollector({}, 0.5, n_lists=1)


SHAPES = {"a": (3, 4), "b": (2, 5)}


def make_scores(fraction: float = 0.5) -> Scores:
    generator = torch.Generator().manual_seed(0)
    dense = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    lists = run_keeper(dense, fraction)
    other = run_keeper({name: scores.abs() for name, scores in dense.items()}, fraction)
    provenance = {"model": {"id": "toy", "fingerprint": "f" * 64}, "block_of": {"a": 0, "b": 1}}
    return Scores({"signed": lists, "fisher": other}, {"abs": other}, SHAPES, provenance, fraction, fraction)


def same(one: dict[str, TopScores], other: dict[str, TopScores]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(a.indices, other[name].indices)
        and torch.equal(a.values, other[name].values)
        and (a.numel, a.floor) == (other[name].numel, other[name].floor)
        for name, a in one.items()
    )


def test_scores_give_lists_by_role_and_criterion():
    scores = make_scores()
    assert scores.names == ("a", "b") and scores.shapes == SHAPES
    assert scores.criteria == {"harm": ("signed", "fisher"), "benign": ("abs",)}
    assert same(scores.harm, scores.of("harm", "signed")) and same(scores.benign, scores.of("harm", "fisher"))
    with pytest.raises(SelectionError, match="harm: expected one of the scored criteria signed, fisher, got 'wanda'"):
        scores.of("harm", "wanda")
    with pytest.raises(SelectionError, match="role: expected one of harm, benign, got 'utility'"):
        scores.of("utility")
    alone = Scores({"signed": scores.harm}, {}, SHAPES, {}, 1.0, 1.0)
    assert alone.benign == {}
    with pytest.raises(SelectionError, match="no benign set; select with p=None"):
        alone.of("benign")


def test_scores_must_cover_their_matrices():
    lists = make_scores().harm
    with pytest.raises(ScoringError, match=r"harm signed: expected the matrices of shapes .* \['b'\]"):
        Scores({"signed": {"a": lists["a"]}}, {}, SHAPES, {}, 1.0, 1.0)
    with pytest.raises(ScoringError, match="the order"):
        Scores({"signed": {"b": lists["b"], "a": lists["a"]}}, {}, SHAPES, {}, 1.0, 1.0)
    with pytest.raises(ScoringError, match=r"a has 12 weights, its shape says \(3, 5\)"):
        Scores({"signed": lists}, {}, {**SHAPES, "a": (3, 5)}, {}, 1.0, 1.0)
    with pytest.raises(ScoringError, match="at least one harm criterion"):
        Scores({}, {}, SHAPES, {}, 1.0, 1.0)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_file_gives_the_same_scores_again(tmp_path, fraction):
    scores = make_scores(fraction)
    path = scores.save(tmp_path / "s.safetensors")
    again = Scores.load(str(path))
    for role, criteria in scores.criteria.items():
        for criterion in criteria:
            assert same(scores.of(role, criterion), again.of(role, criterion))
    assert (again.criteria, again.shapes, again.provenance) == (scores.criteria, scores.shapes, scores.provenance)
    assert (again.p_max, again.q_max) == (fraction, fraction)
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable for whom the user lets read
    assert again.select(0.2, 0.3) == scores.select(0.2, 0.3)


def test_truncated_files_are_refused(tmp_path):
    whole = make_scores().save(tmp_path / "s.safetensors").read_bytes()
    for length in (0, 4, 8, 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match="truncated or no safetensors file"):
            Scores.load(tmp_path / "cut")


def test_equal_scores_are_equal_files(tmp_path):
    """Guards the order of the metadata, which the format's writer draws anew for every file."""
    files = {make_scores().save(tmp_path / str(number)).read_bytes() for number in range(8)}
    assert len(files) == 1


def test_foreign_files_are_refused(tmp_path):
    scores, path = make_scores(), tmp_path / "f"
    path.write_text("prompt,response\na,b\n")
    with pytest.raises(ArtifactError, match="truncated or no safetensors file"):
        Scores.load(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ArtifactError, match="was not written by fastprune"):
        Scores.load(path)
    save_file({"a": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match="was not written by fastprune"):
        Scores.load(path)
    PruneMask({"a": torch.tensor([0])}, {"a": (1, 2)}).save(path)
    with pytest.raises(ArtifactError, match="is a mask file, expected a scores file"):
        Scores.load(path)
    save_file({"a": torch.ones(2)}, path, {"fastprune": '{"kind": "scores", "version": 99, "content": {}}'})
    with pytest.raises(
        ArtifactError, match=r"has version 99, this fastprune reads version 3 of scores files; .*`fastprune score`"
    ):
        Scores.load(path)
    for entry in ("3", "[]", "{}", '{"kind": "scores"', '{"kind": "scores", "version": 3, "content": {}}'):
        save_file({"a": torch.ones(2)}, path, {"fastprune": entry})
        with pytest.raises(ArtifactError, match="cannot be read"):
            Scores.load(path)
    for content in ({}, [], {"shapes": 3}):
        write_artifact(path, "scores", {"a": torch.ones(2)}, content)
        with pytest.raises(ArtifactError):
            Scores.load(path)
    with pytest.raises(NotFoundError, match=r"missing\.safetensors does not exist"):
        Scores.load(tmp_path / "missing.safetensors")
    with pytest.raises(NotFoundError, match=r"the folder .*nowhere does not exist"):
        scores.save(tmp_path / "nowhere" / "s")


def test_a_file_of_which_one_bit_has_changed_is_refused(tmp_path):
    path = make_scores().save(tmp_path / "s.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtifactError, match="damaged: its contents are not those that were written"):
            Scores.load(path)


@pytest.mark.parametrize("key", ["indices", "values", "lengths", "floors"])
def test_lists_that_are_not_in_order_are_refused(tmp_path, key):
    path = make_scores().save(tmp_path / "s.safetensors")
    tensors, content = read_artifact(path, "scores")
    name = f"harm/signed/{key}"
    damaged = tensors[name][:-1] if key == "floors" else tensors[name].flip(0)
    if key == "indices":
        damaged = tensors[name].clone()
        damaged[0] = 12  # one past the end of the first matrix
    if key == "lengths":
        damaged = tensors[name] + 1
    write_artifact(path, "scores", {**tensors, name: damaged}, content)
    with pytest.raises(ArtifactError, match=r"harm/signed .* damaged"):
        Scores.load(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = make_scores().save(tmp_path / "s.safetensors")
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        make_scores(1.0).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
    odd = make_scores()
    odd.provenance["now"] = object()
    with pytest.raises(ArtifactError, match="not JSON-able"):
        odd.save(path)
