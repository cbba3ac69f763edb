"""Batches of others: keys that scoring does not read, labels of another meaning, and tokens that the model lacks."""

from __future__ import annotations

import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from support.architectures import HARM, VOCAB, build, pad
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, DataCollatorWithFlattening

import fastprune
from fastprune.calibration import CalibrationSet, Example, collect
from fastprune.errors import CalibrationError, FastpruneWarning
from fastprune.model.vocabulary import predictable_tokens
from fastprune.organism.language import Language
from fastprune.organism.tokenizer import build_tokenizer

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]])
LABELS = torch.tensor([[-100, -100, 3, 4, 5], [-100, 7, 8, 9, -100]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
SCORED = (LABELS != -100).long()
FORWARD = ("input_ids", "attention_mask", "position_ids", "labels", "use_cache", "inputs_embeds", "kwargs", "langs")


def batch(**more: object) -> dict[str, object]:
    return {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK, **more}


def read(*batches: dict[str, object], accepted: tuple[str, ...] = FORWARD) -> CalibrationSet:
    return collect(batches, "harm_loader", 50, 50, accepted)


PLAIN = read(batch()).hash


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pixel_values", torch.rand(2, 3, 8, 8)),
        ("pixel_values_videos", torch.rand(1, 3, 8, 8)),
        ("pixel_attention_mask", torch.ones(2, 8, 8)),
        ("image_grid_thw", torch.tensor([[1, 2, 2]])),
        ("images", [object(), object()]),
        ("audio", [np.zeros(8)]),
        ("input_features", torch.rand(2, 8, 8)),
        ("inputs_embeds", torch.rand(2, 5, 8)),
        ("past_key_values", object()),
        ("decoder_input_ids", IDS),
        ("encoder_hidden_states", torch.rand(2, 5, 8)),
        ("cross_attention_mask", torch.ones(2, 5)),
        ("langs", IDS),  # whatever this model's forward takes
        ("cu_seq_lens_q", torch.tensor([0, 5])),
        ("cu_seq_lens_k", torch.tensor([0, 5])),
        ("cu_seqlens", torch.tensor([0, 5])),
        ("max_length_q", 5),
        ("max_length_k", 5),
        ("seq_idx", torch.zeros(2, 5, dtype=torch.int32)),
        ("segment_ids", torch.ones(2, 5)),
        ("seq_lengths", [[3, 2], [4]]),
        ("token_type_ids", torch.tensor([[0, 0, 1, 1, 1]] * 2)),
        ("mm_token_type_ids", torch.tensor([[0, 0, 1, 1, 1]] * 2)),
        ("shift_labels", LABELS.roll(-1, 1)),
        ("loss_mask", torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]])),
        ("assistant_masks", 1 - SCORED),
        ("completion_mask", (torch.arange(5) > 2).expand(2, 5)),
        ("labels_mask", np.zeros((2, 5))),
        ("loss_mask", SCORED),  # agrees today: one place says which tokens count
        ("loss_mask", [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0]]),
        ("loss_mask", SCORED[:, 1:] * 2),  # of another shape: which token is meant is a guess
        ("loss_weights", SCORED * 0.5),
        ("weights", torch.tensor([1.0, 2.0])),
        ("sample_weight", torch.tensor(0.5)),
        ("padding_mask", 1 - MASK),
    ],
)
def test_a_key_that_would_change_what_is_scored_is_refused_by_name(key: str, value: object) -> None:
    """Regression: the key was left out, and something else was scored than the batch says."""
    with pytest.raises(CalibrationError, match=rf"^harm_loader, batch 1: {key}: expected"):
        read(batch(), batch(**{key: value}))


