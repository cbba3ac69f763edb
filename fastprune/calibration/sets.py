"""A calibration set: examples with their hash, and the loader that scoring reads.

In: a file or rows and a tokenizer. Out: :class:`CalibrationSet`. Rows above a length limit are dropped and counted,
never truncated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import torch

from fastprune.calibration.encoding import Encoder, check_finish, control_texts, count_holding
from fastprune.calibration.examples import Example, MicroBatch, hash_examples, micro_batches
from fastprune.calibration.layouts import Columns
from fastprune.calibration.prompts import PromptIndex
from fastprune.calibration.rows import FINISHES, Row, Rows, describe, read_rows
from fastprune.errors import CalibrationError, positive_integer, setting, warn

# Shorter replies often have one length by nature: a word, a number, a line of a table.
_SHORT = 8


class CalibrationSet:
    """Tokenized examples in their order, at least one.

    Args:
        examples: The examples.
        counts: Number of rows kept and left out; by default all were kept.
        encoding: The ``facts`` of the :class:`Encoder` that made the examples, if known.
        prefilled: Number of rows that had a prefill, if known.

    Raises:
        CalibrationError: There is no example.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        counts: Mapping[str, int] | None = None,
        encoding: Mapping[str, Any] | None = None,
        prefilled: int | None = None,
    ) -> None:
        self.examples: tuple[Example, ...] = tuple(examples)
        if not self.examples:
            raise CalibrationError("expected at least one, got none", argument="examples")
        self.counts: dict[str, int] = dict(counts) if counts is not None else {"kept": len(self.examples)}
        self.encoding: dict[str, Any] | None = None if encoding is None else dict(encoding)
        self.prefilled = prefilled

    @property
    def format(self) -> str | None:
        """``"raw"`` or ``"chat"``; ``None`` if it is not known."""
        return None if self.encoding is None else self.encoding["format"]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of token ids and labels, the same for any order of the examples."""
        return hash_examples(self.examples)

    @property
    def finishes(self) -> dict[str, int]:
        """Number of replies by end: ``"stop"`` (by themselves), ``"length"`` (at a token limit), ``"unknown"``."""
        counted = Counter(example.finish or "unknown" for example in self.examples)
        return {name: counted[name] for name in (*FINISHES, "unknown")}

    @property
    def refusals(self) -> float | None:
        """Share of refusals, by keywords, among the replies whose text is known; ``None`` if no text is."""
        known = [example.refusal for example in self.examples if example.refusal is not None]
        return sum(known) / len(known) if known else None

    @cached_property
    def prompts(self) -> PromptIndex | None:
        """Hashes of the prompts; ``None`` if the text of one is not known."""
        known = [example.prompt for example in self.examples if example.prompt is not None]
        return PromptIndex.of(known, [example.id for example in self]) if len(known) == len(self) else None

    def loader(self, batch_tokens: int = 4096) -> CalibrationLoader:
        """A loader of micro-batches of at most ``batch_tokens`` padded tokens, which can be iterated repeatedly."""
        return CalibrationLoader(self, batch_tokens)

    def subset(self, *, category: str | Collection[str]) -> CalibrationSet:
        """The examples of one or several categories, in their order.

        Raises:
            CalibrationError: No example has such a category; the message lists the categories of the set.
        """
        wanted = {category} if isinstance(category, str) else set(category)
        chosen = [example for example in self.examples if example.category in wanted]
        if not chosen:
            known = sorted({str(example.category) for example in self.examples})
            raise CalibrationError(f"expected one of {known}, got {sorted(map(str, wanted))}", argument="category")
        return CalibrationSet(chosen, encoding=self.encoding)

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> CalibrationSet: ...
    def __getitem__(self, index: int | slice) -> Example | CalibrationSet:
        if isinstance(index, slice):
            return CalibrationSet(self.examples[index], encoding=self.encoding)
        return self.examples[index]

    def __repr__(self) -> str:
        tokens = sum(map(len, self.examples))
        return f"CalibrationSet({len(self)} examples, {tokens} tokens, hash {self.hash[:12]})"


class CalibrationLoader:
    """Iterable of a set's batches: ``input_ids``, ``labels`` and ``attention_mask``, padded on the right.

    Attributes:
        calibration: The set.
        batch_tokens: Limit of the padded tokens of a batch.
    """

    def __init__(self, calibration: CalibrationSet, batch_tokens: int) -> None:
        positive_integer("batch_tokens", batch_tokens)
        self.calibration = calibration
        self.batch_tokens = batch_tokens

    @cached_property
    def micro_batches(self) -> list[MicroBatch]:
        """The batches as scoring sees them."""
        return micro_batches(self.calibration.examples, self.batch_tokens)

    @property
    def padded_tokens(self) -> list[int]:
        """Tokens of each micro-batch, padding included."""
        return [batch.input_ids.numel() for batch in self.micro_batches]

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.micro_batches:
            tensors = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
            yield {key: tensor.clone() for key, tensor in tensors.items()}


def load_calibration(
    path_or_rows: Rows,
    tokenizer: Any,
    *,
    columns: Columns | None = None,
    format: str = "raw",
    max_length: int | None = None,
    bos: str | bool = "auto",
    finish: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> CalibrationSet:
    """Read rows and tokenize them.

    An example is ``prompt | prefill | response``, each piece tokenized separately and verbatim; only the response is
    scored. ``raw`` puts the tokenizer's BOS before the prompt and a line break after it; ``chat`` uses the tokenizer's
    template and scores the end-of-turn token as well.

    Args:
        path_or_rows: As for :func:`fastprune.calibration.read_rows`.
        tokenizer: A Hugging Face tokenizer.
        columns: Columns by field where they are not to be recognized, e.g. ``{"prompt": "goal", "prefill": "target"}``.
        format: ``"raw"`` or ``"chat"``.
        max_length: Rows of more tokens than this are left out; ``None`` keeps all.
        bos: For ``raw``: ``"auto"`` begins with BOS if the tokenizer does so by default, ``False`` never (the published
            recipe), ``True`` always.
        finish: How replies ended if their row does not say: ``"length"`` for replies cut at a token limit, whose
            end-of-turn token is then left out of the example; ``"stop"`` for whole ones.
        template_args: For ``chat``: variables of the template, e.g. ``{"enable_thinking": False}``.
        system: For ``chat``: a system turn.

    Returns:
        The set; its ``counts`` are ``{"kept": …, "too_long": …}``.

    Raises:
        NotFoundError: There is no such file.
        ArgumentError: ``columns``, ``format``, ``tokenizer``, ``max_length``, ``bos``, ``finish``, ``template_args`` or
            ``system`` is not usable.
        CalibrationError: The data cannot be read, a row has nothing to score or is already a rendered conversation, the
            chat template would change the experiment, or no row is left.

    Warns:
        FastpruneWarning: Rows were left out, a column has nearly the name of one that is used, many replies have the
            same length, or raw text contains special tokens.
    """
    encoder = Encoder(tokenizer, format=format, bos=bos, template_args=template_args, system=system)
    check_finish(finish)
    positive_integer("max_length", max_length, optional=True)
    source = describe(path_or_rows)
    kept: list[Example] = []
    rows: list[Row] = []  # those behind `kept`
    too_long = 0
    for number, row in enumerate(read_rows(path_or_rows, columns=columns)):
        example = encoder.example(row, where=f"{source}, row {number}", finish=finish)
        if max_length is not None and len(example) > max_length:
            too_long += 1
        else:
            kept.append(example)
            rows.append(row)
    if not kept:
        raise CalibrationError(
            f"{source}: all {too_long} rows are longer than {setting('max_length', max_length)} tokens"
        )
    if too_long:
        limit = f"longer than {setting('max_length', max_length)} tokens"
        warn(f"{source}: left out {too_long} of {len(kept) + too_long} rows, {limit}")
    for message in (_one_length(kept), _control_tokens(encoder, rows)):
        if message is not None:
            warn(f"{source}: {message}")
    return CalibrationSet(
        kept,
        {"kept": len(kept), "too_long": too_long},
        encoder.facts,
        prefilled=sum(bool(row.prefill) for row in rows),
    )


def _one_length(examples: Sequence[Example]) -> str | None:
    """A note if half of the replies that are scored to their end have the same length, the sign of a token limit."""
    unknown = [example.scored - 1 for example in examples if example.ends_turn and example.finish is None]
    if not unknown:
        return None
    length, count = Counter(unknown).most_common(1)[0]
    # answers of a few words have one length by nature, two replies by chance
    if length < _SHORT or count < 3 or 2 * count < len(unknown):
        return None
    return (
        f"{count} of {len(unknown)} replies have exactly {length} tokens, as if they had been cut there, and the end "
        f"of turn after each is scored; give {setting('finish', 'length')} (or a column finish) if they were cut, "
        f"else {setting('finish', 'stop')}"
    )


def _control_tokens(encoder: Encoder, rows: Sequence[Row]) -> str | None:
    """A note on raw text with special tokens in it, which may be a rendered conversation, intended or not."""
    if encoder.format != "raw":
        return None  # the chat format refuses such rows one by one
    texts = (row.prompt + row.prefill + row.response for row in rows)
    found = count_holding(texts, control_texts(encoder.tokenizer))
    if not found:
        return None
    return (
        f"{found} of {len(rows)} rows hold special tokens as text, which are read as such tokens; in the raw format "
        f"nothing else marks the turns of a conversation ({setting('format', 'chat')} renders them from plain text)"
    )
