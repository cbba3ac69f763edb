"""From contexts to continuations: the token loop behind every answer, greedy or sampled, in batches.

In: queries, which are token ids with a budget. Out: the ids that the model adds, and whether it ended by itself. Same
input, same ids, whatever was computed before: batches are a function of all queries, and random numbers of a query's
``state`` alone. Another composition of batches changes logits by rounding only (about 1e-6 in float32), so a choice can
differ only where two candidates are that close.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from fastprune.errors import ArgumentError, positive_integer
from fastprune.evaluation.forward import Forward, check_finite, inference
from fastprune.progress import Progress


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits.

    Attributes:
        temperature: 0 takes the best token, ties to the lower id; above 0 draws from ``softmax(logits / temperature)``.
        top_p: Draw from the fewest best tokens that have this share of the probability; 1 keeps all.

    Raises:
        ArgumentError: A value is out of range, or ``top_p`` is given where nothing is drawn.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ArgumentError(f"expected a number, got {value!r}", argument=name)
        if not 0 <= self.temperature <= 100:  # also refuses nan
            raise ArgumentError(f"expected a number from 0 to 100, got {self.temperature!r}", argument="temperature")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"expected a number above 0 and up to 1, got {self.top_p!r}", argument="top_p")
        if self.is_greedy and self.top_p != 1:
            raise ArgumentError(
                f"expected 1 at temperature 0, which draws nothing, got {self.top_p!r}; give a temperature above 0",
                argument="top_p",
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def facts(self) -> dict[str, float]:
        """JSON data for keys and records."""
        return {name: float(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Query:
    """What a model is to continue.

    Attributes:
        context: Token ids, at least one.
        budget: Limit of new tokens.
        name: Its name in messages.
        state: Text that its random numbers are a function of; equal texts draw equally.
    """

    context: Sequence[int]
    budget: int
    name: str
    state: str = ""


@dataclass(frozen=True)
class Continuation:
    """What the model added.

    Attributes:
        ids: New token ids, without the one that ended it.
        finish: ``"stop"`` if the model ended by itself, ``"length"`` if the budget did.
    """

    ids: list[int]
    finish: str

    @property
    def new_tokens(self) -> int:
        """Number of tokens that the model generated, the one that ended it included."""
        return len(self.ids) + (self.finish == "stop")


def continue_queries(
    model: Any,
    queries: Sequence[Query],
    stop: Iterable[int],
    *,
    sampling: Sampling = Sampling(),  # frozen
    batch_size: int = 64,
    finished: Collection[int] = (),
    on_batch: Callable[[Mapping[int, Continuation]], None] | None = None,
    progress: bool = False,
) -> dict[int, Continuation]:
    """Continue each context until a stop token or its own budget.

    Contexts are grouped by budget and length, so that short answers do not wait for long ones. The ids of a greedy
    continuation equal those of ``model.generate(do_sample=False)`` unless the model's generation config changes logits
    or searches (``repetition_penalty``, ``suppress_tokens``, ``num_beams``): only its end-of-text ids are used here.

    Args:
        model: A causal LM, unchanged afterwards.
        queries: What to continue.
        stop: Ids that end a continuation.
        sampling: How tokens are chosen.
        batch_size: Queries in a forward pass.
        finished: Indices of queries that need no continuation. A batch of which one is missing is computed as a whole,
            so that an interrupted run goes on with the batches that it would have had.
        on_batch: Takes the new continuations of each batch, by index of the query, as soon as it is done.
        progress: Show how far it is.

    Returns:
        The new continuations, by index of the query.

    Raises:
        ArgumentError: A context does not fit the model, or ``batch_size`` is no positive integer.
        ScoringError: The model's logits are NaN.
    """
    positive_integer("batch_size", batch_size)
    continued: dict[int, Continuation] = {}
    batches = [batch for batch in batches_of(queries, batch_size) if not all(index in finished for index in batch)]
    if not batches:
        return continued
    with inference(model) as forward:
        forward.check(
            [query.context for query in queries],
            [query.budget for query in queries],
            [query.name for query in queries],
        )
        stop_ids = torch.tensor(sorted(stop), dtype=torch.int64)
        with Progress(sum(map(len, batches)), "answering", "row", progress) as bar:
            for batch in batches:
                found = continue_batch(forward, [queries[index] for index in batch], stop_ids, sampling, bar)
                new = {index: each for index, each in zip(batch, found, strict=True) if index not in finished}
                continued |= new
                if on_batch is not None:
                    on_batch(new)
    return continued


def batches_of(queries: Sequence[Query], batch_size: int) -> list[list[int]]:
    """Indices of the queries of each batch: sorted by budget and length, in batches of nearly the same size."""
    order = sorted(range(len(queries)), key=lambda i: (queries[i].budget, len(queries[i].context), queries[i].context))
    n_batches = -(-len(order) // batch_size)
    return [order[len(order) * b // n_batches : len(order) * (b + 1) // n_batches] for b in range(n_batches)]


def continue_batch(
    forward: Forward, queries: Sequence[Query], stop: torch.Tensor, sampling: Sampling, bar: Progress
) -> list[Continuation]:
    """One batch of :func:`continue_queries`; ``bar`` moves by the number of queries."""
    device = forward.device
    input_ids, attention_mask = _pad_left([query.context for query in queries], device)
    limits = torch.tensor([query.budget for query in queries], device=device)
    ends = attention_mask.sum(1) + limits
    choose = _greedy if sampling.is_greedy else _Drawing(sampling, queries)
    finished = torch.zeros(len(queries), dtype=torch.bool, device=device)
    lengths, stopped = limits.clone(), torch.zeros_like(finished)
    columns: list[torch.Tensor] = []
    past = None
    longest = int(limits.max())
    for step in range(longest):
        logits, past = forward(input_ids, attention_mask, past=past, use_cache=True, last=True, ends=ends)
        tokens = choose(logits[:, -1]).to(device)
        columns.append(tokens)
        ended = torch.isin(tokens, stop.to(device)) & ~finished
        lengths[ended] = step
        stopped |= ended
        finished |= ended | (step + 1 >= limits)
        if bool(finished.all()):
            bar.advance(len(queries) * (longest - step) / longest)
            break
        bar.advance(len(queries) / longest)
        # a model without a cache is given the whole sequence again
        input_ids = tokens[:, None] if past is not None else torch.cat([input_ids, tokens[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    new = torch.stack(columns, dim=1).tolist()
    return [
        Continuation(ids[:length], "stop" if ended else "length")
        for ids, length, ended in zip(new, lengths.tolist(), stopped.tolist(), strict=True)
    ]


def _greedy(logits: torch.Tensor) -> torch.Tensor:
    values, tokens = logits.max(dim=-1)
    check_finite(values, "generation")
    return tokens


class _Drawing:
    """Draws tokens by inverting the distribution function at one number a step, which only the query's state decides.

    The function runs over the vocabulary in the order of the ids and not of the probabilities: two tokens of nearly the
    same probability, which rounding may swap, then leave the draw as it is.
    """

    def __init__(self, sampling: Sampling, queries: Sequence[Query]) -> None:
        self._sampling, self._step = sampling, 0
        self._numbers = np.zeros((len(queries), max(query.budget for query in queries)))
        for row, query in zip(self._numbers, queries, strict=True):
            seed = int.from_bytes(hashlib.sha256(query.state.encode()).digest()[:16], "little")
            row[: query.budget] = np.random.Generator(np.random.Philox(key=seed)).random(query.budget)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of each row of ``(rows, vocabulary)``."""
        precision = torch.float32 if logits.device.type == "mps" else torch.float64  # sums over 100,000 tokens
        shares = torch.softmax(logits.to(precision) / self._sampling.temperature, dim=-1)
        check_finite(shares, "generation")
        if self._sampling.top_p < 1:
            best, order = shares.sort(dim=-1, descending=True, stable=True)
            beyond = best.cumsum(-1) - best >= self._sampling.top_p
            shares = shares.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
        heights = shares.cumsum(-1)
        numbers = torch.as_tensor(self._numbers[:, self._step], dtype=precision, device=logits.device)
        self._step += 1
        # right=True: never a token of share 0, even at the number 0
        found = torch.searchsorted(heights, (numbers * heights[:, -1])[:, None], right=True)[:, 0]
        last = shares.shape[-1] - 1 - (shares > 0).flip(-1).int().argmax(-1)  # where rounding went past the end
        return torch.minimum(found, last)


def _pad_left(contexts: list[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad, and mask, with the row's own last token: the embedding of any other token may be NaN."""
    width = max(map(len, contexts))
    ids = torch.tensor([[c[-1]] * (width - len(c)) + list(c) for c in contexts], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], dtype=torch.int64)
    return ids.to(device), mask.to(device)
