"""Models beyond plain decoders: state-space layers, towers beside the text, and what only looks like a causal model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from support.architectures import BENIGN, HARM, MOE_CONFIGS, VOCAB, build
from support.pass_statistics import engine_statistics, relative_error

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.errors import ModelError
from fastprune.model.matrices import eligible_matrices
from fastprune.testing.oracle import StayDouble, oracle_statistics

_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LAYERS = {**_SIZES, "num_hidden_layers": 4}
_SPARSE = {**MOE_CONFIGS["DeepseekV3"], "index_n_heads": 2, "index_head_dim": 8, "index_topk": 3}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 4}

HYBRIDS: dict[str, dict] = {
    "Bamba": {**_LAYERS, **_MAMBA, "attn_layer_indices": [1, 3]},
    "FalconH1": {**_LAYERS, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "Lfm2": {**_LAYERS, "layer_types": ["conv", "full_attention"] * 2},
    "Mamba2": {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "n_groups": 1}
    | {"num_heads": 4, "head_dim": 16, "chunk_size": 4},
    "Qwen3Next": {**_LAYERS, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"mlp_only_layers": [0, 1, 2, 3]},
    "DeepseekV32": _SPARSE,  # an indexer chooses the tokens that attention sees
    "GlmMoeDsa": _SPARSE,
}
# Older releases of transformers have no DeepseekV32, and a GlmMoeDsa whose tokens see those behind them.
if not hasattr(transformers, "DeepseekV32Config"):
    del HYBRIDS["DeepseekV32"], HYBRIDS["GlmMoeDsa"]


def random_model(name: str, kind: str = "ForCausalLM", **sizes: object) -> torch.nn.Module:
    """Weights large enough that every layer matters; vectors near what their initialisation makes them."""
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (0 if parameter.ndim > 1 else parameter))
    return model.eval()


def score(source: object, segments: int | None = None, **settings: object) -> fastprune.Scores:
    return fastprune.score(source, CalibrationSet(HARM), segments=segments, progress=False, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", HYBRIDS)
def test_linears_of_hybrids_equal_the_oracle(name: str, segments: int) -> None:
    """In float64 throughout, which some recurrences would leave by themselves (errors of 5e-6)."""
    model = random_model(name, **HYBRIDS[name]).double()
    model.set_experts_implementation("eager")  # torch's grouped product takes no float64
    with StayDouble():
        found = engine_statistics(model, segments=segments, batch_tokens=24, dtype=torch.float64)
    exact = oracle_statistics(model, HARM)
    assert set(found) == set(exact)
    assert not any(part in matrix for matrix in found for part in ("conv.weight", "conv1d", "indexer"))
    for matrix, statistics in exact.items():
        for key, value in statistics.items():
            assert relative_error(found[matrix][key], value) < 1e-10, (matrix, key)


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
def test_masks_of_hybrids_fit_the_model_and_its_checkpoint(name: str, tmp_path: Path) -> None:
    model = random_model(name, **HYBRIDS[name])
    model.save_pretrained(tmp_path / "model")
    scores = fastprune.score(model, CalibrationSet(HARM), CalibrationSet(BENIGN), segments=3, progress=False)
    mask = scores.select(0.05, 0.02)
    streamed = fastprune.score(
        tmp_path / "model", CalibrationSet(HARM), CalibrationSet(BENIGN), segments=3, progress=False
    )
    assert streamed.select(0.05, 0.02) == mask
    fastprune.patch_checkpoint(tmp_path / "model", mask, tmp_path / "pruned")
    pruned = type(model).from_pretrained(tmp_path / "pruned")
    with mask.applied(model):
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for key, tensor in pruned.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_convolution_over_features_is_refused() -> None:
    model = random_model("Lfm2", **HYBRIDS["Lfm2"])
    conv = model.model.layers[0].conv
    conv.conv = torch.nn.Conv1d(32, 32, conv.conv.kernel_size, padding=2)
    with pytest.raises(ModelError, match=r"layers\.0\.conv\.conv\.weight of shape \(32, 32, 3\) is a weight"):
        eligible_matrices(model)


def test_norms_with_a_row_for_each_head_are_no_matrices() -> None:
    model = random_model("Cohere", **_LAYERS, use_qk_norm=True)
    assert model.model.layers[0].self_attn.q_norm.weight.ndim == 2
    assert len(score(model).names) == 4 * 7


@pytest.mark.parametrize(("name", "kind"), [("Bert", "ForMaskedLM"), ("T5", "ForConditionalGeneration")])
def test_other_language_models_are_refused_by_name(name: str, kind: str) -> None:
    model = random_model(name, kind, vocab_size=VOCAB, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    with pytest.raises(ModelError, match=f"causal language model with its head, .* got {name}{kind}"):
        score(model)


def test_a_decoder_that_is_not_told_so_is_refused_in_bfloat16_too() -> None:
    sizes = {k: v for k, v in _LAYERS.items() if k != "num_key_value_heads"}
    assert score(_bert(is_decoder=True, **sizes)).names
    with pytest.raises(ModelError, match="tokens behind it"):
        score(_bert(is_decoder=False, **sizes).bfloat16())


def _bert(**sizes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.BertLMHeadModel(transformers.BertConfig(**sizes)).eval()


def test_layers_in_several_lists_are_refused() -> None:
    model = transformers.XLMWithLMHeadModel(transformers.XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=3, n_heads=4))
    with pytest.raises(ModelError, match=r"several lists, transformer\.ffns and transformer\.attentions among them"):
        score(model)


def test_a_model_that_fails_by_itself_is_refused() -> None:
    model = build("Llama")
    model.model.layers[1].mlp.forward = lambda hidden: hidden[:, 99]
    with pytest.raises(ModelError, match=r"LlamaForCausalLM itself fails on rows of 4 and 6 tokens \(IndexError: "):
        score(model)


def test_a_model_that_fails_on_padding_is_refused() -> None:
    sizes = {"hidden_size": 32, "feed_forward_size": 32, "num_attention_heads": 2, "attention_head_size": 16}
    chunks = {"local_attn_chunk_length": 4, "axial_pos_embds": False, "max_position_embeddings": 128}
    config = transformers.ReformerConfig(
        vocab_size=VOCAB, is_decoder=True, num_hidden_layers=2, attn_layers=["local", "local"], **sizes, **chunks
    )
    model = transformers.ReformerModelWithLMHead(config).eval()
    with pytest.raises(ModelError, match=r"ReformerModelWithLMHead itself fails on rows of 4 and 6 tokens"):
        score(model)


def test_text_layers_beside_a_larger_tower_of_the_same_depth() -> None:
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = random_model(
        "Git", vision_config={**tower, "image_size": 32, "patch_size": 16}, **{**_LAYERS, "num_hidden_layers": 3}
    )
    assert all("vision" not in name for name in score(model).names)


_GEMMA4 = {**_LAYERS, "head_dim": 8, "global_head_dim": 8, "vocab_size_per_layer_input": VOCAB, "sliding_window": 64}
_GEMMA4 |= {"hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def test_keys_that_blocks_share_are_found_in_a_streamed_model(tmp_path: Path) -> None:
    """They are handed on in a mapping that is no dict, past the end of the segment that is checked."""
    model = _gemma4(num_kv_shared_layers=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"all blocks are given one \w+Dict[ ,].* cannot be streamed"):
        score(tmp_path, segments=2)
    whole, resident = score(tmp_path, segments=1), score(model, segments=1)
    assert whole.select(None, 0.05) == resident.select(None, 0.05)


def _gemma4(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma4TextConfig(**_GEMMA4, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def test_linears_inside_a_router_are_no_matrices() -> None:
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24}
    model = _gemma4(num_kv_shared_layers=0, **experts)
    assert any(".router." in name for name, _ in model.named_parameters())
    names = [matrix.name for matrix in eligible_matrices(model)]
    assert any("experts" in name for name in names)
    assert not any("router" in name for name in names)


class _TwoLayerRouter(torch.nn.Module):
    __module__ = "transformers.models.some.modeling_some"  # a user's own container may have any name

    def __init__(self) -> None:
        super().__init__()
        self.down_proj, self.out_proj = torch.nn.Linear(32, 16), torch.nn.Linear(16, 4)


def test_linears_inside_a_router_of_another_name_are_no_matrices() -> None:
    """Zaya's is below the name of the matrix that gates Llama's features."""
    model = build("Llama")
    before = [matrix.name for matrix in eligible_matrices(model)]
    model.model.layers[1].mlp.gate = _TwoLayerRouter()
    assert [matrix.name for matrix in eligible_matrices(model)] == before
    _TwoLayerRouter.__module__ = __name__
    assert len(eligible_matrices(model)) == len(before) + 2


def test_padding_beyond_a_sliding_window_does_not_reach_the_text() -> None:
    """In float64 eager attention answers NaN where a token sees nothing, as padding far from the text would."""
    model = build("Gemma2", dtype=torch.float64)
    longest = max(map(len, HARM))
    assert min(map(len, HARM)) + model.config.sliding_window < longest
    found = score(model, statistics_dtype="float64", p_max=1, q_max=1)
    alone = [score_one(model, example) for example in HARM]
    for name in found.names:
        dense = [torch.zeros(kept.harm[name].numel, dtype=torch.float64) for kept in (found, *alone)]
        for values, kept in zip(dense, (found, *alone), strict=True):
            values[kept.harm[name].indices] = kept.harm[name].values.double()
        assert relative_error(dense[0], sum(dense[1:])) < 1e-6


def score_one(model: torch.nn.Module, example: object) -> fastprune.Scores:
    settings = {"statistics_dtype": "float64", "p_max": 1, "q_max": 1, "progress": False}
    return fastprune.score(model, CalibrationSet([example]), **settings)


def test_a_mask_fits_a_checkpoint_whose_names_begin_otherwise(tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**_LAYERS, "head_dim": 8, "sliding_window": 64}
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16})
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    mask = score(model).select(None, 0.05)
    model.save_pretrained(tmp_path / "model")
    assert next(iter(mask)).startswith("model.language_model.layers.0.")
    fastprune.patch_checkpoint(tmp_path / "model", mask, tmp_path / "pruned")
    pruned = type(model).from_pretrained(tmp_path / "pruned")
    with mask.applied(model):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned.parameters(), strict=True))


@pytest.mark.parametrize("segments", [1, 3])
def test_blocks_may_return_lists(segments: int, tmp_path: Path) -> None:
    model = random_model("OpenAIGPT", "LMHeadModel", vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    model.save_pretrained(tmp_path)
    exact = oracle_statistics(model, HARM)
    for matrix, statistics in engine_statistics(model, segments=segments, batch_tokens=24).items():
        assert relative_error(statistics["grad_abs_sum"], exact[matrix]["grad_abs_sum"]) < 1e-5
    assert score(tmp_path, segments).select(None, 0.05) == score(model, segments).select(None, 0.05)
