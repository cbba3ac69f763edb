"""Micro-batches, and loaders that come from elsewhere."""

from __future__ import annotations

import itertools

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from fastprune.calibration import CalibrationSet, Example, collect, micro_batches
from fastprune.calibration.examples import BATCH_COST
from fastprune.errors import ArgumentError, CalibrationError

# how long an example takes is not what these tests are about
thorough = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def example_lists(draw) -> list[Example]:
    examples = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = tuple(draw(st.lists(st.integers(0, 3), min_size=2, max_size=7)))
        scored = draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1))
        scored[-1] = True
        examples.append(Example(tokens, (-100, *(t if s else -100 for t, s in zip(tokens[1:], scored, strict=True)))))
    return examples


@thorough
@given(examples=example_lists(), budget=st.integers(1, 40))
def test_every_example_is_in_one_micro_batch_and_the_budget_is_kept(examples, budget):
    seen = []
    for batch in micro_batches(examples, budget):
        rows, width = batch.input_ids.shape
        assert rows * width <= budget or rows == 1
        assert batch.labels.shape == batch.attention_mask.shape == (rows, width)
        assert width == int(batch.lengths.max())
        assert {t.dtype for t in (batch.input_ids, batch.labels, batch.attention_mask, batch.lengths)} == {torch.int64}
        for row, index in enumerate(batch.example_indices):
            n = len(examples[index])
            assert int(batch.lengths[row]) == n
            assert tuple(batch.input_ids[row, :n].tolist()) == examples[index].input_ids
            assert tuple(batch.labels[row, :n].tolist()) == examples[index].labels
            assert batch.attention_mask[row].tolist() == [1] * n + [0] * (width - n)
            assert (batch.input_ids[row, n:] == examples[index].input_ids[-1]).all()
            assert (batch.labels[row, n:] == -100).all()
            seen.append(index)
    assert sorted(seen) == list(range(len(examples)))


SAME_IDS = [Example((1, 2, 3), (-100, 2, 3)), Example((1, 2, 3), (-100, -100, 3))]


@thorough
@given(examples=example_lists(), budget=st.integers(1, 40), data=st.data())
@hypothesis.example(
    examples=[Example((1, 2, 3), (-100, 2, 3)), Example((1, 2, 3), (-100, -100, 3))], budget=3, data=None
)
def test_the_order_of_the_examples_does_not_matter(examples, budget, data):
    shuffled = examples[::-1] if data is None else data.draw(st.permutations(examples))
    for one, other in zip(micro_batches(examples, budget), micro_batches(shuffled, budget), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.attention_mask, other.attention_mask)


def test_micro_batches_group_similar_lengths():
    """With lengths 2 and 9 mixed, an unsorted grouping would pad the short ones to 9."""
    examples = [Example((1,) * n, (-100,) + (1,) * (n - 1)) for n in (9, 2, 9, 2, 9, 2)]
    assert [tuple(batch.input_ids.shape) for batch in micro_batches(examples, 18)] == [(3, 2), (2, 9), (1, 9)]


@thorough
@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=8), budget=st.integers(1, 900))
def test_the_cuts_are_the_cheapest(lengths, budget):
    """Against every way to cut the sorted lengths: padded tokens, and a price for each micro-batch."""

    def cost(cuts: tuple[int, ...]) -> float:
        runs = [lengths[a:b] for a, b in itertools.pairwise([0, *cuts, len(lengths)])]
        fits = all(len(run) * run[-1] <= budget or len(run) == 1 for run in runs)
        return sum(len(run) * run[-1] + BATCH_COST for run in runs) if fits else float("inf")

    lengths = sorted(lengths)
    batches = micro_batches([Example((1,) * n, (-100,) + (1,) * (n - 1)) for n in lengths], budget)
    every = (c for k in range(len(lengths)) for c in itertools.combinations(range(1, len(lengths)), k))
    assert sum(batch.input_ids.numel() + BATCH_COST for batch in batches) == min(map(cost, every))


@pytest.mark.parametrize("budget", [0, -1, 1.5, True, None])
def test_a_budget_that_is_no_positive_integer_is_refused(budget):
    with pytest.raises(ArgumentError, match="batch_tokens: expected a positive integer"):
        micro_batches([Example((1, 2), (-100, 2))], budget)


def pad(examples: list[Example], side: str, pad_id: int = 0, extra: int = 0) -> dict[str, torch.Tensor]:
    """An HF batch, padded on either side, with ``extra`` columns of padding."""
    width = max(map(len, examples)) + extra
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for example in examples:
        gap = width - len(example)
        for key, values, filler in (
            ("input_ids", example.input_ids, pad_id),
            ("labels", example.labels, -100),
            ("attention_mask", (1,) * len(example), 0),
        ):
            fill = [filler] * gap
            rows[key].append([*values, *fill] if side == "right" else [*fill, *values])
    return {key: torch.tensor(values) for key, values in rows.items()}


