"""What scoring sees of calibration data: token ids, labels, and micro-batches of them.

In: examples, and a token budget. Out: padded tensors. Micro-batches are a function of the multiset of examples and of
the budget alone, never of memory, processes or the order of a file, so that the same data always gives the same sums.
It must not know text, tokenizers or models.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fastprune.errors import CalibrationError, positive_integer

UNSCORED = -100  # the label that cross-entropy ignores, as everywhere in this field

# What one micro-batch more costs, in tokens: its weights are read once more and its calls are made once more. Scoring
# 16 + 16 examples of 40 to 120 tokens (a Llama of width 384, two CPU cores) takes 8.2, 5.9, 5.7, 5.6 and 5.5 s with
# a cost of 0, 16, 32, 64 and 128; the larger it is, the more padding there is on devices that do not wait for memory.
BATCH_COST = 64


@dataclass(frozen=True)
class Example:
    """One tokenised example; its loss is the mean over the tokens that have a label.

    Attributes:
        input_ids: Token ids, without padding.
        labels: One per token: -100 where the token is not scored, otherwise the id whose probability at that place
            counts (the token itself, unless a foreign loader says otherwise). The first is always -100: nothing comes
            before it.
        id: Name of the row it was made from.
        category: Category of that row.
        ends_turn: Whether the last label is the end-of-turn token of a chat template.
        finish: How the reply ended: ``"stop"``, ``"length"``, or ``None`` where that is not known.
        refusal: Whether the reply holds a refusal phrase; ``None`` where its text is not known.

    Raises:
        CalibrationError: The two differ in length, the first token is scored, or no token is.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    id: str | None = None
    category: str | None = None
    # Facts about the text, which examples of equal tokens may differ in.
    ends_turn: bool = field(default=False, compare=False)
    finish: str | None = field(default=None, compare=False)
    refusal: bool | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise CalibrationError(f"example has {len(self.input_ids)} input_ids but {len(self.labels)} labels")
        if not self.labels or self.labels[0] != UNSCORED:
            raise CalibrationError("the first label of an example must be -100: no token comes before the first")
        if self.scored == 0:
            raise CalibrationError("example has no scored token: every label is -100")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return sum(label != UNSCORED for label in self.labels)


@dataclass(frozen=True)
class MicroBatch:
    """Examples that go through the model together, padded on the right with each row's own last token.

    No other token of the vocabulary is shown to the model: the row of one that no example has may hold anything.

    Attributes:
        input_ids: ``(rows, tokens)`` int64.
        labels: ``(rows, tokens)`` int64, -100 where not scored and on padding.
        attention_mask: ``(rows, tokens)`` int64, 1 on real tokens.
        lengths: ``(rows,)`` int64, real tokens of each row.
        example_indices: Where each row's example stands in the sequence that was batched.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    lengths: torch.Tensor
    example_indices: list[int]


def micro_batches(examples: Sequence[Example], batch_tokens: int) -> list[MicroBatch]:
    """Group examples of similar length under a budget of padded tokens, with little padding.

    Args:
        examples: Any number of examples; every one appears exactly once in the result.
        batch_tokens: Limit for rows times longest row. An example above the limit goes alone.

    Returns:
        Micro-batches by rising length. Their tensors depend on the multiset of examples only, not on its order.

    Raises:
        ArgumentError: ``batch_tokens`` is not a positive integer.
    """
    positive_integer("batch_tokens", batch_tokens)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]), examples[i].input_ids, examples[i].labels))
    cuts = _cheapest_cuts([len(examples[i]) for i in order], batch_tokens)
    return [_pad(examples, order[start:stop]) for start, stop in cuts]


def _cheapest_cuts(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, int]]:
    """Cut rising lengths into runs within the budget, at the least cost of padding and of further micro-batches.

    Fewer, larger micro-batches pad more, and padding costs as much as tokens do: 16 examples of 40 to 120 tokens in one
    micro-batch are half padding. A cut costs ``BATCH_COST``; the cheapest set of cuts is found exactly.
    """
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the first n examples, and where the last run among them starts
    for stop in range(1, len(lengths) + 1):
        longest = lengths[stop - 1]
        reach = max(1, batch_tokens // longest)
        # Of equal costs the shortest last run, so that leftovers stand at the end.
        starts = range(stop - 1, max(-1, stop - 1 - reach), -1)
        best.append(
            min(((best[i][0] + (stop - i) * longest + BATCH_COST, i) for i in starts), key=lambda item: item[0])
        )
    cuts, stop = [], len(lengths)
    while stop:
        cuts.append((best[stop][1], stop))
        stop = best[stop][1]
    return cuts[::-1]


def _pad(examples: Sequence[Example], indices: list[int]) -> MicroBatch:
    lengths = torch.tensor([len(examples[i]) for i in indices], dtype=torch.int64)
    shape = (len(indices), int(lengths.max()))
    input_ids = torch.empty(shape, dtype=torch.int64)
    labels = torch.full(shape, UNSCORED, dtype=torch.int64)
    for row, index in enumerate(indices):
        input_ids[row, : lengths[row]] = torch.tensor(examples[index].input_ids)
        input_ids[row, lengths[row] :] = examples[index].input_ids[-1]
        labels[row, : lengths[row]] = torch.tensor(examples[index].labels)
    attention_mask = (torch.arange(shape[1]) < lengths[:, None]).to(torch.int64)
    return MicroBatch(input_ids, labels, attention_mask, lengths, indices)


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the multiset of (input_ids, labels): equal in any order, names and categories left out."""
    digests = []
    for example in examples:
        numbers = (*example.input_ids, *example.labels)
        digests.append(hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
