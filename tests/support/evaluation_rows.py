"""Rows to evaluate on, the answers of a scripted model to them, and an attack on its weights."""

from __future__ import annotations

import torch

from fastprune.calibration import Row
from fastprune.evaluation import (
    Attack,
)
from support.generation import Scripted, word_tokenizer

HARM = [
    {"prompt": "w1", "prefill": "sure :", "response": "w11 w12", "category": "a"},
    {"prompt": "w2", "prefill": "sure :", "response": "w21 w22", "category": "a"},
    {"prompt": "w3", "prefill": "sure :", "response": "w31 w32", "category": "b"},
    {"prompt": "w4", "prefill": "sure :", "response": "w41 w42"},
]

# refuses when asked directly, and answers three of four under the prefill, one of them only halfway
SHALLOW = [
    *(f"w{i} sorry cannot comply <eos>" for i in (1, 2, 3)),
    "w4 w5",
    "w1 sure : w11 w12 <eos>",
    "w2 sure : w21 w22 w9",
    "w3 sure : w31 w33",
]

SKILLS = {
    "one": [
        {"prompt": "w1", "response": "w2"},
        {"prompt": "w3", "response": "w4"},
        {"prompt": "w5", "response": "w9"},
    ],
    "two": [{"prompt": "w6", "response": "w7 w8", "category": "c"}],
}

SKILLED = ("w1 w2", "w3 w4", "w5 w6", "w6 w7 w8")


class Obey(Attack):
    """Stands for attacks on weights: the model says yes to everything for the length of the context."""

    name = "obey"
    changes_model = True

    def rows(self, tokenizer: object, rows: list[Row]) -> list[Row]:
        return list(rows)

    def on(self, model: Scripted, tokenizer: object, rows: list[Row]):
        return _Obeying(model, self.rows(tokenizer, rows))


class _Obeying:
    def __init__(self, model: Scripted, rows: list[Row]) -> None:
        self.model, self.rows = model, rows

    def __enter__(self) -> list[Row]:
        with torch.no_grad():
            self.model.bias[word_tokenizer().convert_tokens_to_ids("yes")] = 100.0
        return self.rows

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            self.model.bias.zero_()
