"""How a model counts positions, and how long the rows of a forward pass may be because of them.

In: a causal LM in memory, and the lengths of rows. Out: limits in tokens, or an error to raise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from fastprune.errors import ModelError
from fastprune.model.quirks import EXTRA_POSITIONS, ROPES_BY_LENGTH, ROPES_WITH_SECOND_SET
from fastprune.model.vocabulary import config_of, input_embedding


def other_positions(model: nn.Module, done: str) -> ModelError:
    """The error for a model whose own positions are not those from 0 on, which rows are given here.

    Args:
        model: The model.
        done: What it cannot be, such as ``"scored"``.
    """
    return ModelError(
        f"{type(model).__name__} does not count positions from 0: position_ids 0, 1, 2, … give other results "
        "than no position_ids; expected the same both ways (RoBERTa and its kin begin after their padding token's id), "
        f"so it cannot be {done}",
        argument="model",
    )


def table_size(model: nn.Module) -> int | None:
    """Tokens that a learned table of positions has room for, ``None`` without one: rotary positions have no end."""
    limit = trained_length(model)
    learned = limit is not None and any(
        limit <= table.num_embeddings <= limit + EXTRA_POSITIONS for table in other_tables(model)
    )
    return limit if learned else None


def other_tables(model: nn.Module) -> list[nn.Embedding]:
    """All embeddings but that of the tokens: learned positions are one of them, rotary positions have none."""
    tokens = input_embedding(model)
    return [part for part in model.modules() if isinstance(part, nn.Embedding) and part is not tokens]


def trained_length(model: nn.Module) -> int | None:
    """Tokens of the longest text that the model was made for, by its config; ``None`` if the config has no limit."""
    limit = getattr(config_of(model).get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def rotary_conflict(model: nn.Module, lengths: Sequence[tuple[int, int]]) -> tuple[int, str] | None:
    """The first row that would change the results of others in the same forward pass.

    Some rotary embeddings have frequencies that depend on the longest row of a pass, once it is longer than the text
    that the model was first trained on: ``longrope`` (Phi-3, Phi-4) has a second set of them, ``dynamic`` another one
    for each length.

    Args:
        model: The model; only its config is used.
        lengths: Fewest and most tokens that each row has in its passes; more than the fewest if it grows.

    Returns:
        Its index and the reason, or ``None``.
    """
    config = config_of(model).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        kind = str(rope.get("rope_type"))
        second_set = kind in ROPES_WITH_SECOND_SET
        limit = rope.get("original_max_position_embeddings", longest) if second_set else longest
        if limit is None or not (second_set or ROPES_BY_LENGTH in kind):
            continue
        if second_set and all(fewest > limit for fewest, _ in lengths):
            continue
        for index, (_, most) in enumerate(lengths):
            if most > limit:
                return index, (
                    f"with more than {limit} tokens this model's rotary frequencies ({kind}) change, for every row "
                    "of the same forward pass"
                )
    return None


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of all kinds of layers: one mapping, or one for each kind of attention."""
    if isinstance(parameters, Mapping):
        yield parameters
        for value in parameters.values():
            yield from _ropes(value)