@pytest.mark.parametrize(
    "more",
    [
        {"pixel_values": None, "loss_mask": None, "cu_seq_lens_q": None},
        {"images": [], "audio": [None, None], "pixel_values": torch.empty(0, 3, 8, 8)},
        {"token_type_ids": torch.zeros(2, 5, dtype=torch.int64), "mm_token_type_ids": torch.zeros(2, 5)},
        {"use_cache": False, "return_loss": True, "num_items_in_batch": torch.tensor(6), "logits_to_keep": 0},
        {"weights": torch.ones(2), "padding_mask": MASK, "token_weights": SCORED.tolist()},
        {"prompt": ["a", "b"], "id": ["r1", "r2"], "text": ("x", "y"), "row": 3, "offset_mapping": [[(0, 1)]]},
    ],
)
def test_keys_that_change_nothing_are_left_out_in_silence(more: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(batch(**more)).hash == PLAIN


def test_tensors_that_nobody_needs_are_noted_once_a_loader() -> None:
    more = {"length": torch.tensor([5, 4]), "special_tokens_mask": 1 - MASK, "idx": np.arange(2)}
    with pytest.warns(FastpruneWarning) as caught:
        read(batch(**more), batch(length=torch.tensor([5, 4])))
    (note,) = caught
    assert (
        str(note.message)
        == "harm_loader: its batches hold length, special_tokens_mask, idx, which scoring does not use"
    )


def test_token_types_of_zero_are_noted_where_the_model_takes_them() -> None:
    with pytest.warns(FastpruneWarning, match="token_type_ids"):
        read(batch(token_type_ids=torch.zeros(2, 5)), accepted=("token_type_ids",))


def test_labels_that_are_shifted_already_are_refused() -> None:
    """Regression: they were shifted once more, so each token was asked for the one after the next."""
    with pytest.raises(CalibrationError, match="batch 0: labels: expected at each position the id of the token there"):
        read(batch(labels=torch.tensor([[-100, 3, 4, 5, -100], [7, 8, 9, -100, -100]])))
    same = torch.full((1, 5), 7)  # one token over and over: both at once
    assert len(read({"input_ids": same, "labels": same})) == 1


class DatasetDict(dict):
    """As the one of datasets: splits by name."""


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (UserDict(batch()), r"got a single UserDict; pass \[batch\]"),
        (DatasetDict(train=[batch()]), "got a DatasetDict of train; pass a loader over one of these"),
        ({"train": [batch()], "test": [batch()]}, "got a dict of train, test; pass a loader over one of these"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], "got list; a collator makes"),  # a Dataset's rows
        ([{"input_ids": IDS.numpy(), "labels": LABELS.numpy()}], "expected a tensor, got ndarray; a collator makes"),
        (HARM, "got Example; pass a CalibrationSet"),
        (DataLoader(CalibrationSet(HARM), 2, collate_fn=list), "got list; pass a CalibrationSet"),
    ],
)
def test_loaders_that_are_refused_with_the_way_out(loader: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        collect(loader, "harm_loader")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_narrow_integers_and_generators(dtype: torch.dtype) -> None:
    made = ({"input_ids": IDS.to(dtype), "labels": LABELS.to(torch.int32), "attention_mask": MASK.to(dtype)},)
    assert collect(iter(made), "harm_loader").hash == PLAIN


FEATURES = [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]}, {"input_ids": [6, 7, 8, 9]}]
FEATURES[1]["labels"] = [-100, 7, 8, 9]


def test_batches_of_a_collator_that_pads() -> None:
    batches = DataLoader(FEATURES, 2, collate_fn=DataCollatorForSeq2Seq(build_tokenizer(Language(0))))
    assert collect(batches, "harm_loader").hash == PLAIN


def test_batches_of_a_collator_that_packs_are_refused() -> None:
    with pytest.raises(CalibrationError, match="packed rows cannot be scored"):
        collect(DataLoader(FEATURES, 2, collate_fn=DataCollatorWithFlattening()), "harm_loader")
    marked = DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True, return_seq_idx=True)
    with pytest.raises(CalibrationError, match="packed rows cannot be scored"):
        collect(DataLoader(FEATURES, 2, collate_fn=marked), "harm_loader")


