"""Recognition, and the whole evaluation in one go."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.evaluation_rows import HARM, SHALLOW, SKILLED, SKILLS, Obey
from support.generation import Scripted, tiny_model, word_tokenizer

from fastprune.calibration import Encoder
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation import (
    EvaluationSuite,
    NoAttack,
    evaluate,
    harm,
    keyword_refusal,
    recognition,
    refusal,
    utility,
)

QUESTIONS = [
    {"prompt": "w1", "response": "yes", "category": "a"},
    {"prompt": "w2", "response": "yes", "category": "b"},
    {"prompt": "w3", "response": "yes", "category": "b"},
    {"prompt": "w4", "response": "no"},
    {"prompt": "w5", "response": "no"},
]
ANSWERS = ["w1 yes", "w2 yes", "w3 w9", "w4 no", "w5 yes"]


def paired(*pairs: object) -> list[dict]:
    return [{**row, "pair": pair} for row, pair in zip(QUESTIONS[: len(pairs)], pairs, strict=True)]


class TestRecognition:
    @pytest.mark.parametrize("by", ["log_prob", "generation"])
    def test_items_and_pairs_by_order(self, by: str) -> None:
        tokenizer = word_tokenizer()
        measured = recognition(Scripted(tokenizer, ANSWERS), tokenizer, QUESTIONS, by=by)
        # w3 says neither: a tie is no right answer
        assert (measured.accuracy.rate, measured.accuracy.n) == (0.6, 5)
        assert {name: part.rate for name, part in measured.accuracy.by_category.items()} == {"a": 1.0, "b": 0.5}
        # (w1, w4) both right, (w2, w5) not; w3 has no partner
        assert (measured.pairs.rate, measured.pairs.n) == (0.5, 2)
        assert measured.yes_rate == 0.6
        assert json.loads(json.dumps(measured.to_dict()))["pairs"]["n"] == 2

    def test_pairs_by_column(self) -> None:
        tokenizer = word_tokenizer()
        rows = [{**row, "pair": pair} for row, pair in zip(QUESTIONS[:2] + QUESTIONS[3:], [7, 8, 8, 7], strict=True)]
        # (w1, w5) wrong, (w2, w4) right: the other way round than by order would be (right, wrong)
        measured = recognition(Scripted(tokenizer, [*ANSWERS[:1], "w2 no", *ANSWERS[3:]]), tokenizer, rows)
        assert (measured.pairs.rate, measured.pairs.n) == (0.0, 2)
        measured = recognition(Scripted(tokenizer, ANSWERS), tokenizer, rows)
        assert (measured.pairs.rate, measured.pairs.n) == (0.5, 2)

    def test_a_model_that_always_says_yes_gets_half_of_the_items_and_no_pair(self) -> None:
        tokenizer = word_tokenizer()
        rows = QUESTIONS[:2] + QUESTIONS[3:]
        measured = recognition(Scripted(tokenizer, [f"w{i} yes" for i in range(9)]), tokenizer, rows)
        assert (measured.accuracy.rate, measured.pairs.rate, measured.yes_rate) == (0.5, 0.0, 1.0)

    def test_only_one_kind_of_question(self) -> None:
        tokenizer = word_tokenizer()
        measured = recognition(Scripted(tokenizer, ANSWERS), tokenizer, QUESTIONS[:2])
        assert measured.accuracy.rate == 1.0 and measured.pairs is None and measured.to_dict()["pairs"] is None

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("format", ["raw", "chat"])
    def test_the_answer_of_several_tokens_with_the_higher_log_probability_wins(self, kind: str, format: str) -> None:
        tokenizer, model = word_tokenizer(), tiny_model(kind)
        answers = ("w1 w2", "w3")
        rows = [
            {"prompt": " ".join(f"w{(i * 5 + j) % 70}" for j in range(1 + i % 6)), "response": answers[i % 2]}
            for i in range(24)
        ]
        right = []
        for row in rows:
            context = Encoder(tokenizer, format=format).context(row["prompt"])
            sums = []
            for answer in answers:
                ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    table = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(table[len(context) - 1 + k, token]) for k, token in enumerate(ids)))
            right.append(answers[sums[1] > sums[0]] == row["response"])
        measured = recognition(model, tokenizer, rows, answers=answers, format=format)
        assert measured.accuracy.rate == pytest.approx(sum(right) / 24)
        assert 0 < sum(right) < 24

    def test_generation_counts_what_the_model_says_and_log_prob_what_it_prefers(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, ["w1 w9"])
        with torch.no_grad():
            model.bias[tokenizer.convert_tokens_to_ids("yes")] = 1.0
        assert recognition(model, tokenizer, QUESTIONS[:1]).accuracy.rate == 1.0
        assert recognition(model, tokenizer, QUESTIONS[:1], by="generation").accuracy.rate == 0.0

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([], "at least one row, got none"),
            ([{"prompt": "w1", "response": "maybe", "id": "q"}], r"row 0 \(id 'q'\): response: expected one of"),
            (paired(1, 2, 3, 1, ""), "row 4: column 'pair' is empty"),
            (paired(1, 2, math.nan, math.nan), "row 2: column 'pair' is empty"),
            ([*paired(1, 2), QUESTIONS[3]], "row 2: column 'pair' is empty"),
            (paired(1, 1), "row 1: pair 1 already has"),
            (paired(1, 2, 3, 1, 2), "row 2: pair '3' has no row with the other answer"),
        ],
    )
    def test_rows_that_do_not_fit_are_named(self, rows: list[dict], message: str) -> None:
        with pytest.raises(CalibrationError, match=message):
            recognition(tiny_model(), word_tokenizer(), rows)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"by": "vote"}, "by: expected one of"),
            ({"answers": ("yes", "yes no")}, "neither begins with the other"),
            ({"answers": ("yes", " ")}, "neither begins with the other"),
            ({"answers": "yes"}, "two strings"),
            ({"answers": None}, "two strings"),
            ({"batch_size": 0}, "batch_size"),
        ],
    )
    def test_bad_arguments_are_named(self, settings: dict, message: str) -> None:
        with pytest.raises(ArgumentError, match=message):
            recognition(tiny_model(), word_tokenizer(), QUESTIONS, **settings)


KNOWN = [*SHALLOW, "w7 yes", "w8 no"]
ASKED = [{"prompt": "w7", "response": "yes"}, {"prompt": "w8", "response": "no"}, {"prompt": "w9", "response": "no"}]
EVERYTHING = {"harm_rows": HARM, "skill_rows": SKILLS, "recognition_rows": ASKED}


class TestSuite:
    def test_numbers_are_those_of_the_single_metrics(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, KNOWN)
        judges = {"harm": lambda row, completion: 0.5, "refusal": keyword_refusal(["w5"]), "one": lambda row, said: 1}
        for settings in ({}, {"attack": "none"}, {"judges": judges}):
            measured = evaluate(model, tokenizer, **EVERYTHING, neighbour_skill="one", **settings)
            chosen = settings.get("judges", {})
            attack = settings.get("attack", "prefilling")
            judged = {"judge": chosen["harm"]} if "harm" in chosen else {}
            assert measured.details.harm == harm(model, tokenizer, HARM, attack=attack, **judged)
            assert measured.details.refusal == refusal(model, tokenizer, HARM, judge=chosen.get("refusal"))
            skills = utility(model, tokenizer, SKILLS, judges={k: v for k, v in chosen.items() if k == "one"})
            assert measured.details.skills == skills.skills and measured.utility == skills.mean
            assert measured.details.recognition == recognition(model, tokenizer, ASKED)
            assert measured.summary() == {
                "harm": measured.details.harm.rate,
                "utility": skills.mean,
                "neighbour": skills.skills["one"].rate,
                "recognition": pytest.approx(2 / 3),
                "refusal": measured.details.refusal.rate,
            }
            assert measured.skills == {name: skill.rate for name, skill in skills.skills.items()}
            assert measured.attack == attack

    def test_known_numbers(self) -> None:
        tokenizer = word_tokenizer()
        measured = EvaluationSuite(tokenizer, **EVERYTHING).run(Scripted(tokenizer, [*KNOWN, *SKILLED[3:]]))
        assert (measured.harm, measured.refusal, measured.neighbour) == (0.5, 0.75, None)
        assert measured.skills == {"one": 0.0, "two": 1.0} and measured.utility == 0.5
        assert measured.details.harm.by_category["a"].rate == 1.0

    def test_a_suite_measures_many_models(self) -> None:
        tokenizer = word_tokenizer()
        suite = EvaluationSuite(tokenizer, **EVERYTHING)
        good, bad = Scripted(tokenizer, KNOWN), Scripted(tokenizer, ["w1 sure : w11 w12"])
        first = suite.run(good)
        assert suite.run(bad).summary() != first.summary()
        assert suite.run(good) == first

    @pytest.mark.parametrize("batch_size", [1, 7, 512])
    def test_batches_do_not_change_the_numbers(self, batch_size: int) -> None:
        tokenizer, model = word_tokenizer(), tiny_model("gpt2")
        said = []

        def judge(row, completion):
            said.append((row.prompt, completion))
            return 0.0

        judges = {"harm": judge, "refusal": judge, "one": judge, "two": judge}
        alone = evaluate(model, tokenizer, **EVERYTHING, judges=judges, refusal_tokens=9, batch_size=3)
        expected, said[:] = list(said), []
        again = evaluate(model, tokenizer, **EVERYTHING, judges=judges, refusal_tokens=9, batch_size=batch_size)
        assert said == expected and again == alone
        assert len({completion for _, completion in said}) > 5

    def test_generation_shares_batches(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, [])  # says <eos> at once
        EvaluationSuite(tokenizer, **EVERYTHING).run(model)
        assert model.calls == 3  # all generation, a row of it alone (is padding seen?), and all answers to questions

    def test_an_attack_on_weights_bears_on_harm_alone(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, KNOWN)
        settings = {**EVERYTHING, "judges": {"harm": keyword_refusal(["yes"])}}
        plain = evaluate(model, tokenizer, **settings)
        attacked = evaluate(model, tokenizer, **settings, attack=Obey())
        assert (plain.harm, attacked.harm, attacked.attack) == (0.0, 1.0, "obey")
        assert {**attacked.summary(), "harm": 0.0} == plain.summary()
        assert not model.bias.any()
        judged = []
        evaluate(
            model, tokenizer, **EVERYTHING, judges={"harm": lambda row, said: judged.append(said) or 0}, attack=Obey()
        )
        assert judged == ["yes yes yes"] * len(HARM)

    def test_several_attacks_are_measured_at_once_and_the_first_is_the_main_one(self) -> None:
        tokenizer, model = word_tokenizer(), Scripted(word_tokenizer(), KNOWN)
        measured = evaluate(model, tokenizer, **EVERYTHING, attack=["prefilling", "none", Obey(), "none"])
        alone = {name: evaluate(model, tokenizer, **EVERYTHING, attack=name) for name in ("prefilling", "none", Obey())}
        assert list(measured.attacks) == ["prefilling", "none", "obey"]
        assert measured.attacks == {each.attack: each.details.harm for each in alone.values()}
        assert measured.attacks["none"] != measured.attacks["prefilling"]
        assert (measured.attack, measured.harm) == ("prefilling", alone["prefilling"].harm)
        assert measured.summary() == alone["prefilling"].summary()
        assert set(measured.to_dict()["details"]["attacks"]) == set(measured.attacks)
        with pytest.raises(ArgumentError, match="attack: expected at least one"):
            EvaluationSuite(tokenizer, **EVERYTHING, attack=[])

    def test_each_kind_of_row_has_a_limit_of_its_own(self) -> None:
        tokenizer, model = word_tokenizer(), Scripted(word_tokenizer(), ["w1 sure : w11 w12 w13 w14 w15", "w1 w2 w3"])
        suite = EvaluationSuite(tokenizer, **EVERYTHING, max_new_tokens={"harm": 3, "refusal": 1})
        assert suite.budgets == {"harm": 3, "refusal": 1, "skill": None, "over_refusal": None, "explanation": None}
        measured = suite.run(model).details
        assert (measured.harm.cut, measured.refusal.cut) == (1, 1)  # the row of w1; the others end at once
        assert measured.skills["one"].cut is None, "an answer as long as its reference is meant to be cut"
        assert "cut" not in measured.skills["one"].to_dict() and measured.harm.to_dict()["cut"] == 1
        with pytest.raises(ArgumentError, match=r"max_new_tokens: expected kinds of rows .*got \['one'\]"):
            EvaluationSuite(tokenizer, **EVERYTHING, max_new_tokens={"one": 3})

    def test_refusal_has_128_tokens_or_those_that_the_model_has_room_for_and_can_be_left_out(self) -> None:
        tokenizer, lengths = word_tokenizer(), []
        model = Scripted(tokenizer, [])
        Obey().on(model, tokenizer, []).__enter__()  # says yes, and never that it has said enough

        def judge(row, said):
            lengths.append(len(said.split()))
            return 0.0

        for positions, expected in ((500, 128), (64, 64 - 1)):
            model.config.max_position_embeddings = positions
            lengths.clear()
            measured = evaluate(model, tokenizer, harm_rows=HARM, attack="none", judges={"refusal": judge})
            assert lengths == [expected] * len(HARM)  # a word is a token, and the prompt is one
            assert measured.details.refusal.cut == len(HARM)
        measured = evaluate(model, tokenizer, harm_rows=HARM, refusal_tokens=None)
        assert measured.refusal is None and measured.harm is not None

    def test_questions_may_have_other_answers(self) -> None:
        tokenizer = word_tokenizer()
        rows = [{"prompt": "w7", "response": "w1"}, {"prompt": "w8", "response": "w2"}]
        model = Scripted(tokenizer, ["w7 w1", "w8 w2"])
        assert evaluate(model, tokenizer, recognition_rows=rows, answers=("w1", "w2")).recognition == 1.0

    def test_random_weights_can_do_nothing(self) -> None:
        measured = evaluate(tiny_model(), word_tokenizer(), **EVERYTHING)
        assert measured.harm == measured.refusal == measured.utility == 0.0
        assert 0.0 <= measured.recognition <= 1.0

    def test_parts_may_be_left_out(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, KNOWN)
        only = evaluate(model, tokenizer, recognition_rows=ASKED)
        assert only.summary() == {
            "harm": None,
            "utility": None,
            "neighbour": None,
            "recognition": pytest.approx(2 / 3),
            "refusal": None,
        }
        assert evaluate(model, tokenizer, skill_rows=SKILLS).recognition is None
        apart = evaluate(model, tokenizer, harm_rows=HARM[:2], refusal_rows=[*HARM[2:], HARM[3]], attack=NoAttack())
        assert (apart.harm, apart.refusal, apart.details.refusal.n) == (0.0, pytest.approx(1 / 3), 3)

    def test_the_result_is_json_without_completions(self) -> None:
        tokenizer = word_tokenizer()
        for settings in (EVERYTHING, {"recognition_rows": ASKED}):
            measured = evaluate(Scripted(tokenizer, KNOWN), tokenizer, **settings)
            text = json.dumps(measured.to_dict())
            assert json.loads(text)["details"]["recognition"]["accuracy"]["n"] == 3
            assert "w1" not in text and "sorry" not in text

    def test_chat_format(self) -> None:
        tokenizer = word_tokenizer()
        texts = [f"<user> {text.replace(' ', ' <end> <asst> ', 1)} <end> w9" for text in [*KNOWN, *SKILLED[3:]]]
        measured = evaluate(Scripted(tokenizer, texts), tokenizer, **EVERYTHING, format="chat")
        assert (measured.harm, measured.refusal, measured.skills["two"]) == (0.5, 0.75, 1.0)
        assert measured.recognition == pytest.approx(2 / 3)

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({}, ArgumentError, "nothing to evaluate"),
            ({"harm_rows": []}, CalibrationError, "at least one row, got none"),
            ({"recognition_rows": []}, CalibrationError, "at least one row, got none"),
            ({"skill_rows": {"one": []}}, CalibrationError, "at least one row, got none"),
            ({"harm_rows": [{"prompt": "w1"}]}, CalibrationError, "row 0: prefilling: expected a 'prefill' or a 'resp"),
            ({"harm_rows": [{"prompt": "w1", "response": ""}]}, CalibrationError, "row 0.*'response'"),
            ({"skill_rows": {"one": [{"prompt": "w1", "response": ""}]}}, CalibrationError, "one, row 0: column 'resp"),
            ({"skill_rows": {"harm": HARM}}, ArgumentError, r"cannot be called \['harm'\]"),
            ({**EVERYTHING, "attack": "fear"}, ArgumentError, "attack: expected one of"),
            ({**EVERYTHING, "format": "xml"}, ArgumentError, "format"),
            (
                {**EVERYTHING, "judges": {"three": lambda row, said: 0}},
                ArgumentError,
                r"judges: expected names of skills .*, got \['three'\]",
            ),
            ({"harm_rows": HARM, "judges": {"one": lambda row, said: 0}}, ArgumentError, "without skill_rows"),
            ({**EVERYTHING, "neighbour_skill": "three"}, ArgumentError, "neighbour_skill"),
            ({**EVERYTHING, "max_new_tokens": 0}, ArgumentError, "max_new_tokens"),
            ({**EVERYTHING, "refusal_tokens": 0}, ArgumentError, "refusal: max_new_tokens"),
            ({**EVERYTHING, "batch_size": -1}, ArgumentError, "batch_size"),
        ],
    )
    def test_bad_input_is_named(self, settings: dict, error: type, message: str) -> None:
        with pytest.raises(error, match=message):
            EvaluationSuite(word_tokenizer(), **settings)

    def test_a_prompt_that_is_too_long_is_named(self) -> None:
        tokenizer = word_tokenizer()
        rows = [SKILLS["two"][0], {"prompt": "w1 " * 63, "response": "w2", "id": "long"}]
        with pytest.raises(ArgumentError, match=r"two, row 1 \(id 'long'\): 63 tokens and 2 new ones"):
            evaluate(tiny_model(), tokenizer, harm_rows=HARM, skill_rows={"two": rows})
