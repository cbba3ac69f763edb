"""The model's own continuation of prompts, as text; and what the token loop needs to know of rows and tokenizer.

In: prompts or rows, tokenized as for calibration. Out: the greedy continuations, in the order of the input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastprune.calibration import Encoder, Row, read_texts_or_rows
from fastprune.calibration.rows import describe_row
from fastprune.calibration.tokens import decode
from fastprune.errors import ArgumentError, CalibrationError, positive_integer
from fastprune.evaluation.decoding import Query, continue_queries


def generate(
    model: Any,
    tokenizer: Any,
    rows_or_prompts: str | Path | Iterable[str | Row | Mapping[str, Any]],
    *,
    prefill: str | Sequence[str] | None = None,
    format: str = "raw",
    bos: str | bool = "auto",
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    max_new_tokens: int,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """Continue each prompt greedily.

    Args:
        model: A causal LM; its weights, flags, config and generation config are unchanged afterwards, also on errors.
        tokenizer: Its tokenizer; a pad token is not needed.
        rows_or_prompts: Prompts, rows, or the path of a CSV or JSONL file. A single string is a path, never a prompt.
        prefill: Start of every reply, or a start for each row. ``None``: each row's own ``prefill`` column.
        format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        max_new_tokens: Limit of each continuation, in tokens.
        batch_size: Rows in a forward pass.
        progress: Show how far it is: a bar on a terminal, a line a minute elsewhere.

    Returns:
        The continuations, without prompt, prefill and special tokens.

    Raises:
        CalibrationError: No rows, a missing column, or a context without a token (the message names the row).
        ArgumentError: An argument is out of range, or the tokens do not fit the model.
        ScoringError: The model's logits are NaN.
    """
    items = read_texts_or_rows(rows_or_prompts, references=False)
    rows = [Row(prompt=item, response="") if isinstance(item, str) else item for item in items]
    if prefill is not None:
        prefills = [prefill] * len(rows) if isinstance(prefill, str) else list(prefill)
        if len(prefills) != len(rows):
            raise ArgumentError(f"expected one string or {len(rows)}, got {len(prefills)}", argument="prefill")
        rows = [replace(row, prefill=text) for row, text in zip(rows, prefills, strict=True)]
    positive_integer("max_new_tokens", max_new_tokens)
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    contexts = encode_contexts(encoder, rows)
    stop = stop_ids(model, encoder)
    queries = [Query(context, max_new_tokens, f"row {index}") for index, context in enumerate(contexts)]
    continued = continue_queries(model, queries, stop, batch_size=batch_size, progress=progress)
    return [decode(tokenizer, continued[index].ids) for index in range(len(rows))]


def encode_contexts(encoder: Encoder, rows: Sequence[Row], *, name: str = "rows") -> list[list[int]]:
    """Ids of ``prompt | prefill`` of every row.

    Raises:
        CalibrationError: A row gives no token; the message names it.
    """
    contexts = []
    for index, row in enumerate(rows):
        where = describe_row(name, index, row)
        context = encoder.context(row.prompt, row.prefill, history=row.history, where=where)
        if not context:
            raise CalibrationError(f"{where}: prompt: expected at least one token to continue, got none")
        contexts.append(context)
    return contexts


def stop_ids(model: Any, encoder: Encoder) -> set[int]:
    """Ids that end a reply: end-of-text ids of model and tokenizer and, in ``chat``, the template's end of turn."""
    generation = getattr(model, "generation_config", None)
    stop: set[int] = set(encoder.turn_ends)
    for source in (encoder.tokenizer, generation, model.config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        stop.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return stop
