"""One forward pass of a causal LM on padded ids, the same for every architecture.

In: a model and padded ``input_ids`` with their attention mask, on either side. Out: float logits and, if asked, the
cache. Positions are made from the mask, because some models (GPT-2) count padding as text unless they are told
otherwise.
It must not know tokenizers, rows or what the logits are for.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastprune.errors import ArgumentError, ModelError, ScoringError
from fastprune.model.adapters import unwrap
from fastprune.model.frozen import frozen_eval, model_lock
from fastprune.model.module_check import TOLERANCE, relative_error
from fastprune.model.positions import other_positions, other_tables, rotary_conflict, trained_length
from fastprune.model.quirks import CACHES
from fastprune.model.supported import check_causal

_COMPARED = 64  # tokens of a row


class Forward:
    """A model's forward with only the keywords that it declares; make one with :func:`inference`.

    Attributes:
        device: Where ids have to be.
        vocab_size: Rows of the input embedding.
        max_tokens: Longest sequence that the model has positions for, or ``None`` where its config states none.
    """

    def __init__(self, model: Any) -> None:
        # Compiled and adapter-wrapped models forward *args, **kwargs; what they wrap says what it takes. An adapter
        # that puts tokens before the text is refused here: it would do so at every step.
        self._inner = unwrap(model)
        embedding = model.get_input_embeddings().weight
        if embedding.device.type == "meta":
            raise ModelError("model: expected weights in memory, got a model on the meta device")
        self.device = embedding.device
        self.vocab_size = embedding.shape[0]
        self.max_tokens = trained_length(model)
        self._model = model
        self._takes = inspect.signature(self._inner.forward).parameters
        self._cache = next((name for name in CACHES if name in self._takes), CACHES[-1])
        self._padding_checked = 0
        self._watched: tuple[int, torch.Tensor] | None = None  # a row, and what it was when it was compared

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        past: Any = None,
        use_cache: bool,
        last: bool,
        ends: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """Run the model.

        Args:
            input_ids: ``(rows, new_tokens)`` int64 on ``device``.
            attention_mask: ``(rows, past_tokens + new_tokens)`` int64.
            past: The cache of the tokens before, or ``None``.
            use_cache: Whether to ask for a cache; a model without one gives ``None`` all the same.
            last: Only the logits of the last token are wanted.
            ends: ``(rows,)`` int64, tokens of each row when it is over. What comes after, beside rows that go on, stays
                at its last position: there may be none beyond, and no other row may notice.

        Returns:
            Logits ``(rows, new_tokens, vocabulary)``, or ``(rows, 1, vocabulary)`` with ``last``, and the cache.

        Raises:
            ModelError: A padded row has other logits alone: its tokens see the padding.
        """
        keywords: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        if past is not None:
            keywords[self._cache] = past
        if "position_ids" in self._takes:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
            if ends is not None:
                positions = torch.minimum(positions, ends[:, None] - 1)
            keywords["position_ids"] = positions[:, -input_ids.shape[1] :]
        if last and "logits_to_keep" in self._takes:
            keywords["logits_to_keep"] = 1
        output = self._model(**keywords)
        logits = output.logits[:, -1:] if last else output.logits
        if past is None:
            self._check_padding(input_ids, attention_mask, logits)
        elif self._watched is not None:
            self._check_cache(*self._watched, input_ids, logits)
        return logits, getattr(output, self._cache, None)

    def check_positions(self) -> None:
        """Raise ModelError if the model's own positions are others than those from 0 on, which rows are given here."""
        if "position_ids" not in self._takes or not other_tables(self._inner):  # of rotary ones only differences count
            return
        positions = torch.arange(min(2, self.max_tokens or 2), device=self.device).unsqueeze(0)
        ids = positions % self.vocab_size
        keywords = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        given, own = (self._model(**keywords, **extra).logits for extra in ({"position_ids": positions}, {}))
        if relative_error(given, own) > self._tolerance(own):
            raise other_positions(self._inner, "evaluated")

    def _check_padding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the row that is padded most with itself alone; not every architecture looks at the mask.

        The first time that there is padding, and whenever there is twice as much as was looked at: a little may hide in
        rounding.
        """
        self._watched = None
        lengths = attention_mask.sum(1)
        row, padding = int(lengths.argmin()), int(input_ids.shape[1] - lengths.min())
        if padding < max(1, 2 * self._padding_checked):
            return
        self._padding_checked = padding
        real = attention_mask[row].bool()
        found = logits[row, -1:] if logits.shape[1] == 1 else logits[row, real]
        ids = input_ids[row : row + 1, real]
        self._compare(found, self(ids, torch.ones_like(ids), use_cache=False, last=len(found) == 1)[0])
        self._watched = (row, ids)

    def _check_cache(self, row: int, before: torch.Tensor, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the same row with itself alone, once more: some take padding for text in cached steps."""
        self._watched = None
        ids = torch.cat([before, input_ids[row : row + 1]], dim=1)
        # With a cache of its own: in 16 bits, other products may send a token to other experts.
        _, past = self(before, torch.ones_like(before), use_cache=True, last=True)
        alone, _ = self(ids[:, before.shape[1] :], torch.ones_like(ids), past=past, use_cache=True, last=True)
        self._compare(logits[row, -1:], alone)

    def _compare(self, found: torch.Tensor, alone: torch.Tensor) -> None:
        """Raise ModelError if logits ``(tokens, vocab)`` in a batch differ from ``(1, tokens, vocab)`` alone."""
        some = slice(-_COMPARED, None)  # of a long text, logits of 100,000 words take memory
        error = relative_error(found[some], alone[0][some])
        if error > self._tolerance(found):
            raise ModelError(
                f"model: padding changes the logits of {type(self._inner).__name__} by {error:.1e} (relative), so rows "
                "of different lengths cannot go through it together; batch_size=1 lets each go alone"
            )

    def _tolerance(self, logits: torch.Tensor) -> float:
        """What rounding may do, in the widest of the dtypes that weights are stored and computed in (autocast)."""
        dtypes = {logits.dtype, *(parameter.dtype for parameter in self._inner.parameters())}
        if torch.is_autocast_enabled(logits.device.type):
            dtypes.add(torch.get_autocast_dtype(logits.device.type))
        return max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)

    def check(self, sequences: Sequence[Sequence[int]], budgets: Sequence[int], names: Sequence[str]) -> None:
        """Raise ArgumentError for ids without an embedding, and for sequences that are too long with their budget."""
        for sequence, new, name in zip(sequences, budgets, names, strict=True):
            if max(sequence) >= self.vocab_size:
                raise ArgumentError(
                    f"tokenizer: {name} has token id {max(sequence)}, the model has {self.vocab_size}; "
                    "is it the tokenizer of another model?"
                )
            if self.max_tokens is not None and len(sequence) + new > self.max_tokens:
                raise ArgumentError(
                    f"{name}: {len(sequence)} tokens and {new} new ones are more than the {self.max_tokens} "
                    "that the model has positions for; nothing is cut"
                )
        grown = [(len(sequence), len(sequence) + new) for sequence, new in zip(sequences, budgets, strict=True)]
        conflict = rotary_conflict(self._inner, grown)
        if conflict is not None:
            index, reason = conflict
            fewest, most = grown[index]
            raise ArgumentError(
                f"{names[index]}: {fewest} tokens and {most - fewest} new ones; {reason}; evaluate shorter and longer "
                "rows apart, with answers that do not cross the limit"
            )


@contextlib.contextmanager
def inference(model: Any) -> Iterator[Forward]:
    """Evaluation mode without gradients; every flag of model and config is restored on exit, also after an error."""
    # no_grad and not inference_mode: a buffer that a model makes in here would be refused by autograd for ever after
    inner = unwrap(model) if isinstance(model, torch.nn.Module) else model
    check_causal(inner)
    with model_lock(inner), frozen_eval(model), torch.no_grad():
        forward = Forward(model)
        forward.check_positions()
        yield forward


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise ScoringError if a value is NaN: an argmax over NaN is a token like any other, and it would be judged."""
    if bool(values.isnan().any()):
        raise ScoringError(f"{what}: the model's logits are NaN; a broken model's numbers would look like safe ones")
