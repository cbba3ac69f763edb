"""One forward pass of a causal LM on padded ids, with one interface for all architectures.

In: a model and ``input_ids`` with their attention mask, padded on either side. Out: float logits and, on request, the
cache. Positions are made from the mask, because some models (GPT-2) count padding as text unless they are given them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fastprune.calibration.examples import position_ids
from fastprune.errors import ArgumentError, ModelError, ScoringError, setting
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
        # Compiled and adapter-wrapped models forward *args, **kwargs; only the plain model has the signature. unwrap
        # refuses adapters that put tokens before the text, which they would do at every step.
        self._inner = unwrap(model)
        embedding = model.get_input_embeddings().weight
        if embedding.device.type == "meta":
            raise ModelError("expected weights in memory, got a model on the meta device", argument="model")
        self.device = embedding.device
        self.vocab_size = embedding.shape[0]
        self.max_tokens = trained_length(model)
        self._model = model
        self._takes = inspect.signature(self._inner.forward).parameters
        self._cache = next((name for name in CACHES if name in self._takes), CACHES[-1])
        self._padding_checked = 0
        self._watched: tuple[int, torch.Tensor] | None = None  # a compared row, and its ids at that time

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
            use_cache: Whether to ask for a cache; a model without one gives ``None``.
            last: Return only the logits of the last token.
            ends: ``(rows,)`` int64, tokens of each row at its end. Tokens that follow while other rows go on stay at
                the last position, as the model may have none beyond.

        Returns:
            Logits ``(rows, new_tokens, vocabulary)``, or ``(rows, 1, vocabulary)`` with ``last``, and the cache.

        Raises:
            ModelError: A padded row has other logits than alone: its tokens see the padding.
        """
        keywords: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": use_cache}
        if past is not None:
            keywords[self._cache] = past
        if "position_ids" in self._takes:
            positions = position_ids(attention_mask)
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
        """Raise ModelError if the model does not count positions from 0 by itself, as the forward here does."""
        if "position_ids" not in self._takes or not other_tables(self._inner):  # only differences of rotary ones count
            return
        positions = torch.arange(min(2, self.max_tokens or 2), device=self.device).unsqueeze(0)
        ids = positions % self.vocab_size
        keywords = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        given, own = (self._model(**keywords, **extra).logits for extra in ({"position_ids": positions}, {}))
        if relative_error(given, own) > self._tolerance(own):
            raise other_positions(self._inner, "evaluated")

    def _check_padding(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits: torch.Tensor) -> None:
        """Compare the row with the most padding with the same row alone: some architectures ignore the mask.

        At the first padding, and again whenever there is twice as much: the effect of a little may hide in rounding.
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
        """Compare that row with the same row alone in a cached step, in which some take padding for text."""
        self._watched = None
        ids = torch.cat([before, input_ids[row : row + 1]], dim=1)
        # With a cache of its own: rounding to 16 bits may send a token to other experts.
        _, past = self(before, torch.ones_like(before), use_cache=True, last=True)
        alone, _ = self(ids[:, before.shape[1] :], torch.ones_like(ids), past=past, use_cache=True, last=True)
        self._compare(logits[row, -1:], alone)

    def _compare(self, found: torch.Tensor, alone: torch.Tensor) -> None:
        """Raise ModelError if logits ``(tokens, vocab)`` in a batch differ from ``(1, tokens, vocab)`` alone."""
        some = slice(-_COMPARED, None)  # of a long text, logits of 100,000 words take memory
        error = relative_error(found[some], alone[0][some])
        if error > self._tolerance(found):
            raise ModelError(
                f"padding changes the logits of {type(self._inner).__name__} by {error:.1e} (relative), so rows "
                f"of different lengths cannot go through it together; {setting('batch_size', 1)} lets each go alone",
                argument="model",
            )

    def _tolerance(self, logits: torch.Tensor) -> float:
        """Largest relative error by rounding, in the coarsest dtype of weights and computation (autocast)."""
        dtypes = {logits.dtype, *(parameter.dtype for parameter in self._inner.parameters())}
        if torch.is_autocast_enabled(logits.device.type):
            dtypes.add(torch.get_autocast_dtype(logits.device.type))
        return max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)

    def check(self, sequences: Sequence[Sequence[int]], budgets: Sequence[int], names: Sequence[str]) -> None:
        """Raise ArgumentError for ids without an embedding, and for sequences that are too long with their budget."""
        for sequence, new, name in zip(sequences, budgets, names, strict=True):
            if max(sequence) >= self.vocab_size:
                raise ArgumentError(
                    f"{name} has token id {max(sequence)}, the model has {self.vocab_size}; "
                    "is it the tokenizer of another model?",
                    argument="tokenizer",
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
    # no_grad and not inference_mode: autograd would later refuse any buffer that a model makes inside
    inner = unwrap(model) if isinstance(model, torch.nn.Module) else model
    check_causal(inner)
    with model_lock(inner), frozen_eval(model), torch.no_grad():
        forward = Forward(model)
        forward.check_positions()
        yield forward


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raise ScoringError if a value is NaN: an argmax over NaN gives some token, which would be judged as an answer."""
    if bool(values.isnan().any()):
        raise ScoringError(f"{what}: the model's logits are NaN; a broken model's numbers would look like safe ones")
