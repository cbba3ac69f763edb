"""What every causal LM of transformers has: a config, an embedding of tokens, and a head.

A model may read more tokens than it can predict, or fewer. Its weights may be on the meta device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def config_of(model: nn.Module) -> PreTrainedConfig:
    """The config of a causal LM; its ``get_text_config()`` is that of the language model inside a multimodal one."""
    return cast("PreTrainedModel", model).config


def input_embedding(model: nn.Module) -> nn.Embedding:
    """The embedding of token ids."""
    return cast("nn.Embedding", cast("PreTrainedModel", model).get_input_embeddings())


def readable_tokens(model: nn.Module) -> int:
    """Rows of the input embedding: token ids are below."""
    return input_embedding(model).weight.shape[0]


def predictable_tokens(model: nn.Module) -> int:
    """Rows of the head: labels are below.

    A head without a weight or a width is taken to have a row for each token of the config's vocabulary.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    known = (
        weight.shape[0] if weight is not None and getattr(weight, "ndim", 0) == 2 else None,
        getattr(head, "out_features", None),
        getattr(config_of(model).get_text_config(), "vocab_size", None),
    )
    return next((rows for rows in known if isinstance(rows, int)), readable_tokens(model))
