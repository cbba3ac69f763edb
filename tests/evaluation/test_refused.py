"""What evaluation does not take for rows or for a model: names of columns, encoders, models without a head."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import peft
import pytest
import torch
from support.generation import continue_greedily, tiny_model, word_tokenizer
from transformers import (
    BertConfig,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fastprune.errors import CalibrationError, ModelError
from fastprune.evaluation import generate, perplexity
from fastprune.evaluation.forward import Forward, inference


class Table:
    """Yields the names of its columns, as a pandas DataFrame does."""

    columns = ("prompt", "response")

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def to_dict(self, orient: str) -> list[dict]:
        return []


@pytest.mark.parametrize("rows", [Table(), {"prompt": "w1", "response": "w2"}, {"train": [], "test": []}, 5])
def test_a_table_is_not_taken_for_the_names_of_its_columns(rows: object) -> None:
    for measure in (functools.partial(generate, max_new_tokens=1), perplexity):
        with pytest.raises(CalibrationError, match=r"^rows: expected .* mappings, got "):
            measure(tiny_model(), word_tokenizer(), rows)


def test_only_causal_models_with_a_head_are_asked() -> None:
    base = tiny_model().model
    encoder = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    masked = BertForMaskedLM(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    for model in (base, encoder, masked, None, "folder"):
        with pytest.raises(ModelError, match=f"^model: expected a causal language model .* got {type(model).__name__}"):
            continue_greedily(model, [[5]], [1], ())


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_adapters_that_put_tokens_before_the_text_are_refused(kind: type) -> None:
    model = peft.get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match=r"^model: its adapter .default. is PR"):
        continue_greedily(model, [[5]], [1], ())


def test_a_model_that_reads_padding_is_refused_in_batches_only() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "context_length": 64}
    model = RwkvForCausalLM(RwkvConfig(vocab_size=50, **sizes)).eval()
    contexts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    with pytest.raises(
        ModelError, match=r"padding changes the logits of RwkvForCausalLM by .* batch_size=1 lets each go"
    ):
        continue_greedily(model, contexts, [3, 3], [])
    alone = continue_greedily(model, contexts, [3, 3], [], batch_size=1)
    assert alone == [continue_greedily(model, [context], [3], [])[0] for context in contexts]
    same = [contexts[0], contexts[0][::-1]]
    assert continue_greedily(model, same, [3, 3], [])[0] == alone[0]


def test_padding_is_looked_at_again_where_there_is_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = tiny_model(), []
    monkeypatch.setattr(Forward, "_compare", lambda self, found, alone: looked.append(len(found)))
    for longest in (3, 4, 5, 6, 9, 9):
        continue_greedily(model, [[5, 6, 7], list(range(5, 5 + longest))], [1, 1], [])
    assert looked == [1] * 5  # each call is an evaluation of its own
    looked.clear()
    with inference(model) as forward:
        for padding in (0, 1, 1, 2, 3, 4, 9, 4):
            ids = torch.full((2, 10), 5)
            mask = torch.ones_like(ids)
            mask[1, 10 - padding :] = 0
            forward(ids, mask, use_cache=False, last=False)
    assert looked == [9, 8, 6, 1]


def test_a_model_that_counts_positions_from_another_number_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = RobertaForCausalLM(RobertaConfig(vocab_size=50, is_decoder=True, **sizes)).eval()
    with pytest.raises(ModelError, match=r"^model: RobertaForCausalLM does not count positions from 0"):
        continue_greedily(model, [[5, 6, 7]], [1], [])


def test_a_model_that_takes_padding_for_text_in_cached_steps_is_refused_in_batches_only() -> None:
    model = tiny_model()
    contexts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    alone = continue_greedily(model, contexts, [4, 4], [], batch_size=1)
    plain = model.forward

    @functools.wraps(plain)
    def forgetful(**inputs: torch.Tensor) -> object:
        if inputs.get("cache", inputs.get("past_key_values")) is not None:
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return plain(**inputs)

    model.forward = forgetful
    with pytest.raises(ModelError, match="padding changes the logits of LlamaForCausalLM"):
        continue_greedily(model, contexts, [4, 4], [])
    assert continue_greedily(model, contexts, [4, 4], [], batch_size=1) == alone
    assert continue_greedily(model, contexts, [1, 1], []) == [ids[:1] for ids in alone]  # no step has a cache
