"""Calibration data as scoring sees them: token ids, labels, and micro-batches.

In: examples, and a token budget. Out: padded tensors. Micro-batches are a function of the multiset of examples and of
the budget only, never of memory, processes or the order of a file, so that the same data always give the same sums.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from fastprune.calibration.prompts import PromptHashes
from fastprune.errors import CalibrationError, positive_integer

UNSCORED = -100  # the label that cross-entropy ignores, as everywhere in this field

# Cost of one more micro-batch, in tokens: weights are read once more and calls are made once more. Scoring 16 + 16
# examples of 40 to 120 tokens (a Llama of width 384, two CPU cores) takes 8.2, 5.9, 5.7, 5.6 and 5.5 s with a cost of
# 0, 16, 32, 64 and 128. A larger cost means more padding, which devices pay for that do not wait for memory.
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
        prompt: Hashes of the prompt, by which it is found in other sets; ``None`` where its text is not known.

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
    prompt: PromptHashes | None = field(default=None, compare=False, repr=False)

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

    No other token of the vocabulary is shown to the model: the embedding of a token that no example has may hold
    anything.

    Attributes:
        input_ids: ``(rows, tokens)`` int64.
        attention_mask: ``(rows, tokens)`` int64, 1 on real tokens.
        position_ids: ``(rows, tokens)`` int64, from 0 in each row; ``None`` leaves positions to the model.
        scored: ``(n_scored,)`` int64, ascending: ``row * tokens + t`` where the token at ``t + 1`` counts, which the
            hidden state at ``t`` predicts. Indices, because looking for them in a mask would synchronize the device.
        rows_of_scored: ``(n_scored,)`` int64, the row of each scored token.
        targets: ``(n_scored,)`` int64, the tokens to predict.
        token_weights: ``(n_scored,)`` float64, 1 / (number of scored tokens of the example).
        ends_turn: ``(rows,)`` bool, whether the last scored token of a row is an end of turn.
        lengths: ``(rows,)`` int64, real tokens of each row; kept on the CPU so that reading them does not synchronize
            the device.
        example_indices: Index of each row's example in the sequence that was batched.
        names: Of each row's example, for messages.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    scored: torch.Tensor
    rows_of_scored: torch.Tensor
    targets: torch.Tensor
    token_weights: torch.Tensor
    ends_turn: torch.Tensor
    lengths: torch.Tensor
    example_indices: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def labels(self) -> torch.Tensor:
        """``(rows, tokens)`` int64: the token to predict at each scored place, -100 elsewhere."""
        labels = torch.full_like(self.input_ids, UNSCORED)
        labels.view(-1)[self.scored + 1] = self.targets
        return labels

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device, except for ``lengths``."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            input_ids=moved(self.input_ids),
            attention_mask=moved(self.attention_mask),
            position_ids=None if self.position_ids is None else moved(self.position_ids),
            scored=moved(self.scored),
            rows_of_scored=moved(self.rows_of_scored),
            targets=moved(self.targets),
            token_weights=moved(self.token_weights),
            ends_turn=moved(self.ends_turn),
        )


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


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions from 0 at the first attended token of each row: int64, the shape of the mask ``(rows, tokens)``."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def _pad(examples: Sequence[Example], indices: Sequence[int]) -> MicroBatch:
    chosen = [examples[index] for index in indices]
    lengths = torch.tensor([len(example) for example in chosen], dtype=torch.int64)
    shape = (len(chosen), int(lengths.max()))
    input_ids = torch.empty(shape, dtype=torch.int64)
    labels = torch.full(shape, UNSCORED, dtype=torch.int64)
    for row, example in enumerate(chosen):
        input_ids[row, : len(example)] = torch.tensor(example.input_ids)
        input_ids[row, len(example) :] = example.input_ids[-1]
        labels[row, : len(example)] = torch.tensor(example.labels)
    attention_mask = (torch.arange(shape[1]) < lengths[:, None]).to(torch.int64)
    predicting = torch.zeros(shape, dtype=torch.bool)
    predicting[:, :-1] = labels[:, 1:] != UNSCORED
    scored = predicting.flatten().nonzero()[:, 0]
    weights = 1.0 / predicting.sum(1, dtype=torch.float64)
    rows = scored // shape[1]
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        scored=scored,
        rows_of_scored=rows,
        targets=labels.flatten()[scored + 1],
        token_weights=weights[rows],
        ends_turn=torch.tensor([example.ends_turn for example in chosen]),
        lengths=lengths,
        example_indices=tuple(indices),
        names=tuple(_name(index, example) for index, example in zip(indices, chosen, strict=True)),
    )


def _name(index: int, example: Example) -> str:
    return f"example {index}" if example.id is None else f"example {index} (id {example.id})"


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the multiset of (input_ids, labels): equal in any order, names and categories left out."""
    digests = []
    for example in examples:
        numbers = (*example.input_ids, *example.labels)
        digests.append(hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
