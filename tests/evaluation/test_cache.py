"""The cache goes by the name that a model's forward has for it, and no name that is on its way out is used."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastprune.evaluation.forward import inference

IDS = torch.tensor([[3, 5, 7, 2]])


class Output(dict):
    """An output with its fields as attributes."""

    __getattr__ = dict.get


class Renamed(LlamaForCausalLM):
    """A model of a version in which the cache is called ``cache`` in arguments and outputs, and nothing else."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, use_cache=None, logits_to_keep=0):
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        output = super().forward(
            input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep, **{name: cache}
        )
        return Output(logits=output.logits, cache=getattr(output, name))


class Former(LlamaForCausalLM):
    """A model of a version in which it is called ``past_key_values``."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, logits_to_keep=0
    ):
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        output = super().forward(
            input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep,
            **{name: past_key_values},
        )  # fmt: skip
        return Output(logits=output.logits, past_key_values=getattr(output, name))


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Former, Renamed])
def test_a_step_with_a_cache_gives_the_logits_of_the_whole(model, kind: type) -> None:
    other = kind(model.config).eval()
    seen = []
    with inference(other) as forward, warnings.catch_warnings():
        warnings.simplefilter("error")
        whole, _ = forward(IDS, torch.ones_like(IDS), use_cache=False, last=True)
        _, past = forward(IDS[:, :3], torch.ones_like(IDS[:, :3]), use_cache=True, last=True)
        assert past is not None and past.get_seq_length() == 3
        hook = other.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        step, past = forward(IDS[:, 3:], torch.ones_like(IDS), past=past, use_cache=True, last=True)
        hook.remove()
    assert seen == [1] and past.get_seq_length() == 4
    torch.testing.assert_close(step, whole, rtol=1e-5, atol=1e-5)


def test_a_model_without_a_cache_gives_none(model) -> None:
    class Without(LlamaForCausalLM):
        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            return CausalLMOutputWithPast(logits=super().forward(input_ids, attention_mask, position_ids).logits)

    with inference(Without(model.config).eval()) as forward:
        assert forward(IDS, torch.ones_like(IDS), use_cache=True, last=True)[1] is None
