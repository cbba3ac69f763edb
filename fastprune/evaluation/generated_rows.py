"""Rows whose replies the model itself has written: the calibration data of B-TAP, harmful or benign.

In: a model and rows with prompts. Out: rows with its replies, in memory or in a file. Replies are drawn and batched as
answers are, so a run that was killed ends with the file of one that was not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastprune.calibration import Encoder, Row, read_table
from fastprune.calibration.generated_files import partial_path, partial_replies, write_generated
from fastprune.calibration.refusals import is_refusal
from fastprune.calibration.rows import Rows
from fastprune.calibration.tokens import tokenizer_hash
from fastprune.errors import ArgumentError, CalibrationError, positive_integer, setting, warn
from fastprune.evaluation.decoding import Sampling
from fastprune.evaluation.estimate import answering_time
from fastprune.evaluation.tasks import Completion, Question, Task, ask, content_state, queries_of, questions_of
from fastprune.files import as_path, check_space
from fastprune.model.fingerprint import weights_digest
from fastprune.progress import announce

# Padded tokens of a batch by default: the cache of an 8 B model takes 128 kB for each.
_BATCH_TOKENS = 64 * 1024
_LINE_BYTES, _TOKEN_BYTES = 300, 8  # of a reply on the disk


@dataclass(frozen=True)
class Generated:
    """Rows with the model's replies.

    Attributes:
        rows: Those that were kept, by row and sample.
        counts: Number of replies that were ``asked`` for and ``kept``; of those left out as ``refusals``, ``empty``, or
            ``unanswered`` (a thought without an answer); of the kept ones that were ``cut`` at their limit; and of
            ``new_tokens``.
    """

    rows: list[Row]
    counts: dict[str, int]


def generate_rows(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    format: str,
    bos: str | bool = "auto",
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
    prefill: str | Sequence[str] | None = None,
    max_new_tokens: int,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    keep_refusals: bool = False,
    batch_size: int | None = None,
    out: str | Path | None = None,
    progress: bool = False,
) -> list[Row]:
    """Let a model reply to prompts, and make rows of its replies: what :func:`fastprune.load_calibration` takes.

    Args:
        model: A causal LM, unchanged afterwards.
        tokenizer: Its tokenizer.
        rows: Prompts, in any layout that :func:`fastprune.calibration.read_rows` takes; responses are not used.
        format: ``"raw"`` or ``"chat"``; this and the next three as in :func:`fastprune.load_calibration`.
        bos: ``"auto"``, ``True`` or ``False``.
        template_args: Variables of the chat template.
        system: System turn of the chat.
        prefill: Start of every reply, or a start for each row; ``None``: each row's own ``prefill``. It stands in the
            column ``prefill`` of the rows that are made, and is not scored.
        max_new_tokens: Limit of each reply; shorter where the model has no positions for more.
        samples: Replies to each row; ids get ``#0``, ``#1`` … then.
        temperature: 0: the best token; above: draw.
        top_p: Draw from the best tokens that have this share of the probability.
        seed: Of what is drawn. What a row draws depends on it, on the row and the number of the sample alone.
        keep_refusals: Keep replies that refuse, by keywords; they are left out and counted otherwise.
        batch_size: Rows in a forward pass; by default up to 64, fewer where contexts are long.
        out: Name of a new file for the rows, for its owner alone, and of one with their provenance beside it. After a
            kill, the same call goes on with what is there.
        progress: Show how far it is.

    Returns:
        The rows, at least one: with ``prompt``, ``history``, ``prefill`` and other columns as given, the reply as
        ``response``, its ``finish`` (``"stop"`` or ``"length"``), an ``id``, and in ``extra`` ``new_tokens`` and, where
        the model thought before it answered, ``thought``, which is not part of the response.

    Raises:
        CalibrationError: No rows, a context that the template refuses or without a token, or no reply that can be kept.
        ArgumentError: An argument is out of range, ``out`` exists, is in use, or holds unfinished replies of other
            settings.
        DiskError: The disk has no room.
        ScoringError: The model's logits are NaN.

    Warns:
        FastpruneWarning: Replies were left out (says how many and why).
    """
    made = generated(
        model,
        tokenizer,
        rows,
        encoding={"format": format, "bos": bos, "template_args": template_args, "system": system},
        prefill=prefill,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=Sampling(temperature, top_p),
        seed=seed,
        keep_refusals=keep_refusals,
        batch_size=batch_size,
        out=None if out is None else as_path(out, "out"),
        progress=progress,
    )
    if left_out := left_out_text(made.counts):
        warn(left_out)
    return made.rows


def generated(
    model: Any,
    tokenizer: Any,
    rows: Rows,
    *,
    encoding: Mapping[str, Any],
    prefill: str | Sequence[str] | None,
    max_new_tokens: int,
    samples: int,
    sampling: Sampling,
    seed: int,
    keep_refusals: bool,
    batch_size: int | None,
    out: Path | None,
    overwrite: bool = False,
    progress: bool = False,
) -> Generated:
    """As :func:`generate_rows`, with the counts; ``overwrite`` replaces ``out``, and unfinished replies to others."""
    positive_integer("max_new_tokens", max_new_tokens)
    positive_integer("batch_size", batch_size, optional=True)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ArgumentError(f"expected a whole number, got {seed!r}", argument="seed")
    table = read_table(rows)
    encoder = Encoder(tokenizer, **encoding)
    asked = [
        replace(row, response="", id=str(number) if row.id is None else row.id)
        for number, row in enumerate(_prefilled(list(table), prefill))
    ]
    task = Task.prepare(table.name, "rows", asked, encoder, max_new_tokens=max_new_tokens)
    questions = questions_of([task], samples)
    # Killed between the two, a run has left the rows and its replies, and may go on.
    if out is not None and out.exists() and not overwrite and not partial_path(out).exists():
        raise ArgumentError(f"expected a new name, got {out}, which exists; remove it, or name another", argument="out")
    size = batch_size or _fitting([len(context) for context in task.contexts], max_new_tokens)
    facts = {
        "model": {"digest": weights_digest(model), "architecture": type(model).__name__},
        "tokenizer": tokenizer_hash(tokenizer),
        "encoding": encoder.facts,
        "rows": _hash([[row.id, row.prompt, row.history, row.prefill] for row in asked]),
        "sampling": {**sampling.facts, "seed": seed, "samples": samples},
        "max_new_tokens": max_new_tokens,
        "batch_size": size,
        "versions": {name: importlib.metadata.version(name) for name in ("fastprune", "torch", "transformers")},
    }
    if out is not None:
        needed = len(questions) * (_LINE_BYTES + max_new_tokens * _TOKEN_BYTES)
        check_space(out.absolute().parent, needed, f"out {out}")
    with nullcontext() if out is None else partial_replies(out, facts, restart=overwrite) as lines:
        replies = {} if lines is None else {line["index"]: _completion(line) for line in lines.records[1:]}

        def keep(batch: Mapping[int, Completion]) -> None:
            for index, reply in batch.items():
                replies[index] = reply
                if lines is not None:
                    lines.append({"index": index, **_plain(reply)})

        if progress:
            left = 1 - len(replies) / len(questions)
            if text := answering_time(model, queries_of(model, questions), batch_size=size, share=left):
                announce(f"generating takes {text}")
        ask(
            model,
            encoder,
            questions,
            states=[content_state(question, seed) for question in questions],
            sampling=sampling,
            batch_size=size,
            finished=set(replies),
            on_batch=keep,
            progress=progress,
        )
        made = _rows_of(questions, replies, samples, keep_refusals)
        if not made.rows:
            raise CalibrationError(
                f"{table.name}: expected a reply that can be kept, got none: {left_out_text(made.counts)}; a "
                f"{setting('prefill')} starts the replies, and {setting('keep_refusals', True)} keeps refusals"
            )
        if out is not None:
            write_generated(out, made.rows, {**facts, "keep_refusals": keep_refusals, "counts": made.counts})
    return made


def left_out_text(counts: Mapping[str, int]) -> str:
    """``"left out 3 of 100 replies: 2 refusals, 1 empty"``, or an empty string."""
    reasons = {"refusals": "refusals", "empty": "empty", "unanswered": "thoughts without an answer"}
    parts = [f"{counts[name]} {what}" for name, what in reasons.items() if counts[name]]
    return f"left out {counts['asked'] - counts['kept']} of {counts['asked']} replies: {', '.join(parts)}" * bool(parts)


def _prefilled(rows: list[Row], prefill: str | Sequence[str] | None) -> list[Row]:
    if prefill is None:
        return rows
    starts = [prefill] * len(rows) if isinstance(prefill, str) else list(prefill)
    if len(starts) != len(rows):
        raise ArgumentError(f"expected one string or {len(rows)}, got {len(starts)}", argument="prefill")
    return [replace(row, prefill=start) for row, start in zip(rows, starts, strict=True)]


def _fitting(lengths: Sequence[int], new_tokens: int) -> int:
    return max(1, min(64, _BATCH_TOKENS // (max(lengths) + new_tokens)))


def _rows_of(
    questions: Sequence[Question], replies: Mapping[int, Completion], samples: int, keep_refusals: bool
) -> Generated:
    counts = dict.fromkeys(("asked", "kept", "refusals", "empty", "unanswered", "cut", "new_tokens"), 0)
    rows = []
    for index, question in enumerate(questions):
        row, reply = question.row, replies[index]
        counts["asked"] += 1
        counts["new_tokens"] += reply.new_tokens
        if reply.is_unanswered:
            counts["unanswered"] += 1
        elif not reply.text.strip():
            counts["empty"] += 1
        elif not keep_refusals and is_refusal(row.prefill + reply.text):
            counts["refusals"] += 1
        else:
            counts["kept"] += 1
            counts["cut"] += reply.finish == "length"
            extra = {"new_tokens": reply.new_tokens, **({} if reply.thought is None else {"thought": reply.thought})}
            name = row.id if samples == 1 else f"{row.id}#{question.sample}"
            rows.append(replace(row, id=name, response=reply.text, finish=reply.finish, extra=row.extra | extra))
    return Generated(rows, counts)


def _plain(reply: Completion) -> dict[str, Any]:
    return {"text": reply.text, "thought": reply.thought, "finish": reply.finish, "new_tokens": reply.new_tokens}


def _completion(line: Mapping[str, Any]) -> Completion:
    return Completion(line["text"], line["thought"], line["finish"], line["new_tokens"])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
