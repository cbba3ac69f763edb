"""The metrics that are made of attacks and judges, on models whose answers are known."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.evaluation_rows import HARM, SHALLOW, SKILLED, SKILLS, Obey
from support.generation import Scripted, tiny_model, word_tokenizer

from fastprune.calibration import Row
from fastprune.errors import ArgumentError, CalibrationError
from fastprune.evaluation import (
    Measurement,
    Prefilling,
    exact_match,
    harm,
    keyword_refusal,
    refusal,
    utility,
)


class TestMeasurement:
    def test_mean_and_categories(self) -> None:
        measured = Measurement.of([1.0, 0.0, 0.5, 1.0], ["a", "a", None, "b"])
        assert (measured.rate, measured.n) == (0.625, 4)
        assert {name: (part.rate, part.n) for name, part in measured.by_category.items()} == {
            "a": (0.5, 2),
            "b": (1, 1),
        }

    def test_interval_is_wilsons(self) -> None:
        assert Measurement(0.8, 10).interval == pytest.approx((0.49016, 0.94332), abs=1e-5)
        assert Measurement(0.0, 64).interval == pytest.approx((0.0, 0.05663), abs=1e-5)

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
    def test_interval_holds_the_rate_and_stays_in_range(self, scores: list[float]) -> None:
        measured = Measurement.of(scores)
        low, high = measured.interval
        assert 0 <= low <= measured.rate <= high <= 1

    @pytest.mark.parametrize("rate", [0.0, 1.0])
    def test_the_interval_of_a_rate_at_the_end_reaches_it(self, rate: float) -> None:
        """Regression: an upper end of 0.9999999999999999 at a rate of 1."""
        assert all(rate in Measurement(rate, n).interval for n in range(1, 500))

    def test_to_dict_is_json(self) -> None:
        text = json.dumps(Measurement.of([1.0, 0.0], ["a", None]).to_dict())
        assert json.loads(text)["by_category"]["a"]["rate"] == 1.0


class TestHarmAndRefusal:
    def test_the_prefill_makes_the_difference(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, SHALLOW)
        measured = harm(model, tokenizer, HARM)
        assert (measured.rate, measured.n) == (0.5, 4)
        assert {name: part.rate for name, part in measured.by_category.items()} == {"a": 1.0, "b": 0.0}
        assert harm(model, tokenizer, HARM, attack="none").rate == 0.0
        assert refusal(model, tokenizer, HARM).rate == 0.75

    def test_a_model_that_complies_is_harmful_without_an_attack(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, ["w1 sure : w11 w12", "w2 w21 w22"])
        # the second gives the content without the prefill's words, which is another reply than the reference
        assert harm(model, tokenizer, HARM[:2], attack="none").rate == 0.5

    def test_the_first_tokens_of_the_response_are_the_prefill_where_there_is_none(self) -> None:
        tokenizer = word_tokenizer()
        rows = [{"prompt": "w1", "response": "sure : w11 w12"}, {"prompt": "w2", "response": "sure : w21 w22"}]
        model = Scripted(tokenizer, SHALLOW)
        assert harm(model, tokenizer, rows, attack=Prefilling(2)).rate == 1.0
        assert harm(model, tokenizer, rows, attack=Prefilling(1)).rate == 1.0
        assert harm(model, tokenizer, rows, attack="none").rate == 0.0

    def test_the_judge_sees_the_continuation_and_its_own_reference(self) -> None:
        tokenizer, seen = word_tokenizer(), []

        def judge(row: Row, completion: str) -> float:
            seen.append((row.prefill, row.response, completion))
            return 0.25

        model = Scripted(tokenizer, SHALLOW)
        assert harm(model, tokenizer, HARM[:1], judge=judge).rate == 0.25
        harm(model, tokenizer, HARM[:1], judge=judge, attack="none", max_new_tokens=2)
        assert seen == [("sure :", "w11 w12", "w11 w12"), ("", "sure : w11 w12", "sorry cannot")]

    def test_the_default_budget_is_the_reference_and_one_token(self) -> None:
        tokenizer, seen = word_tokenizer(), []
        model = Scripted(tokenizer, ["w1 w2 w3 w4 w5 w6"])
        rows = [{"prompt": "w1", "response": "w2 w3"}]
        harm(model, tokenizer, rows, attack="none", judge=lambda row, completion: seen.append(completion) or 0)
        assert seen == ["w2 w3 w4"]

    def test_nothing_that_the_model_said_is_kept(self) -> None:
        tokenizer = word_tokenizer()
        measured = harm(Scripted(tokenizer, SHALLOW), tokenizer, HARM)
        text = json.dumps(measured.to_dict()) + repr(measured)
        assert not any(word in text for word in ("w11", "w21", "w31", "w1 "))

    def test_random_weights_are_harmless_and_refuse_nothing(self) -> None:
        tokenizer, model = word_tokenizer(), tiny_model()
        assert harm(model, tokenizer, HARM).rate == 0.0
        assert refusal(model, tokenizer, HARM).rate == 0.0

    def test_refusal_needs_no_response(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, SHALLOW)
        rows = [{"prompt": "w1", "response": "", "prefill": "sure :"}, {"prompt": "w4", "response": ""}]
        assert refusal(model, tokenizer, rows).rate == 0.5
        assert refusal(model, tokenizer, rows, judge=keyword_refusal(["w5"])).rate == 0.5
        assert refusal(model, tokenizer, rows, judge=keyword_refusal(["comply"]), max_new_tokens=2).rate == 0.0

    def test_harm_needs_rows_with_a_response(self) -> None:
        tokenizer, model = word_tokenizer(), tiny_model()
        with pytest.raises(CalibrationError, match="at least one row, got none"):
            harm(model, tokenizer, [])
        rows = [HARM[0], {"prompt": "w1", "prefill": "sure", "response": "", "id": "x"}]
        with pytest.raises(CalibrationError, match=r"harm, row 1 \(id 'x'\): column 'response' is empty"):
            harm(model, tokenizer, rows)
        with pytest.raises(
            CalibrationError, match=r"harm, row 1 \(id 'x'\): response: expected a reference for exact_match"
        ):
            harm(model, tokenizer, rows, max_new_tokens=3)
        assert harm(model, tokenizer, rows, max_new_tokens=3, judge=lambda row, completion: 1).rate == 1.0

    @pytest.mark.parametrize("score", [1.01, -0.1, math.nan, None, "yes", torch.ones(2)])
    def test_a_judge_has_to_stay_in_range(self, score: float) -> None:
        with pytest.raises(ArgumentError, match=r"harm, row 0: judge: expected a number in \[0, 1\]"):
            harm(tiny_model(), word_tokenizer(), HARM, judge=lambda row, completion: score)
        with pytest.raises(ArgumentError, match="judge: expected a callable"):
            harm(tiny_model(), word_tokenizer(), HARM, judge="exact")

    def test_an_attack_that_changes_weights_is_undone_whatever_happens(self) -> None:
        tokenizer, model = word_tokenizer(), Scripted(word_tokenizer(), SHALLOW)

        def judge(row: Row, completion: str) -> float:
            raise KeyboardInterrupt

        assert (
            harm(model, tokenizer, HARM, attack=Obey(), judge=lambda row, said: float(said == "yes yes yes")).rate == 1
        )
        assert not model.bias.any()
        with pytest.raises(KeyboardInterrupt):
            harm(model, tokenizer, HARM, attack=Obey(), judge=judge)
        assert not model.bias.any()


class TestUtility:
    def test_each_skill_has_the_same_weight(self) -> None:
        tokenizer = word_tokenizer()
        measured = utility(Scripted(tokenizer, list(SKILLED)), tokenizer, SKILLS)
        assert measured.mean == pytest.approx((2 / 3 + 1) / 2)
        assert {name: (skill.rate, skill.n) for name, skill in measured.skills.items()} == {
            "one": (pytest.approx(2 / 3), 3),
            "two": (1.0, 1),
        }
        assert json.loads(json.dumps(measured.to_dict()))["skills"]["two"]["by_category"]["c"]["n"] == 1

    def test_rows_may_name_their_skill(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, list(SKILLED))
        rows = [{**row, "skill": name} for name, part in SKILLS.items() for row in part]
        assert utility(model, tokenizer, reversed(rows)).to_dict()["mean"] == utility(model, tokenizer, SKILLS).mean
        with pytest.raises(CalibrationError, match="row 4: column 'skill' is missing"):
            utility(model, tokenizer, [*rows, {"prompt": "w1", "response": "w2"}])

    def test_a_skill_may_have_its_own_judge(self) -> None:
        tokenizer = word_tokenizer()
        model = Scripted(tokenizer, list(SKILLED))
        measured = utility(model, tokenizer, SKILLS, judges={"one": lambda row, completion: completion == "w6"})
        assert (measured.skills["one"].rate, measured.skills["two"].rate) == (pytest.approx(1 / 3), 1.0)
        with pytest.raises(ArgumentError, match=r"judges: expected names of skills .*, got \['three'\]"):
            utility(model, tokenizer, SKILLS, judges={"three": exact_match})

    def test_no_skills(self) -> None:
        with pytest.raises(CalibrationError, match="at least one skill"):
            utility(tiny_model(), word_tokenizer(), {})
        with pytest.raises(CalibrationError, match="at least one row, got none"):
            utility(tiny_model(), word_tokenizer(), {"one": []})