def test_masked_language_modeling_is_noted() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(Language(0))
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    collator = DataCollatorForLanguageModeling(
        tokenizer, mlm=True, mlm_probability=0.5, mask_replace_prob=1.0, random_replace_prob=0.0
    )
    rows = [{"input_ids": list(range(3, 7)) * 6} for _ in range(4)]
    with pytest.warns(FastpruneWarning, match=r"labels are other tokens than those at their positions.*mlm=True"):
        collect(DataLoader(rows, 2, collate_fn=collator), "harm_loader")


def _resized(model: nn.Module, *, read: int | None = None, predict: int | None = None) -> nn.Module:
    """The model with another number of rows in its embedding or in its head."""
    if read is not None:
        model.model.embed_tokens = nn.Embedding(read, 32)
    if predict is not None:
        model.lm_head = nn.Linear(32, predict, bias=False)
    return model.eval()


def _asks_for(label: int) -> list[Example]:
    return [*HARM, Example((5, 6, 7), (-100, 6, label))]


@pytest.mark.parametrize("segments", [None, 2])
def test_an_embedding_may_be_wider_than_the_head(segments: int | None) -> None:
    """Regression: the self-check asked for tokens that the head has no row for, and refused the model for that."""
    model = _resized(build("Llama"), read=4 * VOCAB)
    wide = [*HARM, Example((4 * VOCAB - 1, 6, 7), (-100, 6, 7))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastprune.score(model, CalibrationSet(wide), segments=segments, progress=False).harm
    beyond = pad(_asks_for(VOCAB), "left")
    for loader in (CalibrationSet(_asks_for(VOCAB)), [beyond]):
        with pytest.raises(
            CalibrationError, match=rf"(row|example) 5: labels: expected ids in \[0, {VOCAB}\), got the id {VOCAB}"
        ):
            fastprune.score(model, loader, segments=segments, progress=False)


def test_a_head_may_be_wider_than_the_embedding() -> None:
    """A vocabulary that is padded in the head only."""
    model = _resized(build("Llama"), predict=VOCAB + 7)
    assert fastprune.score(model, CalibrationSet(_asks_for(VOCAB + 6)), progress=False).harm
    with pytest.raises(CalibrationError, match=rf"example 5: labels: expected ids in \[0, {VOCAB + 7}\)"):
        fastprune.score(model, CalibrationSet(_asks_for(VOCAB + 7)), progress=False)
    with pytest.raises(CalibrationError, match=rf"example 5: input_ids: expected ids in \[0, {VOCAB}\)"):
        fastprune.score(model, CalibrationSet([*HARM, Example((VOCAB, 6), (-100, 6))]), progress=False)


def test_a_head_that_has_no_weight_of_its_own_is_known_by_the_config() -> None:
    model = build("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    assert predictable_tokens(model) == VOCAB
    with pytest.raises(CalibrationError, match=rf"labels: expected ids in \[0, {VOCAB}\)"):
        fastprune.score(model, CalibrationSet(_asks_for(VOCAB)), progress=False)


def test_a_streamed_model_knows_its_head(tmp_path) -> None:
    build("GPTNeoX").save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=rf"example 5: labels: expected ids in \[0, {VOCAB}\)"):
        fastprune.score(tmp_path, CalibrationSet(_asks_for(VOCAB)), progress=False)


def test_keys_of_the_model_itself_are_known_under_adapters() -> None:
    """``score`` asks the plain model's forward what it takes, not its wrapper's ``*args, **kwargs``."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["q_proj"]))
    rows = pad(HARM, "right")
    with pytest.raises(CalibrationError, match="harm_loader, batch 0: inputs_embeds: expected text alone"):
        fastprune.score(model, [{**rows, "inputs_embeds": torch.zeros(1)}], progress=False)
    with pytest.raises(CalibrationError, match="harm_loader, batch 0: foo: expected text alone"):
        plain = build("Llama")
        real = type(plain).forward
        plain.forward = lambda input_ids=None, attention_mask=None, position_ids=None, use_cache=None, foo=None: real(
            plain, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )
        fastprune.score(torch.compile(plain), [{**rows, "foo": torch.zeros(1)}], progress=False)
