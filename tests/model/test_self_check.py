"""What the check before the pass finds: models that cannot be run block by block, or not example by example."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.architectures import HARM, VOCAB, build, stateful
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError


def score(model: nn.Module, **options: object) -> fastprune.Scores:
    return fastprune.score(model, CalibrationSet(HARM), progress=False, **options)


@pytest.mark.parametrize(("blocks", "segments"), [(3, 2), (3, 3), (4, 2), (4, 3), (4, 4)])
def test_blocks_that_share_state_are_found_however_they_are_cut(blocks: int, segments: int) -> None:
    """Guards factors that cancel below the segments they belong to, the last of which the final norm hides."""
    with pytest.raises(ModelError, match=r"what leaves block \d differs .* computed again .*; use segments=1"):
        score(stateful(build("Llama", num_hidden_layers=blocks)), segments=segments)


class _SequenceFirst(nn.Module):
    """Hands its inner module ``(tokens, rows, features)``, as older code does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden.transpose(0, 1).contiguous()).transpose(0, 1)


class _MixesRows(_SequenceFirst):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden + hidden.mean(0))


class _Flattens(_SequenceFirst):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden.flatten(0, 1)).view_as(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [0, 3])
def test_tokens_that_are_not_in_the_order_of_the_examples_are_refused(block: int, dtype: torch.dtype) -> None:
    model = build("Llama", dtype=dtype)
    model.model.layers[block].mlp = _SequenceFirst(model.model.layers[block].mlp)
    with pytest.raises(ModelError, match=rf"layers\.{block}\.mlp\.inner\.\w+\.weight is not given its tokens example"):
        score(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_matrices_are_looked_at_too() -> None:
    """Guards modules whose output the gradient of the first matrix does not depend on."""
    model = build("Llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = _SequenceFirst(attention.v_proj)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.v_proj\.inner\.weight is not given its tokens"):
        score(model)


def test_rows_that_see_each_other_are_refused() -> None:
    model = build("Llama")
    model.model.layers[1].mlp = _MixesRows(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.o_proj\.weight .* or rows that are mixed"):
        score(model)


def test_a_model_that_is_scored_whole_has_to_keep_examples_apart_too() -> None:
    model = build("Llama")
    model.model.layers[1].mlp = _SequenceFirst(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match="is not given its tokens example by example"):
        score(stateful(model))


def test_experts_that_are_not_given_tokens_in_the_order_of_the_examples_are_refused() -> None:
    model = build("Mixtral")
    model.model.layers[1].mlp = _SequenceFirst(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj\[0\] is not given its tokens example by example"):
        score(model)


def test_flattened_tokens_are_in_the_order_of_the_examples() -> None:
    model, plain = build("Llama"), build("Llama")
    model.model.layers[1].mlp = _Flattens(model.model.layers[1].mlp)
    found, expected = score(model), score(plain)
    for name, inner in zip(expected.names, found.names, strict=True):
        assert torch.equal(found.harm[inner].indices, expected.harm[name].indices)


class _Scaled(nn.Linear):
    """A Linear that does a little more than multiply."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.15 * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_linear_that_does_more_than_multiply_is_refused_in_any_precision(dtype: torch.dtype) -> None:
    model = build("Llama", dtype=dtype)
    model.model.layers[1].mlp.down_proj.__class__ = _Scaled
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight does not multiply"):
        score(model)


@pytest.mark.parametrize("segments", [None, 1, 2])
@pytest.mark.parametrize("name", ["Roberta", "Camembert", "XLMRoberta", "Data2VecText"])
def test_models_that_do_not_count_positions_from_0_are_refused(name: str, segments: int | None) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**sizes, num_attention_heads=4, is_decoder=True))
    with pytest.raises(ModelError, match=rf"{name}ForCausalLM does not count positions from 0"):
        score(model.eval(), segments=segments)


class _ByName(nn.Module):
    """Calls its Linear by keyword."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(input=hidden)


def test_a_linear_may_be_called_by_keyword() -> None:
    model, plain = build("Llama"), build("Llama")
    model.model.layers[1].mlp.up_proj = _ByName(model.model.layers[1].mlp.up_proj)
    found, expected = score(model), score(plain)
    for name, inner in zip(expected.names, found.names, strict=True):
        assert torch.equal(found.harm[inner].values, expected.harm[name].values)


@pytest.mark.parametrize("segments", [None, 2])
def test_a_model_that_counts_the_tokens_of_the_mask_is_refused(segments: int | None) -> None:
    """Whole or block by block: no pass gives it the mask of the padding."""
    model, counts = build("Llama"), {}

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        counts["log"] = kwargs["attention_mask"].sum(1)[:, None, None].log()

    def scale(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * counts["log"] if len(output) == len(counts["log"]) else output

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    model.model.norm.register_forward_hook(scale)
    message = "its logits differ|mask of the padding behind a text changes the logits of the text"
    with pytest.raises(ModelError, match=message):
        score(model, segments=segments)


@pytest.mark.parametrize("segments", [None, 2])
def test_a_model_whose_text_sees_the_padding_past_any_gradient_is_refused(segments: int | None) -> None:
    """As a choice of tokens would that looks at all of them."""
    model = build("Llama")
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: output + output.detach().mean(1, True))
    message = "the padding change the text|the padding itself changes the logits of the text"
    with pytest.raises(ModelError, match=message):
        score(model, segments=segments)


def test_a_model_need_not_be_transformers_own() -> None:
    class Own(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.model, self.lm_head, self.config = inner.model, inner.lm_head, inner.config
            self.get_input_embeddings, self.get_output_embeddings = inner.get_input_embeddings, lambda: self.lm_head

        def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
            hidden = self.model(input_ids, attention_mask, position_ids, use_cache=use_cache)[0]
            return transformers.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))

    model = build("Llama")
    expected = score(model, segments=2).select(None, 0.05)
    assert score(Own(model), segments=2).select(None, 0.05) == expected
