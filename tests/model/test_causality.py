"""Attention takes other paths where nothing is padded and where rows are long: a model has to be causal on all."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.architectures import HARM, VOCAB, build, examples, stateful
from torch import nn

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError

SHORT = examples([(2, 2), (1, 4), (3, 3)])  # six tokens at most: no longer than a window of the tests' models


def score(model: nn.Module, rows: list = HARM, **options: object) -> fastprune.Scores:
    return fastprune.score(model, CalibrationSet(rows), progress=False, **options)


def paligemma(text: str, implementation: str) -> nn.Module:
    """Asked for text alone. Its attention has no causal flag, and with sdpa no mask where nothing is padded."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": text, "vocab_size": VOCAB, "num_key_value_heads": 2, "head_dim": 8, **sizes},
        vision_config={"model_type": "siglip_vision_model", **sizes, "image_size": 8, "patch_size": 4},
        image_token_index=VOCAB - 1,
        projection_dim=32,
        hidden_size=32,
    )
    config.text_config.pad_token_id = 0
    config._attn_implementation = config.text_config._attn_implementation = implementation
    torch.manual_seed(0)
    return transformers.PaliGemmaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("segments", [None, 1, 2])
def test_a_model_that_is_causal_beside_padding_only_is_refused(segments: int | None) -> None:
    """Regression: a score depended on whether an example shared its micro-batch with a shorter one."""
    model = paligemma("gemma", "sdpa")
    assert not model.model.language_model.layers[0].self_attn.is_causal
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = "PaliGemma.* depend on the tokens behind it where no row is padded.*attn_implementation='eager'"
    with pytest.raises(ModelError, match=message):
        score(model, segments=segments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_with_a_mask_at_all_times_it_is_scored_and_no_example_depends_on_another() -> None:
    model = paligemma("gemma", "eager")
    together = score(model, HARM)
    apart = fastprune.score(model, CalibrationSet(HARM).loader(1), progress=False)
    for name in together.names:
        torch.testing.assert_close(together.harm[name].values, apart.harm[name].values, rtol=1e-4, atol=1e-7)


def test_a_model_that_runs_whole_is_looked_at_without_padding_too() -> None:
    model = stateful(build("Llama"))
    model.model.layers[1].block.self_attn.is_causal = False  # what sdpa asks where there is no mask
    with pytest.raises(ModelError, match="where no row is padded"):
        score(model)


class _SeesAllOfLongRows(nn.Module):
    """A block whose tokens see later ones in rows longer than its window."""

    def __init__(self, block: nn.Module, window: int) -> None:
        super().__init__()
        self.block, self.window = block, window

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        output = self.block(hidden, *args, **kwargs)
        return output + 0.1 * hidden.flip(1) if hidden.shape[1] > self.window else output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize(("name", "block"), [("Mistral", 0), ("Mistral", 3), ("Gemma2", 1), ("GptOss", 1)])
def test_a_window_that_lets_tokens_see_later_ones_is_found(
    name: str, block: int, segments: int | None, dtype: torch.dtype
) -> None:
    """The window of these models is six tokens, as long as the rows that the other checks take."""
    model = build(name, dtype=dtype)
    layers = model.model.layers
    layers[block] = _SeesAllOfLongRows(layers[block], 6)
    with pytest.raises(
        ModelError, match=rf"block {block}, a token depends on the tokens behind it in a row of 14 tokens"
    ):
        score(model, segments=segments)
    assert score(model, SHORT, segments=segments).harm  # no example of these exceeds the window


def test_a_window_of_a_model_that_runs_whole() -> None:
    model = stateful(build("Mistral"))
    model.model.layers[1].block = _SeesAllOfLongRows(model.model.layers[1].block, 6)
    with pytest.raises(ModelError, match="depend on the tokens behind it where no row is padded"):
        score(model)


def test_a_chunk_that_lets_tokens_see_later_ones_is_found() -> None:
    model = build("Llama")
    model.config.attention_chunk_size = 6
    model.model.layers[3] = _SeesAllOfLongRows(model.model.layers[3], 6)
    with pytest.raises(ModelError, match="block 3, a token depends on the tokens behind it in a row of 14 tokens"):
        score(model)


def test_the_long_row_goes_back_through_one_block_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 has five local blocks for each global one; others of the same kind need no second look."""
    model = build("Gemma2", num_hidden_layers=8)
    seen: list[bool] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, args, output: seen.append(torch.is_grad_enabled()) if output.shape[1] == 14 else None
        )
    longest = examples([(8, 6)])  # its own row has 14 tokens too: only what comes before the pass is counted
    with pytest.raises(_Stop):
        monkeypatch.setattr("fastprune.scoring.engine.Pass.run", _stop)
        score(model, longest)
    assert seen == [True, True]


class _Stop(Exception):
    pass


def _stop(*args: object) -> None:
    raise _Stop
