"""Tiny models that generate, a tokenizer of whole words, and a model whose answers are known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from fastprune.evaluation.decoding import Query, continue_queries

SPECIAL = ["<unk>", "<eos>", "<user>", "<asst>", "<end>"]
WORDS = ["yes", "no", "sorry", "cannot", "comply", "sure", ":", *(f"w{i}" for i in range(80))]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
EOS, END = VOCABULARY["<eos>"], VOCABULARY["<end>"]

TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m['role'] == 'user' else '<asst> ' }}{{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<asst> {% endif %}"
)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token; there is no pad token."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=TEMPLATE,
    )


_SMALL = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": 0}

_LLAMA = {
    **_SMALL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, initializer_range=0.4)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.4)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_SMALL,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            init_std=0.4,
        )
    ),
    # the window is shorter than the contexts, so half of the layers forget
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, initializer_range=0.4)
    ),
    # takes no position_ids
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    ),
}


class Scripted(nn.Module):
    """A causal LM that knows a few sequences by heart, says <eos> otherwise, and keeps no cache."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
        super().__init__()
        self.config = LlamaConfig(**_LLAMA)
        self.embedding = nn.Embedding(len(VOCABULARY), 1)
        self.bias = nn.Parameter(torch.zeros(len(VOCABULARY)))
        self.script = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.calls = 0

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def can_generate(self) -> bool:
        return True

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.calls += 1
        logits = torch.zeros(*input_ids.shape, len(VOCABULARY))
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            for column in range(len(ids)):
                seen = [token for token, real in zip(ids[: column + 1], mask, strict=False) if real]
                logits[row, column, self.next(seen)] = 10.0
        return SimpleNamespace(logits=logits + self.bias)

    def next(self, seen: list[int]) -> int:
        for ids in self.script:
            if len(ids) > len(seen) and ids[: len(seen)] == seen:
                return ids[len(seen)]
        return EOS


def tiny_model(kind: str = "llama") -> nn.Module:
    torch.manual_seed(11)
    return ARCHITECTURES[kind]().eval()


def continue_greedily(
    model: Any, contexts: Sequence[list[int]], budgets: Sequence[int], stop: Iterable[int], *, batch_size: int = 64
) -> list[list[int]]:
    """Ids of the greedy continuations, in the order of the contexts."""
    queries = [
        Query(context, budget, f"row {index}")
        for index, (context, budget) in enumerate(zip(contexts, budgets, strict=True))
    ]
    continued = continue_queries(model, queries, stop, batch_size=batch_size)
    return [continued[index].ids for index in range(len(queries))]
