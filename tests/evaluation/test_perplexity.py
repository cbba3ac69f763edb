"""Perplexity against one text at a time."""

from __future__ import annotations

import math

import pytest
import torch
from support.generation import ARCHITECTURES, tiny_model, word_tokenizer

from fastprune.errors import ArgumentError, CalibrationError, ScoringError
from fastprune.evaluation import perplexity

TEXTS = [" ".join(f"w{(3 * i + 7 * j) % 80}" for j in range(n)) for i, n in enumerate([2, 9, 4, 17, 3, 12])]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_equals_one_text_at_a_time_for_any_batch(kind: str) -> None:
    tokenizer, model = word_tokenizer(), tiny_model(kind)
    losses = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            table = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-table[torch.arange(ids.shape[1] - 1), ids[0, 1:]]).tolist()
    for batch_tokens in (1, 20, 4096):
        measured = perplexity(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
        assert (measured.n_tokens, measured.n_examples) == (len(losses), 6)
        assert measured.nll == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert measured.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_rows_are_scored_on_their_response_given_the_context() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    rows = [{"prompt": "w1 w2", "prefill": "sure", "response": "w3 w4"}, {"prompt": "w5", "response": "w6"}]
    losses = []
    for text, scored in (("w1 w2 sure w3 w4", 2), ("w5 w6", 1)):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            table = model(ids).logits[0, :-1].double().log_softmax(-1)
        losses += (-table[torch.arange(ids.shape[1] - 1), ids[0, 1:]]).tolist()[-scored:]
    measured = perplexity(model, tokenizer, rows)
    assert measured.n_tokens == 3 and measured.nll == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert perplexity(model, tokenizer, rows, format="chat").n_tokens == 5  # and the ends of turn


def test_windows_are_texts_of_their_own() -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    words = TEXTS[3].split()  # 17 of them: windows of 4, and one word that nothing precedes
    cut = [" ".join(words[i : i + 4]) for i in range(0, 16, 4)]
    windowed = perplexity(model, tokenizer, [TEXTS[3]], window=4)
    assert windowed == perplexity(model, tokenizer, cut)
    assert windowed.n_tokens == 12
    assert perplexity(model, tokenizer, [TEXTS[3]], window=17) == perplexity(model, tokenizer, [TEXTS[3]])


def test_long_logits_are_summed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, model = word_tokenizer(), tiny_model()
    expected = perplexity(model, tokenizer, TEXTS)
    monkeypatch.setattr("fastprune.evaluation.likelihood._CHUNK", 3)
    assert perplexity(model, tokenizer, TEXTS).nll == pytest.approx(expected.nll, rel=1e-7)


@pytest.mark.parametrize(
    ("texts", "settings", "error", "message"),
    [
        ([], {}, CalibrationError, "at least one row, got none"),
        (["w1 w2", "w1"], {}, CalibrationError, "text 1: 1 tokens"),
        (["w1 w2"], {"window": 1}, ArgumentError, "window"),
        (["w1 w2"], {"batch_tokens": 0}, ArgumentError, "batch_tokens"),
        ([{"prompt": "w1", "response": "w2"}], {"window": 4}, ArgumentError, "windows are for plain texts"),
        ([{"prompt": "w1", "response": ""}], {}, CalibrationError, "row 0: response: expected at least one token"),
        (["w1 w2", " ".join(["w1"] * 65)], {}, ArgumentError, "example 1: 65 tokens .* more than the 64"),
    ],
)
def test_bad_input_is_named(texts: list, settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        perplexity(tiny_model(), word_tokenizer(), texts, **settings)


def test_nan_raises() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ScoringError, match="NaN"):
        perplexity(model, word_tokenizer(), TEXTS)
