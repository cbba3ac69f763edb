"""Greedy generation against transformers' own, padding, stopping, and the model's state."""

from __future__ import annotations

import functools
import itertools
import json

import pytest
import torch
from support.generation import (
    ARCHITECTURES,
    END,
    EOS,
    TEMPLATE,
    VOCABULARY,
    Scripted,
    continue_greedily,
    tiny_model,
    word_tokenizer,
)
from torch import nn

from fastprune.calibration import Encoder, Row
from fastprune.errors import ArgumentError, CalibrationError, ModelError, NotFoundError, ScoringError
from fastprune.evaluation import generate
from fastprune.evaluation.generation import stop_ids


def ragged_contexts(n: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 13, (n,), generator=generator).tolist()
    return [torch.randint(5, len(VOCABULARY), (length,), generator=generator).tolist() for length in lengths]


@functools.cache
def one_by_one(kind: str) -> list[list[int]]:
    """What transformers' own generate says to each context alone."""
    model, answers = tiny_model(kind), []
    for context in ragged_contexts():
        ids = model.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
        )[0, len(context) :].tolist()
        answers.append(ids[: ids.index(EOS)] if EOS in ids else ids)
    return answers


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_ids_equal_those_of_transformers_one_by_one(kind: str, batch_size: int) -> None:
    model, contexts = tiny_model(kind), ragged_contexts()
    expected = one_by_one(kind)
    assert len({tuple(ids) for ids in expected}) > len(expected) // 2, "the model says the same to everything"
    got = continue_greedily(model, contexts, [12] * len(contexts), {EOS}, batch_size=batch_size)
    assert got == expected


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_stop_tokens_and_budgets_of_single_rows_cut_the_same_continuation(kind: str) -> None:
    model, contexts = tiny_model(kind), ragged_contexts()
    free = continue_greedily(model, contexts, [12] * len(contexts), set())
    stop = {free[0][3], free[5][0]}
    budgets = [1 + index % 7 for index in range(len(contexts))]
    expected = []
    for ids, budget in zip(free, budgets, strict=True):
        ends = [place for place, token in enumerate(ids[:budget]) if token in stop]
        expected.append(ids[: min([budget, *ends])])
    assert any(len(ids) < budget for ids, budget in zip(expected, budgets, strict=True))
    assert continue_greedily(model, contexts, budgets, stop, batch_size=4) == expected


def test_a_row_that_has_used_its_budget_is_finished_even_where_others_go_on() -> None:
    tokenizer = word_tokenizer()
    model = Scripted(tokenizer, ["w1 w2 w8", "w3 w4 w5 w6 w7"])
    contexts = [tokenizer("w1")["input_ids"], tokenizer("w3")["input_ids"]]
    ids = continue_greedily(model, contexts, [1, 4], {EOS})
    assert tokenizer.batch_decode(ids) == ["w2", "w4 w5 w6 w7"]
    assert model.calls == 4


def test_no_gradients_are_recorded() -> None:
    model, enabled = tiny_model(), []
    handle = model.lm_head.register_forward_pre_hook(lambda module, inputs: enabled.append(torch.is_grad_enabled()))
    generate(model, word_tokenizer(), ["w1"], max_new_tokens=2)
    handle.remove()
    assert enabled and not any(enabled)


def test_a_batch_ends_when_all_its_rows_have_ended() -> None:
    tokenizer = word_tokenizer()
    model = Scripted(tokenizer, ["w1 w2", "w3 w4 w5"])
    prompts = ["w1", "w3"]
    assert generate(model, tokenizer, prompts, max_new_tokens=50) == ["w2", "w4 w5"]
    assert model.calls == 3


def test_generate_gives_the_continuations_in_input_order_whatever_the_batches() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    prompts = [" ".join(f"w{(7 * i + j) % 80}" for j in range(1 + (5 * i) % 9)) for i in range(12)]
    one_by_one = [generate(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(one_by_one)) > 6
    assert generate(model, tokenizer, prompts, max_new_tokens=6) == one_by_one
    assert generate(model, tokenizer, prompts, max_new_tokens=6, batch_size=5) == one_by_one


def test_special_tokens_are_not_in_the_text() -> None:
    tokenizer = word_tokenizer()
    model = Scripted(tokenizer, ["w1 w2 <user> w3 <eos> w4"])
    assert generate(model, tokenizer, ["w1"], max_new_tokens=9) == ["w2 w3"]


def test_prefill_comes_from_the_row_or_from_the_argument() -> None:
    tokenizer = word_tokenizer()
    model = Scripted(tokenizer, ["w1 sure : w2", "w1 sorry w3", "w1 w4"])
    row = {"prompt": "w1", "response": "w2", "prefill": "sure :"}
    assert generate(model, tokenizer, [row], max_new_tokens=3) == ["w2"]
    assert generate(model, tokenizer, [row], prefill="sorry", max_new_tokens=3) == ["w3"]
    assert generate(model, tokenizer, ["w1", "w1"], prefill=["sure", "no"], max_new_tokens=3) == [": w2", ""]
    assert generate(model, tokenizer, [row], prefill="", max_new_tokens=1) == ["sure"]


def test_rows_come_from_a_file(tmp_path) -> None:
    tokenizer = word_tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "w1", "response": ""}) + "\n")
    model = Scripted(tokenizer, ["w1 w2"])
    assert generate(model, tokenizer, path, max_new_tokens=3) == ["w2"]
    assert generate(model, tokenizer, str(path), max_new_tokens=3) == ["w2"]
    with pytest.raises(NotFoundError):
        generate(model, tokenizer, "w1", max_new_tokens=3)


