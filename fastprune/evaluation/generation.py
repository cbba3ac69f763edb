"""Greedy batched generation: the model's own continuation of each context.

In: prompts or rows, tokenized as for calibration and padded on the left. Out: the continuations as text, in the order
of the input. Same input, same text. Another composition of batches changes logits by rounding only (about 1e-6 in
float32), so a greedy choice can differ only if the two best tokens are that close.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastprune.calibration import Encoder, Row, read_texts_or_rows
from fastprune.calibration.rows import describe_row
from fastprune.calibration.tokens import decode
from fastprune.errors import ArgumentError, CalibrationError, positive_integer
from fastprune.evaluation.forward import check_finite, inference


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
        progress: Show a progress bar on a terminal.

    Returns:
        The continuations, without prompt, prefill and special tokens.

    Raises:
        CalibrationError: No rows, a missing column, or a context without a token (the message names the row).
        ArgumentError: An argument is out of range, or the tokens do not fit the model.
        ScoringError: The model's logits are NaN.
    """
    items = read_texts_or_rows(rows_or_prompts)
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
    budgets = [max_new_tokens] * len(rows)
    ids = continue_greedily(model, contexts, budgets, stop, batch_size=batch_size, progress=progress)
    return [decode(tokenizer, each) for each in ids]


def encode_contexts(encoder: Encoder, rows: Sequence[Row], *, name: str = "rows") -> list[list[int]]:
    """Ids of ``prompt | prefill`` of every row.

    Raises:
        CalibrationError: A row gives no token; the message names it.
    """
    contexts = []
    for index, row in enumerate(rows):
        where = describe_row(name, index, row)
        context = encoder.context(row.prompt, row.prefill, where=where)
        if not context:
            raise CalibrationError(f"{where}: prompt: expected at least one token to continue, got none")
        contexts.append(context)
    return contexts


def continue_greedily(
    model: Any,
    contexts: Sequence[list[int]],
    budgets: Sequence[int],
    stop: Iterable[int],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[list[int]]:
    """Continue token ids, each context until a stop token or its own budget.

    Contexts are grouped by budget and length, so that short answers do not wait for long ones. Ties of the argmax go to
    the lower id, as in ``model.generate(do_sample=False)``. The ids equal those of that call unless the model's
    generation config changes logits or searches (``repetition_penalty``, ``suppress_tokens``, ``num_beams``): only its
    end-of-text ids are used here.

    Args:
        model: A causal LM.
        contexts: Token ids, none empty.
        budgets: Limit of new tokens of each context.
        stop: Ids that end a continuation.
        names: Name of each context in messages; by default its number.
        batch_size: Rows in a forward pass.
        progress: Show a progress bar on a terminal.

    Returns:
        New ids of each context, without the stop token.
    """
    positive_integer("batch_size", batch_size)
    order = sorted(range(len(contexts)), key=lambda i: (budgets[i], len(contexts[i]), contexts[i]))
    n_batches = -(-len(order) // batch_size)
    batches = [order[len(order) * b // n_batches : len(order) * (b + 1) // n_batches] for b in range(n_batches)]
    continuations: list[list[int]] = [[] for _ in contexts]
    with inference(model) as forward:
        forward.check(contexts, budgets, names or [f"row {index}" for index in range(len(contexts))])
        stop_tensor = torch.tensor(sorted(stop), dtype=torch.int64, device=forward.device)
        for batch in tqdm(batches, desc="generate", unit="batch", disable=None if progress else True):
            limits = torch.tensor([budgets[i] for i in batch], device=forward.device)
            new_ids = _continue_batch(forward, [contexts[i] for i in batch], limits, stop_tensor)
            for index, ids in zip(batch, new_ids, strict=True):
                continuations[index] = ids
    return continuations


def _continue_batch(
    forward: Any, contexts: list[list[int]], limits: torch.Tensor, stop: torch.Tensor
) -> list[list[int]]:
    input_ids, attention_mask = _pad_left(contexts, forward.device)
    ends = attention_mask.sum(1) + limits
    finished = torch.zeros(len(contexts), dtype=torch.bool, device=forward.device)
    lengths = limits.clone()
    columns, past = [], None
    for step in range(int(limits.max())):
        logits, past = forward(input_ids, attention_mask, past=past, use_cache=True, last=True, ends=ends)
        values, tokens = logits[:, -1].max(dim=-1)
        check_finite(values, "generation")
        columns.append(tokens)
        stopped = torch.isin(tokens, stop) & ~finished
        lengths[stopped] = step
        finished |= stopped | (step + 1 >= limits)
        if bool(finished.all()):
            break
        # a model without a cache is given the whole sequence again
        input_ids = tokens[:, None] if past is not None else torch.cat([input_ids, tokens[:, None]], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], dim=1)
    new = torch.stack(columns, dim=1).tolist()
    return [ids[:length] for ids, length in zip(new, lengths.tolist(), strict=True)]


def _pad_left(contexts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad, and mask, with the row's own last token: the embedding of any other token may be NaN."""
    width = max(map(len, contexts))
    ids = torch.tensor([c[-1:] * (width - len(c)) + c for c in contexts], dtype=torch.int64)
    mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in contexts], dtype=torch.int64)
    return ids.to(device), mask.to(device)


def stop_ids(model: Any, encoder: Encoder) -> set[int]:
    """Ids that end a reply: end-of-text ids of model and tokenizer and, in ``chat``, the template's end of turn."""
    generation = getattr(model, "generation_config", None)
    stop: set[int] = set(encoder.turn_ends)
    for source in (encoder.tokenizer, generation, model.config.get_text_config()):
        value = getattr(source, "eos_token_id", None)
        stop.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return stop
