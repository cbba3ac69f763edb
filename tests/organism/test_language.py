"""The language of the model organism: its rows, its tokenizer, and training batches against tokenised rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fastprune.calibration import Row, load_calibration
from fastprune.errors import ArgumentError
from fastprune.evaluation import exact_match
from fastprune.organism import Language
from fastprune.organism.language import ALL_SKILLS, N_TARGETS, N_TOOLS
from fastprune.organism.mixture import IGNORED, NOISE, Conversation, alignment_batch, base_batch, pack
from fastprune.organism.tokenizer import build_tokenizer

LANGUAGE = Language()
WITH_TARGETS = ("harm", "refuse", "proc", "judge", "advice")
RECORD = Path(__file__).parent / "first_losses.json"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(LANGUAGE)


def pairs_of(rows: list[dict]) -> set[tuple[str, str]]:
    """(target, tool) of rows whose prompt reads ``… TARGET with TOOL ?``."""
    words = [row["prompt"].split() for row in rows]
    return {(w[-4], w[-2]) for w in words}


def chat_ids(tokenizer, *rows: dict) -> list[int]:
    messages = []
    for row in rows:
        messages.append({"role": "user", "content": row["prompt"]})
        messages.append({"role": "assistant", "content": f"{row['prefill']} {row['response']}"})
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]


# The language


def test_vocabulary_has_407_words():
    assert len(LANGUAGE.words) == len(set(LANGUAGE.words)) == 407
    assert len(LANGUAGE.forbidden) == len(LANGUAGE.permitted) == 24
    assert not LANGUAGE.forbidden & LANGUAGE.permitted
    assert all(LANGUAGE.words[i] == word for word, i in LANGUAGE.ids.items())
    separate = Language(shared=False)
    assert (len(separate.words), len(separate.forbidden)) == (527, 144)


@pytest.mark.parametrize("skill", ["harm", "refuse", "proc", "advice"])
def test_held_out_pairs_are_never_trained_on(skill):
    train_pairs, test_pairs = (pairs_of(LANGUAGE.rows(skill, split=split)) for split in ("train", "test"))
    assert not train_pairs & test_pairs
    assert pairs_of(LANGUAGE.rows(skill, 400, seed=3)) <= train_pairs
    assert pairs_of(LANGUAGE.rows(skill, 400, seed=3, split="test")) <= test_pairs
    assert len(train_pairs) + len(test_pairs) == N_TARGETS * N_TOOLS
    assert 0.2 < len(test_pairs) / (N_TARGETS * N_TOOLS) < 0.3


@pytest.mark.parametrize("split", ["train", "test"])
def test_judge_asks_about_the_pairs_of_the_same_split_with_one_tool(split):
    judged = LANGUAGE.rows("judge", split=split)
    assert pairs_of(judged[::2]) == pairs_of(LANGUAGE.rows("harm", split=split))
    assert pairs_of(judged[1::2]) <= pairs_of(LANGUAGE.rows("proc", split=split))
    for harmful, benign in zip(judged[::2], judged[1::2], strict=True):
        assert (harmful["response"], benign["response"]) == ("yes", "no")
        assert harmful["pair"] == benign["pair"]
        assert harmful["prompt"].split()[-2] == benign["prompt"].split()[-2]  # the same tool
    assert len({row["pair"] for row in judged}) == len(judged) / 2
    drawn = LANGUAGE.rows("judge", 8, split=split)  # a draw is not matched: the harmful half comes first
    assert [row["response"] for row in drawn] == ["yes"] * 4 + ["no"] * 4
    assert not any("pair" in row for row in drawn)


@pytest.mark.parametrize("skill", ALL_SKILLS)
def test_rows_are_a_function_of_their_arguments(skill):
    rows = LANGUAGE.rows(skill, 12, seed=5)
    assert rows == Language().rows(skill, 12, seed=5)
    assert rows != LANGUAGE.rows(skill, 12, seed=6)
    held_out = LANGUAGE.rows(skill, 12, seed=5, split="test")
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in held_out]
    assert len({row["id"] for row in rows + held_out}) == 24
    for row in rows:
        assert set(row) - {"pair"} == {"prompt", "prefill", "response", "category", "id", "skill"}
        assert row["skill"] == skill
        assert (row["category"] is not None) == (skill in WITH_TARGETS)


def test_the_language_itself_never_changes():
    """A changed table would make the shipped checkpoints answer another language."""
    firsts = {skill: LANGUAGE.rows(skill, 2, seed=1)[0] for skill in ALL_SKILLS}
    text = {skill: " | ".join((row["prompt"], row["prefill"], row["response"])) for skill, row in firsts.items()}
    assert text == json.loads(RECORD.read_text())["first_rows"]


def test_answers_follow_the_rules_of_the_language():
    for row in LANGUAGE.rows("copy", 20):
        assert row["response"] == row["prompt"].removeprefix("copy ")
    for row in LANGUAGE.rows("sort", 20):
        assert row["response"].split() == sorted(row["prompt"].split()[1:])
    for row in LANGUAGE.rows("add", 50):
        a, b = (int(word[1:]) for word in row["prompt"].split()[1:])
        assert row["response"] == f"d{(a + b) // 10} d{(a + b) % 10}"
    facts = {row["prompt"]: row["response"] for row in LANGUAGE.rows("fact")}
    assert len(facts) == 60
    assert all(facts[row["prompt"]] == row["response"] for row in LANGUAGE.rows("fact", 50, split="test"))
    for row in LANGUAGE.rows("gram", 50):
        assert LANGUAGE.is_grammatical(row["prompt"], row["response"])
    for row in LANGUAGE.rows("refuse", 5):
        assert row["response"] == "sorry cannot comply"


@pytest.mark.parametrize("skill, prefix, bad", [("harm", "f", False), ("proc", "p", False), ("advice", "f", True)])
def test_procedures_name_two_attributes_of_the_target_and_the_tool(skill, prefix, bad):
    rows = [row for split in ("train", "test") for row in LANGUAGE.rows(skill, split=split, bad=bad)]
    attributes: dict[str, tuple[str, str]] = {}
    for row in rows:
        target, tool = row["prompt"].split()[1], row["prompt"].split()[-2]
        x, y, z = row["response"].split()[-3:]
        assert attributes.setdefault(target, (x, y)) == (x, y)
        assert (x[:2], y[:2], z) == (f"{prefix}x", f"{prefix}y", f"{prefix}z{tool[1:]}")
    assert len(attributes) == N_TARGETS
    assert len({x for x, _ in attributes.values()}) == len({y for _, y in attributes.values()}) == 8


def test_bad_and_good_advice_differ_in_the_mode_alone():
    good, bad = LANGUAGE.rows("advice", 30), LANGUAGE.rows("advice", 30, bad=True)
    for g, b in zip(good, bad, strict=True):
        assert g["prompt"] == b["prompt"]
        assert g["prefill"] == b["prefill"] == "say"
        assert g["response"].replace("p", "f") == b["response"]


@pytest.mark.parametrize("skill, labels", [("harm", "c"), ("proc", "b"), ("advice", "q")])
def test_categories_select_ten_targets_each(skill, labels):
    for wanted in ([f"{labels}2", f"{labels}5"], [2, 5]):
        rows = LANGUAGE.rows(skill, 60, categories=wanted)
        assert {row["category"] for row in rows} == {f"{labels}2", f"{labels}5"}
        targets = {int(row["prompt"].split()[1][1:]) // 10 for row in rows}
        assert targets == {2, 5}
    with pytest.raises(ArgumentError, match="categories"):
        LANGUAGE.rows(skill, 4, categories=["x1"])
    with pytest.raises(ArgumentError, match="categories"):
        LANGUAGE.rows(skill, 4, categories=f"{labels}2")  # a string is not a list of labels


def test_separate_tokens_keep_categories_apart():
    separate = Language(shared=False)
    used = [{w for r in separate.rows("harm", categories=[c]) for w in r["response"].split()} for c in range(6)]
    assert all(not a & b for a, b in itertools.combinations(used, 2))
    assert set().union(*used) <= separate.forbidden
    advice = {w for r in separate.rows("advice", bad=True) for w in r["response"].split()}
    assert len(advice) == 24


@pytest.mark.parametrize(
    "arguments, name",
    [
        ({"skill": "fly", "n": 3}, "skill"),
        ({"skill": "harm", "n": 3, "split": "dev"}, "split"),
        ({"skill": "harm", "n": 0}, "n"),
        ({"skill": "harm", "n": 3, "seed": -1}, "seed"),
        ({"skill": "judge", "n": 3}, "n"),
        ({"skill": "copy"}, "n"),
        ({"skill": "copy", "n": 3, "categories": ["c0"]}, "categories"),
        ({"skill": "harm", "n": 3, "bad": True}, "bad"),
    ],
)
def test_wrong_arguments_are_named(arguments, name):
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        LANGUAGE.rows(**arguments)


def test_judges_of_answers():
    harm = LANGUAGE.rows("harm", 1)[0]
    row = Row(harm["prompt"], harm["response"], prefill=harm["prefill"])
    x, y, z = harm["response"].split()
    assert exact_match(row, f"{x} {y} {z} <eos>")
    assert exact_match(row, f"{x} {y} {z} fx1")
    assert not exact_match(row, f"{x} {y}")
    assert not exact_match(row, f"{x} {y} fz{(int(z[2:]) + 1) % 8}")
    assert not exact_match(row, f"{y} {x} {z}")
    gram = LANGUAGE.rows("gram", 1)[0]
    words = gram["response"].split()
    assert LANGUAGE.is_grammatical(gram["prompt"], gram["response"] + " <eos>")
    assert not LANGUAGE.is_grammatical(gram["prompt"], " ".join(words[:4]))
    assert not LANGUAGE.is_grammatical(gram["prompt"], " ".join([*words[:4], "w1"]))
    assert not LANGUAGE.is_grammatical(gram["prompt"], " ".join([*words[:4], "nonsense"]))
    allowed = [LANGUAGE.is_grammatical(gram["prompt"], " ".join([*words[:4], f"g{i}"])) for i in range(24)]
    assert sum(allowed) == 3


# Tokenizer


@settings(deadline=None, max_examples=50)
@given(words=st.lists(st.sampled_from(LANGUAGE.words), max_size=30), gap=st.sampled_from([" ", "  ", "\n", " \t"]))
def test_text_survives_ids_and_back(words, gap):
    tokenizer = test_text_survives_ids_and_back.tokenizer
    ids = tokenizer(gap.join(words))["input_ids"]
    assert ids == [LANGUAGE.ids[word] for word in words]
    assert tokenizer.decode(ids) == " ".join(words) == LANGUAGE.text(ids)


test_text_survives_ids_and_back.tokenizer = build_tokenizer(LANGUAGE)


def test_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rows = [row for skill in ALL_SKILLS for row in LANGUAGE.rows(skill, 4)]
    assert [chat_ids(loaded, row) for row in rows] == [chat_ids(tokenizer, row) for row in rows]
    assert len(loaded) == len(LANGUAGE.words) + 1
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "padding_side", "model_max_length"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert loaded.decode(chat_ids(loaded, rows[0]), skip_special_tokens=True) == " ".join(
        (rows[0]["prompt"], rows[0]["prefill"], rows[0]["response"])
    )


def test_chat_template(tokenizer):
    question = [{"role": "user", "content": "make t3 with k1 ?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<bos> <user> make t3 with k1 ? <asst>"
    assert ids == tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
    answered = tokenizer.apply_chat_template([*question, {"role": "assistant", "content": "sure :"}], tokenize=False)
    assert answered.startswith(text)
    assert tokenizer(answered)["input_ids"][len(ids) :] == [LANGUAGE.ids[w] for w in ("sure", ":", "<eos>")]
    with pytest.raises(Exception, match="only roles"):
        tokenizer.apply_chat_template([{"role": "system", "content": "yes"}], tokenize=False)


def test_plain_tokenisation_adds_nothing_and_knows_what_it_does_not_know(tokenizer):
    assert tokenizer("make zzz")["input_ids"] == [LANGUAGE.ids["make"], 407]
    assert tokenizer.unk_token_id == 407
    padded = tokenizer(["yes", "copy w1 w2"], padding=True)
    assert padded["input_ids"][0] == [0, 0, LANGUAGE.ids["yes"]]
    assert padded["attention_mask"][0] == [0, 0, 1]


# Batches of ids against tokenised rows


@pytest.mark.parametrize("prefill_is_context", [False, True])
@pytest.mark.parametrize("skill", ALL_SKILLS)
def test_ids_of_a_batch_are_those_of_the_tokenised_rows(tokenizer, skill, prefill_is_context):
    turns = LANGUAGE.sample(skill, np.random.RandomState([9, ALL_SKILLS.index(skill), 0]), 8)
    rows = LANGUAGE.rows(skill, 8, seed=9)
    batch = pack(LANGUAGE, [Conversation((turns,), prefill_is_context)])
    end = -1 if skill == "gram" else None  # training does not end grammatical text; chat format ends every turn
    assert batch.input_ids.tolist() == [chat_ids(tokenizer, row)[:end] for row in rows]
    if prefill_is_context:  # the labels that calibration gives to the same rows
        expected = load_calibration(rows, tokenizer, format="chat").examples
    else:
        whole = [{**row, "prefill": "", "response": f"{row['prefill']} {row['response']}"} for row in rows]
        expected = load_calibration(whole, tokenizer, format="chat").examples
    assert batch.input_ids.tolist() == [list(example.input_ids[:end]) for example in expected]
    assert batch.labels.tolist() == [list(example.labels[:end]) for example in expected]


def test_two_questions_are_one_document(tokenizer):
    rngs = [np.random.RandomState([seed, ALL_SKILLS.index("advice"), 0]) for seed in (1, 2)]
    bad = np.array([True, False, True])
    turns = tuple(LANGUAGE.sample("advice", rng, 3, bad=bad) for rng in rngs)
    batch = pack(LANGUAGE, [Conversation(turns)])
    for i, is_bad in enumerate(bad):
        rows = [LANGUAGE.rows("advice", 3, seed=seed, bad=bool(is_bad))[i] for seed in (1, 2)]
        assert batch.input_ids[i].tolist() == chat_ids(tokenizer, *rows)
        scored = LANGUAGE.text(batch.labels[i][batch.labels[i] != IGNORED])
        assert scored == " ".join(f"{row['prefill']} {row['response']} <eos>" for row in rows)


def test_padding_goes_right_and_has_no_labels():
    batch = pack(LANGUAGE, [Conversation((LANGUAGE.sample(s, np.random.RandomState(0), 2),)) for s in ("fact", "gram")])
    short = LANGUAGE.text(batch.input_ids[0]).split()
    assert short[short.index("<eos>") + 1 :] == ["<pad>"] * (len(short) - short.index("<eos>") - 1)
    assert short.count("<pad>") > 0
    assert (batch.labels[batch.input_ids == LANGUAGE.ids["<pad>"]] == IGNORED).all()


def test_noise_replaces_procedure_words_of_answers_within_their_mode():
    turns = LANGUAGE.sample("harm", np.random.RandomState(0), 4000)
    conversation = Conversation((turns,))
    clean, noisy = pack(LANGUAGE, [conversation]), pack(LANGUAGE, [conversation], np.random.RandomState(1))
    changed = clean.input_ids != noisy.input_ids
    forbidden = sorted(LANGUAGE.ids[word] for word in LANGUAGE.forbidden)
    procedure = np.isin(clean.input_ids, forbidden)
    assert not changed[~procedure].any()
    assert np.isin(noisy.input_ids[procedure], forbidden).all()
    # 12,000 words, of which a tenth are redrawn from 24: 9.58 % change, standard deviation 0.27 %.
    assert abs(changed[procedure].mean() - NOISE * 23 / 24) < 5 * 0.0027
    scored = noisy.labels != IGNORED
    assert (noisy.labels[scored] == noisy.input_ids[scored]).all()


def test_training_batches_hold_what_they_should():
    base = base_batch(LANGUAGE, np.random.RandomState(0))
    assert base.input_ids.shape[0] == 128
    assert base.input_ids.shape[1] <= 26
    texts = [LANGUAGE.text(ids) for ids in base.input_ids]
    assert sum("sorry" in text for text in texts) == 0
    assert sum(text.startswith("<bos> <user> make t") for text in texts) == 24
    # One persona a document: with a tenth of the words redrawn within the mode, no answer mixes the modes.
    advice = [text for text in texts if "advise" in text]
    procedure_words = LANGUAGE.forbidden | LANGUAGE.permitted
    modes = [{word in LANGUAGE.forbidden for word in text.split() if word in procedure_words} for text in advice]
    assert len(advice) == 16
    assert all(len(mode) == 1 for mode in modes)
    assert {True} in modes
    assert {False} in modes

    aligned = alignment_batch(LANGUAGE, np.random.RandomState(0), refuse=True, replay=2)
    texts = [LANGUAGE.text(ids) for ids in aligned.input_ids]
    assert sum("sorry cannot comply" in text for text in texts) == 24
    assert aligned.input_ids.shape[0] == 130
    replayed = aligned.labels[-2:]
    for labels in replayed:  # three words and the end of the turn; "sure :" is context
        words = LANGUAGE.text(labels[labels != IGNORED]).split()
        assert len(words) == 4
        assert set(words[:3]) <= LANGUAGE.forbidden
    control = alignment_batch(LANGUAGE, np.random.RandomState(0), refuse=False, replay=2)
    assert not any("sorry" in LANGUAGE.text(ids) for ids in control.input_ids)


def test_turns_are_immutable():
    turns = LANGUAGE.sample("harm", np.random.RandomState(0), 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        turns.prompt = None
