"""The short rows on which a model is checked before the pass.

In: a view, and the examples of the pass. Out: batches of fixed pseudo-random tokens of the model's vocabulary, padded
as the engine pads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fastprune.calibration import Example, MicroBatch, micro_batches
from fastprune.model.block_view import View
from fastprune.model.vocabulary import predictable_tokens, readable_tokens

LENGTHS = (4, 6)
LOUD = 1  # the row whose loss is taken; gradients of the other row are zero unless rows are mixed
EARLY = 3  # tokens of that row whose loss is taken; it must not depend on later ones
_FEW = 8  # with fewer distinct tokens in the examples, others are used too


def tokens_of(view: View, examples: Sequence[Example]) -> torch.Tensor:
    """Ids that the model can read and predict: those of the examples, unless these are too few."""
    known = min(readable_tokens(view.model), predictable_tokens(view.model))
    used = sorted({token for example in examples for token in example.input_ids if token < known})
    return torch.tensor(used) if len(used) >= min(_FEW, known) else torch.arange(known)


def draw(tokens: torch.Tensor, length: int) -> list[int]:
    """Fixed pseudo-random tokens."""
    return tokens[torch.randint(len(tokens), (length,), generator=torch.Generator().manual_seed(length))].tolist()


def batch_of(view: View, rows: Sequence[Sequence[int]]) -> MicroBatch:
    """Rows by rising length, padded as the engine pads them."""
    examples = [Example(input_ids=tuple(ids), labels=(-100, *ids[1:])) for ids in rows]
    (micro_batch,) = micro_batches(examples, batch_tokens=max(map(len, rows)) * len(rows))
    return micro_batch.to(view.device)


def probe(view: View, tokens: torch.Tensor) -> tuple[MicroBatch, MicroBatch]:
    """Two short rows, and the longer one alone. The loss is that of the first tokens of the longer one."""
    rows = [draw(tokens, length) for length in LENGTHS]
    batch, alone = batch_of(view, rows), batch_of(view, rows[LOUD:])
    places = batch.scored - LOUD * batch.input_ids.shape[1]
    batch.token_weights[(places < 0) | (places >= EARLY)] = 0.0
    return batch, alone


def padded_otherwise(batch: MicroBatch) -> MicroBatch:
    """The same rows, with other tokens as padding."""
    ids = torch.where(batch.attention_mask.bool(), batch.input_ids, batch.input_ids.flip(1))
    return dataclasses.replace(batch, input_ids=ids)


def other_padding(hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Hidden states between blocks, with the padding's replaced by those of other tokens."""
    return torch.where(attended.to(hidden.device).unsqueeze(-1), hidden, hidden.flip(1))
