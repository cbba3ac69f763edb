"""Tiny random models of every architecture under test, and calibration examples for them."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import transformers
from torch import nn

from fastprune.calibration import Example

VOCAB = 97
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
}
_NEOX = {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"}

CONFIGS: dict[str, dict] = {
    "Llama": _COMMON,
    "Qwen2": _COMMON,
    "Qwen3": {**_COMMON, "head_dim": 8},
    "Mistral": {**_COMMON, "sliding_window": 6},
    "Gemma2": {**_COMMON, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "Olmo2": _COMMON,
    "Phi3": _COMMON,
    "GPTNeoX": _NEOX,
    "OPT": _OPT,
    "GPT2": _GPT2,
}

_MOE = {**_COMMON, "num_hidden_layers": 3, "num_experts_per_tok": 2}

# Mixtures of experts. Few layers and experts, of odd number where the model allows, so that a test takes little time.
MOE_CONFIGS: dict[str, dict] = {
    "Mixtral": {**_MOE, "num_local_experts": 5},
    "Qwen3Moe": {**_MOE, "head_dim": 8, "num_experts": 5, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "Qwen2Moe": {**_MOE, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    "Olmoe": {**_MOE, "num_experts": 5, "intermediate_size": 24},
    "DeepseekV3": {
        **_MOE,
        "num_key_value_heads": 4,
        "n_routed_experts": 6,
        "n_group": 3,
        "topk_group": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "GptOss": {**_MOE, "head_dim": 8, "num_local_experts": 5, "intermediate_size": 24, "sliding_window": 6},
}


def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> torch.nn.Module:
    """A random model whose weights are large enough that every block matters; evaluation mode."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**(CONFIGS | MOE_CONFIGS)[name], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def examples(lengths: list[tuple[int, int]], *, seed: int = 0, vocab: int = VOCAB) -> list[Example]:
    """Random examples; each entry is (context tokens, scored tokens)."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number, (context, scored) in enumerate(lengths):
        ids = torch.randint(3, vocab, (context + scored,), generator=generator).tolist()
        made.append(Example(tuple(ids), (*[-100] * context, *ids[context:]), id=f"row-{number}"))
    return made


HARM = examples([(5, 4), (3, 7), (9, 2), (1, 1), (12, 5)], seed=1)
BENIGN = examples([(4, 6), (2, 1), (7, 9), (3, 3)], seed=2)


def pad(rows: list[Example], side: str, *, with_mask: bool = True) -> dict[str, torch.Tensor]:
    """One Hugging Face batch of all rows, padded on one side with token 0."""
    width = max(map(len, rows))
    shape = (len(rows), width)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -100, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for index, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, part] = torch.tensor(row.input_ids)
        labels[index, part] = torch.tensor(row.labels)
        mask[index, part] = 1
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return batch if with_mask else {key: batch[key] for key in ("input_ids", "labels")}


class _SharesState(nn.Module):
    """A block that reads what an earlier block left behind in a place that only a whole forward resets."""

    def __init__(self, block: nn.Module, memory: list) -> None:
        super().__init__()
        self.block, self.memory = block, memory

    def forward(self, hidden: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.memory.append(1)
        return self.block(hidden, **kwargs) * len(self.memory)


class _Clear:
    """A hook with its own reference to the memory, so that a deep copy of the model has a memory of its own."""

    def __init__(self, memory: list) -> None:
        self.memory = memory

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.memory.clear()


def stateful(model: nn.Module) -> nn.Module:
    """A Llama that cannot be run block by block."""
    memory: list = []
    model.register_forward_pre_hook(_Clear(memory))
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = _SharesState(block, memory)
    return model


def slow_except(names: Iterable[str], *quick: str) -> list[object]:
    """Parameters of a test, of which only the quick ones are part of ``make test``."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


class Twice(nn.Module):
    """A module that is called twice in one forward, as per-example statistics refuse it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden) + self.mlp(0.5 * hidden)
