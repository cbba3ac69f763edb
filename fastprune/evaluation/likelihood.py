"""How probable a model finds given text: log-probabilities and perplexity.

Nothing is generated, so these are the most sensitive measures of a change to a model.

In: examples with labels (-100 = not scored), or text. Out: natural logarithms, summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastprune.calibration import Encoder, Example, MicroBatch, Row, micro_batches, read_texts_or_rows
from fastprune.calibration.encoding import check_finish
from fastprune.calibration.examples import UNSCORED
from fastprune.errors import ArgumentError, CalibrationError, positive_integer
from fastprune.evaluation.forward import check_finite, inference
from fastprune.progress import Progress

# Logits are raised to float32 for this many tokens at a time: 0.5 GB with a vocabulary of 128 k.
_CHUNK = 1024


def log_probabilities(model: Any, batches: Sequence[MicroBatch], *, progress: bool = False) -> torch.Tensor:
    """Log-probability of the labelled tokens of each example, given all tokens before them.

    Args:
        model: A causal LM, unchanged afterwards.
        batches: Micro-batches, each example in one of them.
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Returns:
        ``(n_examples,)`` float64 on the CPU: sums over each example's labels, by ``example_indices``. Padding and the
        other rows of a batch change them by float rounding only.

    Raises:
        ArgumentError: A token has no embedding, or an example is longer than the model has positions for.
        ScoringError: The model's logits are NaN.
    """
    sums = torch.zeros(sum(len(batch.example_indices) for batch in batches), dtype=torch.float64)
    with inference(model) as forward, Progress(len(batches), "log-probabilities", "batch", progress) as bar:
        for batch in bar.each(batches):
            sequences = [ids[:n] for ids, n in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]
            forward.check(sequences, [0] * len(sequences), [f"example {index}" for index in batch.example_indices])
            input_ids, mask = batch.input_ids.to(forward.device), batch.attention_mask.to(forward.device)
            logits, _ = forward(input_ids, mask, use_cache=False, last=False)
            labels = batch.labels[:, 1:].to(logits.device)
            rows, columns = (labels != UNSCORED).nonzero(as_tuple=True)
            examples = torch.tensor(batch.example_indices)
            for row, column in zip(rows.split(_CHUNK), columns.split(_CHUNK), strict=True):
                loss = torch.nn.functional.cross_entropy(
                    logits[row, column].float(), labels[row, column], reduction="none"
                )
                check_finite(loss, "log-probabilities")
                # added on the CPU in order, so that the sum is the same in every run on every device
                sums.index_add_(0, examples[row.cpu()], -loss.double().cpu())
    return sums


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over all scored tokens.

    Attributes:
        value: exp(nll).
        nll: Mean negative log-likelihood of a token, in nats.
        n_tokens: Scored tokens; each has the same weight, so long texts count more than short ones.
        n_examples: Texts, windows or rows.
    """

    value: float
    nll: float
    n_tokens: int
    n_examples: int

    def to_dict(self) -> dict[str, Any]:
        """The four fields."""
        return asdict(self)


def perplexity(
    model: Any,
    tokenizer: Any,
    texts_or_rows: str | Path | Iterable[str | Row | Mapping[str, Any]],
    *,
    format: str = "raw",
    bos: str | bool = "auto",
    finish: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    window: int | None = None,
    batch_tokens: int = 2048,
    progress: bool = False,
) -> Perplexity:
    """Perplexity of plain texts, or of the responses of rows.

    Args:
        model: A causal LM, unchanged afterwards.
        tokenizer: Its tokenizer. The first token of each plain text (or window), a BOS if the tokenizer adds one, is
            context only.
        texts_or_rows: Texts; or rows, whose responses are scored given prompt and prefill; or the path of a file of
            rows.
        format: ``"raw"`` or ``"chat"``, which is for rows; this and the next four as in
            :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``; also applies to plain texts and each of their windows.
        finish: ``"length"`` for replies that were cut, unless their row says otherwise.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        window: Plain texts longer than this many tokens, including the BOS, are scored in independent windows. That
            raises the perplexity: compare only values of the same window. ``None``: each text as a whole.
        batch_tokens: Budget of a micro-batch, in padded tokens; changes the result by float rounding only.
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Raises:
        CalibrationError: No texts, one that gives no token to score, or rows without a needed column.
        ArgumentError: An argument is out of range, or a text is longer than the model has positions for.
        ScoringError: The model's logits are NaN.
    """
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 2):
        raise ArgumentError(f"expected an integer of at least 2 tokens or None, got {window!r}", argument="window")
    positive_integer("batch_tokens", batch_tokens)
    check_finish(finish)
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    items = read_texts_or_rows(texts_or_rows)
    if isinstance(items[0], str):
        if format != "raw":
            raise ArgumentError(
                f'expected "raw" for plain texts, which are no turns of a chat, got {format!r}', argument="format"
            )
        examples = [example for index, text in enumerate(items) for example in _windows(encoder, index, text, window)]
    elif window is not None:
        raise ArgumentError(
            "expected None for rows, which are scored as a whole; windows are for plain texts", argument="window"
        )
    else:
        examples = [encoder.example(row, where=f"row {index}", finish=finish) for index, row in enumerate(items)]
    sums = log_probabilities(model, micro_batches(examples, batch_tokens), progress=progress)
    n_tokens = sum(example.scored for example in examples)
    nll = -math.fsum(sums.tolist()) / n_tokens
    return Perplexity(float(torch.tensor(nll, dtype=torch.float64).exp()), nll, n_tokens, len(examples))


def _windows(encoder: Encoder, index: int, text: str, window: int | None) -> list[Example]:
    ids, n_bos = encoder.tokens(text), len(encoder.with_bos([]))
    size = max(1, (window or len(ids) + n_bos) - n_bos)
    pieces = [encoder.with_bos(ids[start : start + size]) for start in range(0, len(ids), size)]
    # a last window of one token would have nothing to score
    examples = [Example(tuple(piece), (UNSCORED, *piece[1:])) for piece in pieces if len(piece) > 1]
    if not examples:
        raise CalibrationError(
            f"text {index}: {len(ids)} tokens; expected at least {max(1, 2 - n_bos)}, as the first of all is never "
            "scored"
        )
    return examples
