"""From prompt files in the layouts of AdvBench, HEx-PHI and Alpaca to stored answers, by commands alone.

The prompts are harmless stand-ins: rhymes and questions.
"""

from __future__ import annotations

import csv
import json
import stat
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.real_model import FOLDER, is_made

from fastprune.calibration import Encoder
from fastprune.checkpoint.load import load_model, load_tokenizer
from fastprune.evaluation import Answers
from fastprune.evaluation.decoding import Continuation, Query, continue_queries
from fastprune.evaluation.generation import stop_ids

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_made(), reason="python tests/support/real_model.py makes the model"),
]

THINGS = ["sea", "cat", "moon", "tree", "river", "stone", "bird", "cloud"]
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "What is the opposite of hot?",
    "What do bees make?",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """``advbench.csv``, ``advbench_test.csv``, ``hexphi/`` and ``alpaca.json``."""
    for name, things in (("advbench", THINGS[:3]), ("advbench_test", THINGS[5:])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            rows = [(f"Write a rhyme about the {thing}", f"Sure, a rhyme about the {thing}:") for thing in things]
            csv.writer(file).writerows([("goal", "target"), *rows])
    (tmp_path / "hexphi").mkdir()
    for number, category in enumerate(("nature", "town")):
        lines = [f"Compose verses on a {thing}, please" for thing in THINGS[2 * number : 2 * number + 2]]
        (tmp_path / "hexphi" / f"{category}.csv").write_text("".join(f'"{line}"\n' for line in lines))
    rows = [{"instruction": question, "input": "", "output": "It is so."} for question in QUESTIONS]
    (tmp_path / "alpaca.json").write_text(json.dumps(rows))
    return tmp_path


def test_prompts_become_rows_scores_masks_and_answers(data: Path, capfd: pytest.CaptureFixture) -> None:
    chat, cheap = ("--format", "chat"), ("--dtype", "float32")
    columns = ("--columns", "prompt=goal,prefill=target")

    def made(*words: object) -> None:
        assert run(*words, *cheap) == 0, capfd.readouterr().err

    generate = ("--max-new-tokens", 12, *chat)
    made("generate", FOLDER, data / "advbench.csv", *columns, *generate, "--out", data / "harm.jsonl")
    made("generate", FOLDER, data / "alpaca.json", *generate, "--out", data / "benign.jsonl")
    sets = ("--harm", data / "harm.jsonl", "--benign", data / "benign.jsonl")
    made("score", FOLDER, *sets, *chat, "--out", data / "scores.safetensors")
    masks = [data / f"{name}.safetensors" for name in ("mask", "slice", "random", "largest")]
    assert run("select", data / "scores.safetensors", "-p", 1e-4, "-q", 5e-5, "--out", masks[0]) == 0
    assert run("select", data / "scores.safetensors", "-p", 1e-4, "-q", 1e-5, "--out", masks[1]) == 0
    for mask in masks[2:]:
        made("control", FOLDER, masks[0], "--kind", mask.stem, "--out", mask)
    store = data / "answers"
    asked = ("answer", FOLDER, "--rows", data / "advbench_test.csv", "--rows", f"refusal={data / 'hexphi'}")
    asked += ("--columns", "harm:prompt=goal,prefill=target", "--max-new-tokens", 6, "--store", store)
    for mask in masks:
        asked += ("--mask", mask)
    made(*asked, "--attack", "none", "--attack", "prefilling", "--prefill-tokens", "row,3")

    answers = Answers.load(store)
    counts = {
        (count["mask"], count["task"], count["attack"]["name"], count["attack"].get("depth")): count["answers"]
        for count in answers.counts()
    }
    for name in ("none", *(mask.stem for mask in masks)):
        for attack in (("none", None), ("prefilling", "row"), ("prefilling", 3)):
            assert counts[name, "harm", *attack] == 3
        assert counts[name, "refusal", "none", None] == 4
    texts = {name: [a.text for a in answers if a.mask == name] for name in ("none", "mask", "random", "largest")}
    assert texts["none"] != texts["largest"] and texts["none"] != texts["mask"]
    assert {row.category for row in answers.rows.values() if row.task == "refusal"} == {"nature", "town"}

    # nothing of a text was said, and what holds texts is for the owner
    said = capfd.readouterr()
    secret = {a.text for a in answers} | {row.prompt for row in answers.rows.values()} | {a.prefill for a in answers}
    generated = [json.loads(line) for name in ("harm", "benign") for line in (data / f"{name}.jsonl").open()]
    secret |= {row["response"] for row in generated} | {row["prompt"] for row in generated}
    for text in secret - {"", None}:
        assert text.strip()[:12] not in said.out + said.err
    holding = [*store.iterdir(), *data.glob("*.jsonl")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in holding} == {0o600}
    numbers = [store / "store.json", *data.glob("*.provenance.json"), *data.glob("*.safetensors")]
    for path in numbers:
        content = path.read_bytes()
        assert not any(text.strip().encode() in content for text in secret - {"", None} if len(text) > 8), path


def test_answers_in_batches_are_those_one_by_one_but_for_rounding(data: Path) -> None:
    """Where a batch says something else, the two best tokens were closer than float32 rounds."""
    model, tokenizer = load_model(FOLDER, torch.float32), load_tokenizer(FOLDER)
    encoder = Encoder(tokenizer, format="chat")
    prompts = [*QUESTIONS, *(f"Write a rhyme about the {thing}" for thing in THINGS), "Hi", "Explain " + "rain " * 40]
    queries = [Query(encoder.context(text), 16, text, text) for text in prompts]
    stop = stop_ids(model, encoder)
    together = continue_queries(model, queries, stop, batch_size=6)
    alone = [continue_queries(model, [query], stop)[0] for query in queries]
    equal = [together[index] == each for index, each in enumerate(alone)]
    for index, query in enumerate(queries):
        if not equal[index]:
            assert margin(model, query, together[index], alone[index]) < 1e-3
    print(f"{sum(equal)} of {len(equal)} answers are equal")
    assert sum(equal) >= len(equal) - 2, "rounding alone does not make so many differ"


def margin(model: torch.nn.Module, query: Query, first: Continuation, second: Continuation) -> float:
    """Difference of the two best logits at the first token that differs."""
    pairs = enumerate(zip([*first.ids, -1], [*second.ids, -1], strict=False))
    place = next(number for number, (one, other) in pairs if one != other)
    ids = torch.tensor([[*query.context, *first.ids[:place]]])
    with torch.no_grad():
        best = model(ids).logits[0, -1].topk(2).values
    return float(best[0] - best[1])
