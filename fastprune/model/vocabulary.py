"""Which tokens a causal LM can read, and which it can predict: the two need not be as many.

In: a model, whose weights may be on the meta device. Out: numbers of tokens.
"""

from __future__ import annotations

from torch import nn


def readable_tokens(model: nn.Module) -> int:
    """Rows of the input embedding: token ids are below."""
    return model.get_input_embeddings().weight.shape[0]


def predictable_tokens(model: nn.Module) -> int:
    """Rows of the head: labels are below.

    A head that cannot be asked is taken to have a row for each token of the config's vocabulary.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    known = (
        weight.shape[0] if getattr(weight, "ndim", 0) == 2 else None,
        getattr(head, "out_features", None),
        getattr(model.config.get_text_config(), "vocab_size", None),
    )
    return next((rows for rows in known if isinstance(rows, int)), readable_tokens(model))