@given(
    examples=example_lists(), side=st.sampled_from(["left", "right"]), extra=st.integers(0, 2), rows=st.integers(1, 5)
)
def test_padding_on_either_side_gives_the_same_examples(examples, side, extra, rows):
    batches = [pad(examples[i : i + rows], side, extra=extra) for i in range(0, len(examples), rows)]
    assert list(collect(batches, "harm_loader", vocab_size=4)) == examples


def batch(**changes: object) -> dict[str, object]:
    """Two rows of three tokens; the second has one token of padding on the right."""
    rows = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "labels": torch.tensor([[-100, 2, 3], [-100, 5, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    rows.update(changes)
    return rows


EXAMPLES = [Example((1, 2, 3), (-100, 2, 3)), Example((4, 5), (-100, 5))]


@pytest.mark.parametrize(
    "given_batch",
    [
        batch(),
        BatchEncoding(batch()),
        batch(attention_mask=torch.tensor([[True, True, True], [True, True, False]])),
        batch(input_ids=torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32)),
        batch(input_ids=torch.tensor([[1, 2, 3], [4, 5, 99]])),  # a pad id outside the vocabulary
        batch(input_ids=torch.tensor([[1, 2, 3], [4, 5, -100]])),
        batch(position_ids=torch.tensor([[0, 1, 2], [0, 1, 1]])),
        batch(position_ids=torch.arange(3)[None]),
        batch(labels=torch.tensor([[1, 2, 3], [4, 5, -100]])),  # labels = input_ids: the first token is dropped
        batch(token_type_ids=None, length=3),
    ],
)
def test_batches_that_mean_the_same(given_batch):
    assert list(collect([given_batch], "harm_loader", vocab_size=6)) == EXAMPLES


def test_without_a_mask_every_token_is_real():
    for mask in ({}, {"attention_mask": None}):
        given_batch = {key: value for key, value in batch().items() if key != "attention_mask"} | mask
        assert list(collect([given_batch], "x"))[1] == Example((4, 5, 0), (-100, 5, -100))


@pytest.mark.filterwarnings("ignore:.*are other tokens than those at their positions")
def test_labels_may_differ_from_the_ids():
    got = collect(
        [
            {
                "input_ids": torch.tensor([[9, 1, 2, 3, 9]]),
                "labels": torch.tensor([[-100, 1, 7, 8, -100]]),
                "attention_mask": torch.tensor([[0, 1, 1, 1, 0]]),
            }
        ],
        "x",
    )
    assert list(got) == [Example((1, 2, 3), (-100, 7, 8))]


def test_a_loader_is_read_exactly_once():
    starts = []

    class Once:
        def __iter__(self):
            starts.append(1)
            yield batch()
            yield batch()

    assert len(collect(Once(), "x")) == 4 and starts == [1]
    assert len(collect((b for b in [batch()]), "x")) == 2


def test_a_set_and_its_loader_pass_through():
    whole = CalibrationSet(EXAMPLES)
    assert collect(whole, "x") is whole
    assert collect(whole.loader(4), "x", vocab_size=6) is whole
    assert collect(list(whole.loader(4)), "x").hash == whole.hash
    with pytest.raises(
        CalibrationError, match=r"harm_loader, example 1: input_ids: expected ids in \[0, 5\), got the id 5"
    ):
        collect(whole.loader(), "harm_loader", vocab_size=5)
    odd_label = CalibrationSet([Example((1, 2), (-100, 9))])
    with pytest.raises(CalibrationError, match=r"labels: expected ids in \[0, 5\), got the id 9"):
        collect(odd_label, "harm_loader", vocab_size=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"batch 1: expected the key labels, got \['attention_mask', 'input_ids', 'labels'\]"),
        ({"input_ids": None}, "batch 1: expected the key input_ids"),
        (
            {"labels": torch.tensor([[-100, 2], [-100, 5]])},
            r"labels: expected the shape of input_ids \(2, 3\), got \(2, 2\)",
        ),
        ({"labels": torch.tensor([-100, 2, 3])}, r"labels: expected the shape of input_ids"),
        ({"attention_mask": torch.ones(2, 1, 3, 3, dtype=torch.int64)}, "attention_mask: expected the shape"),
        ({"attention_mask": torch.tensor([[1, 1, 2], [1, 1, 0]])}, r"expected 0 and 1 only, got \[0, 1, 2\]"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask: expected int64, got torch.float32"),
        ({"input_ids": torch.tensor([1, 2, 3])}, r"input_ids: expected the shape \(rows, tokens\), got \(3,\)"),
        ({"input_ids": torch.rand(2, 3)}, "input_ids: expected int64, got torch.float32"),
        ({"input_ids": [[1, 2, 3], [4, 5, 0]]}, "input_ids: expected a tensor, got list"),
        ({"labels": torch.rand(2, 3)}, "labels: expected int64, got torch.float32"),
        (
            {"input_ids": torch.tensor([[1, 2, 6], [4, 5, 0]])},
            r"batch 1, row 0: input_ids: expected ids in \[0, 6\), got the id 6",
        ),
        ({"input_ids": torch.tensor([[1, 2, 3], [4, -1, 0]])}, "batch 1, row 1: input_ids: expected .* got the id -1"),
        (
            {"labels": torch.tensor([[-100, 2, 6], [-100, 5, -100]])},
            r"row 0: labels: expected ids in \[0, 6\), got the id 6",
        ),
        ({"labels": torch.tensor([[-100, 2, 3], [-100, -1, -100]])}, r"row 1: labels: expected .* got the id -1"),
        ({"labels": torch.tensor([[-100, 2, 3], [-100, 5, 0]])}, "row 1: labels scores token 2, which attention_mask"),
        ({"labels": torch.tensor([[-100, 2, 3], [-100, -100, -100]])}, "batch 1, row 1: no scored token"),
        (
            {"labels": torch.tensor([[-100, 2, 3], [4, -100, -100]])},
            r"row 1: no scored token \(the first real token never",
        ),
        (
            {
                "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]]),
                "labels": torch.tensor([[-100, 2, 3], [-100] * 3]),
            },
            "row 1: attention_mask leaves out every token",
        ),
        (  # regression: holes were taken out, and another text than the caller's was scored
            {
                "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
                "labels": torch.tensor([[-100, 2, 3], [-100, -100, 5]]),
            },
            r"row 1: attention_mask: expected zeros on the left and right only, got 2 runs .* begin at \[0, 2\]",
        ),
        ({"position_ids": torch.tensor([[0, 1, 0], [0, 1, 0]])}, "packed rows cannot be scored"),
        ({"position_ids": torch.arange(2)[None]}, r"position_ids: expected the shape \(rows, tokens\)"),
    ],
)
def test_batches_that_are_refused_by_name(changes, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        collect([batch(), batch(**changes)], "benign_loader", vocab_size=6)
    assert str(caught.value).startswith("benign_loader, batch 1")


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "harm_loader: expected at least one example, got none"),
        (iter(()), "harm_loader: expected at least one example, got none"),
        ([{k: v[:0] for k, v in batch().items()}], "harm_loader: expected at least one example, got none"),
        (None, "harm_loader: expected an iterable of batches, got NoneType"),
        ("harm.jsonl", r"got a path; read it with load_calibration"),
        (batch(), r"got a single dict; pass \[batch\]"),
        ([torch.tensor([[1]])], "harm_loader, batch 0: expected a mapping with input_ids and labels, got Tensor"),
    ],
)
def test_loaders_that_are_refused_by_name(loader, message):
    with pytest.raises(CalibrationError, match=message):
        collect(loader, "harm_loader")