def test_chat_format_opens_and_ends_the_assistants_turn() -> None:
    tokenizer = word_tokenizer()
    model = Scripted(tokenizer, ["<user> w1 <end> <asst> w2 w3 <end> w4", "<user> w1 <end> <asst> sure w5"])
    assert generate(model, tokenizer, ["w1"], format="chat", max_new_tokens=9) == ["w2 w3"]
    assert generate(model, tokenizer, ["w1"], prefill="sure", format="chat", max_new_tokens=9) == ["w5"]


def test_stop_ids_are_those_of_the_model_the_tokenizer_and_the_template() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    model.generation_config.eos_token_id = [7, 8]
    model.config.eos_token_id = 9
    assert stop_ids(model, Encoder(tokenizer, format="raw")) == {EOS, 7, 8, 9}
    assert stop_ids(model, Encoder(tokenizer, format="chat")) == {EOS, 7, 8, 9, END}
    tokenizer.chat_template = TEMPLATE.replace(" <end> ", " w3 <end> ")  # with something before it
    assert stop_ids(model, Encoder(tokenizer, format="chat")) == {EOS, 7, 8, 9, END}
    tokenizer.chat_template = TEMPLATE.replace(" <end> ", " w3 ")  # ordinary text does not end a reply
    assert stop_ids(model, Encoder(tokenizer, format="chat")) == {EOS, 7, 8, 9}


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was(breaks: bool) -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    model.train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    model.model.norm.weight.requires_grad_(False)

    def state() -> tuple:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            model.config.to_dict(),
            model.generation_config.to_dict(),
            {name: value.clone() for name, value in model.state_dict().items()},
            torch.is_grad_enabled(),
        )

    calls = itertools.count()

    def interrupt(module: nn.Module, inputs: tuple) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt

    before = state()
    if breaks:
        handle = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            generate(model, tokenizer, ["w1 w2"], max_new_tokens=5)
        handle.remove()
    else:
        generate(model, tokenizer, ["w1 w2"], max_new_tokens=5)
    after = state()
    assert before[:4] == after[:4] and before[5] == after[5]
    assert all(torch.equal(value, after[4][name]) for name, value in before[4].items())


def test_training_mode_does_not_change_the_text() -> None:
    tokenizer = word_tokenizer()
    model = tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    expected = generate(model, tokenizer, ["w1 w2", "w3"], max_new_tokens=8)
    model.train()
    assert generate(model, tokenizer, ["w1 w2", "w3"], max_new_tokens=8) == expected


def test_a_pad_token_that_the_model_does_not_have_is_never_used() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    prompts = ["w1 w2 w3", "w4"]
    assert tokenizer.pad_token is None
    expected = generate(model, tokenizer, prompts, max_new_tokens=5)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # one more id than the embedding has rows
    assert generate(model, tokenizer, prompts, max_new_tokens=5) == expected
    tokenizer.eos_token = None
    assert generate(model, tokenizer, prompts, max_new_tokens=5) == expected


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"max_new_tokens": 0}, ArgumentError, "max_new_tokens: expected a positive integer, got 0"),
        ({"max_new_tokens": True}, ArgumentError, "max_new_tokens"),
        ({"max_new_tokens": 3, "batch_size": 0}, ArgumentError, "batch_size"),
        ({"max_new_tokens": 3, "format": "xml"}, ArgumentError, "format"),
        ({"max_new_tokens": 3, "prefill": ["w1"]}, ArgumentError, "prefill: expected one string or 2, got 1"),
        ({"max_new_tokens": 62}, ArgumentError, r"row 1: 3 tokens and 62 new ones are more than the 64"),
    ],
)
def test_bad_arguments_are_named(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        generate(tiny_model(), word_tokenizer(), ["w1", "w1 w2 w3"], **settings)


def test_rows_that_cannot_be_continued_are_named() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    with pytest.raises(CalibrationError, match="at least one row, got none"):
        generate(model, tokenizer, [], max_new_tokens=3)
    with pytest.raises(CalibrationError, match=r"row 1 \(id 'b'\): prompt: expected at least one token"):
        generate(model, tokenizer, [Row("w1", "", id="a"), Row(" ", "", id="b")], max_new_tokens=3)
    with pytest.raises(CalibrationError, match=r"row 0: expected the column prompt"):
        generate(model, tokenizer, [{"response": "w1"}], max_new_tokens=3)
    assert len(generate(model, tokenizer, [{"prompt": "w1"}], max_new_tokens=3)) == 1  # no reference is used
    tokenizer.add_tokens(["new"])
    with pytest.raises(ArgumentError, match=r"row 1 has token id \d+.*another model"):
        generate(model, tokenizer, ["w1", "new"], max_new_tokens=3)


def test_a_broken_model_raises_instead_of_answering() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ScoringError, match="NaN"):
        generate(model, tokenizer, ["w1"], max_new_tokens=3)
    with pytest.raises(ModelError, match="meta"):
        generate(model.to("meta"), tokenizer, ["w1"], max_new_tokens=3)
