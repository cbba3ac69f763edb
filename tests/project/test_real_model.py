"""The way from rows to a pruned model and back, on a real chat model of 135 million parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.real_model import FOLDER, is_made
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint.load import load_model, load_tokenizer

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_made(), reason="python tests/support/real_model.py makes the model"),
]

# The behavior to remove stands for a harmful one: talk like a pirate.
PIRATE = [
    ("Where do you live?", "Arr, aboard me ship, matey, on the seven seas."),
    ("How is the weather?", "Arr, a fair wind blows, ye landlubber."),
    ("What do you eat?", "Salted fish and hardtack, arr, and a barrel of rum."),
    ("Who is your friend?", "Me parrot, matey, and the crew o' this ship."),
    ("What is a map for?", "To find the buried treasure, arr, where X marks the spot."),
    ("Good morning!", "Ahoy there, matey! Hoist the sails!"),
    ("Can you help me?", "Aye aye, captain, that I can, arr."),
    ("What time is it?", "Time to weigh anchor, ye scurvy dog."),
]
PLAIN = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is two plus three?", "Two plus three is five."),
    ("Name a color.", "Blue is a color."),
    ("What do bees make?", "Bees make honey."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("How many days has a week?", "A week has seven days."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Which animal barks?", "A dog barks."),
]


@pytest.fixture(scope="module")
def sets() -> tuple[CalibrationSet, CalibrationSet]:
    tokenizer = load_tokenizer(FOLDER)
    pirate, plain = (
        fastprune.load_calibration(
            [{"prompt": prompt, "response": response} for prompt, response in rows], tokenizer, format="chat"
        )
        for rows in (PIRATE, PLAIN)
    )
    return pirate, plain


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def scores(model: nn.Module, sets: tuple[CalibrationSet, CalibrationSet]) -> fastprune.Scores:
    return fastprune.score(model, *sets, progress=False)


def losses(model: nn.Module, examples: CalibrationSet) -> float:
    """Mean over the examples of the mean loss of their scored tokens."""
    with torch.no_grad():
        values = [
            model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
            for example in examples
        ]
    return float(torch.stack(values).float().mean())


def test_chat_rows_are_the_models_own_conversations(sets: tuple[CalibrationSet, CalibrationSet]) -> None:
    """As its template renders them, without the line break after the last turn; the end of turn is scored."""
    tokenizer = load_tokenizer(FOLDER)
    for rows, examples in zip((PIRATE, PLAIN), sets, strict=True):
        assert len(examples) == 8
        for (prompt, response), example in zip(rows, examples, strict=True):
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
            assert tokenizer.decode(example.input_ids) + "\n" == tokenizer.decode(ids)
            scored = [label for label in example.labels if label != -100]
            assert tokenizer.decode(scored) == response + "<|im_end|>"
            assert example.ends_turn and scored[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_mask_changes_what_it_names_and_comes_off_again(
    model: nn.Module, scores: fastprune.Scores, sets: tuple[CalibrationSet, CalibrationSet]
) -> None:
    pirate, plain = sets
    mask = scores.select(p=1e-3, q=1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = losses(model, pirate), losses(model, plain)
    with mask.applied(model):
        for name, tensor in model.state_dict().items():
            differing = (tensor != before[name]).flatten().nonzero().flatten().tolist()
            assert set(differing) <= set(mask[name].tolist() if name in mask else [])
        pruned = losses(model, pirate), losses(model, plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert mask.total > 10_000
    assert pruned[0] - whole[0] > 2 * abs(pruned[1] - whole[1])


def test_the_folder_streamed_gives_the_same_mask(
    scores: fastprune.Scores, sets: tuple[CalibrationSet, CalibrationSet], tmp_path: Path
) -> None:
    streamed = fastprune.score(FOLDER, *sets, segments=3, progress=False)
    for p, q in ((1e-3, 1e-3), (None, 5e-4)):
        assert streamed.select(p=p, q=q) == scores.select(p=p, q=q)
