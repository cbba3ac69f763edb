"""What scoring sees of calibration data: token ids, labels, and micro-batches of them.

In: examples, and a token budget. Out: padded tensors. Micro-batches are a function of the multiset of examples and of
the budget alone, never of memory, processes or the order of a file, so that the same data always gives the same sums.
It must not know text, tokenizers or models.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fastprune.errors import ArgumentError, CalibrationError

UNSCORED = -100  # the label that cross-entropy ignores, as everywhere in this field


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

    Raises:
        CalibrationError: The two differ in length, the first token is scored, or no token is.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    id: str | None = None
    category: str | None = None

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
    """Examples that go through the model together, right-padded with id 0.

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
    """Group examples of similar length under a budget of padded tokens.

    Args:
        examples: Any number of examples; every one appears exactly once in the result.
        batch_tokens: Limit for rows times longest row. An example above the limit goes alone.

    Returns:
        Micro-batches by rising length. Their tensors depend on the multiset of examples only, not on its order.

    Raises:
        ArgumentError: ``batch_tokens`` is not a positive integer.
    """
    check_batch_tokens(batch_tokens)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i]), examples[i].input_ids, examples[i].labels))
    groups: list[list[int]] = []
    for index in order:  # lengths rise, so the newcomer is always the longest of its group
        if groups and (len(groups[-1]) + 1) * len(examples[index]) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return [_pad(examples, group) for group in groups]


def check_batch_tokens(batch_tokens: int) -> None:
    """Raise ArgumentError unless the budget is a positive integer."""
    if isinstance(batch_tokens, bool) or not isinstance(batch_tokens, int) or batch_tokens < 1:
        raise ArgumentError(f"batch_tokens must be a positive integer, got {batch_tokens!r}")


def _pad(examples: Sequence[Example], indices: list[int]) -> MicroBatch:
    lengths = torch.tensor([len(examples[i]) for i in indices], dtype=torch.int64)
    shape = (len(indices), int(lengths.max()))
    input_ids = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, UNSCORED, dtype=torch.int64)
    for row, index in enumerate(indices):
        input_ids[row, : lengths[row]] = torch.tensor(examples[index].input_ids)
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