def test_a_micro_batch_says_what_its_loss_is_of() -> None:
    examples = [
        Example((5, 6, 7), (-100, -100, 7), id="b", ends_turn=True),
        Example((8, 9, 10, 11), (-100, 9, 3, -100)),  # the label need not be the token
    ]
    (batch,) = micro_batches(examples, 100)
    assert batch.names == ("example 0 (id b)", "example 1")
    assert batch.scored.tolist() == [1, 4, 5] and batch.rows_of_scored.tolist() == [0, 1, 1]
    assert batch.targets.tolist() == [7, 9, 3] and batch.token_weights.tolist() == [1.0, 0.5, 0.5]
    assert batch.labels.tolist() == [[-100, -100, 7, -100], [-100, 9, 3, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2], [0, 1, 2, 3]]
    assert batch.ends_turn.tolist() == [True, False]


def test_lengths_stay_on_the_cpu_wherever_a_micro_batch_goes() -> None:
    (batch,) = micro_batches([Example((5, 6, 7), (-100, 6, 7))], 100)
    moved = batch.to(torch.device("meta"))
    devices = {name: value.device.type for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert devices.pop("lengths") == "cpu" and set(devices.values()) == {"meta"}
    assert (moved.names, moved.example_indices) == (batch.names, batch.example_indices)
