"""Peculiarities of architectures, as tables: the names of their parts, and the switches of their configs.

Most models need no entry. One that has another name for a known part, such as its router or its sliding window, needs
one word in one of these tables. Names are those of transformers 5.
"""

from __future__ import annotations

import re

# Mixtures of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of a config for the number of experts."""
ROUTERS = frozenset({"gate", "router"})
"""Modules that choose experts; a Linear of that name counts as one if it has a row for each expert."""
ALWAYS_ROUTERS = frozenset({"router"})
"""Of these, modules whose Linears choose experts whatever their width."""
SHARED_EXPERT_GATES = frozenset({"shared_expert_gate"})
"""Linears of one row that weigh the expert which sees every token (Qwen2-MoE)."""
CHOOSER_CLASSES = ("Router", "Indexer")
"""Endings of transformers' classes that choose experts, or the tokens that attention sees; they have no gradient."""
EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A fused parameter of experts to the names of its parts on disk, in the order in which loading stacks them."""
STORED_EXPERT = re.compile(r"(?P<layer>.+)\.\w+\.experts\.(?P<expert>\d+)\.(?P<part>\w+)\.weight")
"""Name of a tensor on disk that is a part of one expert."""

# Attention and positions.
WINDOWS = ("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size", "local_attention")
"""Keys of a config for the number of tokens that local attention sees, or for the length of its chunks."""
LAYER_INDICES = ("layer_idx", "layer_id", "layer_number", "layer_index")
"""Attributes of a block for its own index, the only one in which blocks of a kind differ."""
EXTRA_POSITIONS = 2
"""Rows that a table of learned positions may have beyond the longest text (OPT)."""

# Rotary embeddings whose frequencies depend on the longest row of a forward pass.
ROPES_WITH_SECOND_SET = frozenset({"longrope"})
"""Kinds with other frequencies beyond ``original_max_position_embeddings`` (Phi-3, Phi-4)."""
ROPES_BY_LENGTH = "dynamic"
"""Part of the name of kinds with frequencies of their own for each length."""

# Switches that make a model return or keep more than hidden states: a recorded cache would grow at every recompute, and
# router outputs would add an auxiliary loss.
OUTPUT_SWITCHES = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits")
CACHES = ("cache", "past_key_values")
"""Argument and output that holds the cache; transformers 5.24 renames it, and 5.40 drops the old name."""

# Quantized and derived weights.
PACKED_WEIGHTS = ("qweight", "weight_packed")
"""Names of packed weights: GPTQ and AWQ; compressed-tensors."""
DEQUANTIZING_CONFIGS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Method of quantization to transformers' config that loads such a checkpoint dequantized."""
NORM_REMOVERS = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
"""Hooks of ``torch.nn.utils`` that form a weight anew in each forward, to what takes them off."""
