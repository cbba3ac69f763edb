"""Batches of any origin to examples.

In: an iterable of Hugging Face batches, padded on either side, with or without an attention mask. Out: a
:class:`CalibrationSet` with an example for each row, padding removed. Everything in a batch that could silently change
a score is checked here and nowhere later.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastprune.calibration.batch_keys import unread_keys
from fastprune.calibration.examples import UNSCORED, Example, position_ids
from fastprune.calibration.sets import CalibrationLoader, CalibrationSet
from fastprune.errors import CalibrationError, warn

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_ENOUGH = 3  # so many labels that are all the next token's are no coincidence


def collect(
    loader: Iterable[Mapping[str, Any]] | CalibrationSet,
    name: str,
    vocab_size: int | None = None,
    n_labels: int | None = None,
    accepted: Collection[str] = (),
) -> CalibrationSet:
    """Read a loader once and turn each row of each batch into an example.

    A set of :func:`load_calibration`, or its loader, is returned unchanged after a check of its ids.

    Args:
        loader: Iterable of mappings with ``input_ids (rows, tokens)`` and ``labels (rows, tokens)`` (-100 = not
            scored), and optionally ``attention_mask (rows, tokens)`` of 0 and 1; without it every token is real.
            A value of ``None`` counts as absent.
        name: Its name in messages, e.g. ``"harm_loader"``.
        vocab_size: Exclusive limit of ids; ``None``: no limit.
        n_labels: Exclusive limit of labels; ``None``: ``vocab_size``.
        accepted: Names of the arguments that the model's forward takes; a batch with any of them besides the keys
            above is refused.

    Returns:
        The examples in the order of their rows. The first real token of a row is never scored: its label is dropped.

    Raises:
        CalibrationError: No batch, labels missing, shapes or dtypes that do not fit, ids out of range, a label on a
            token that the mask leaves out, a mask with holes, packed rows, labels that are already shifted, a row
            without a scored token, or a key that would change what is scored (see
            :func:`fastprune.calibration.batch_keys.unread_keys`). The message names ``name``, the batch and the row.

    Warns:
        FastpruneWarning: Batches contain tensors that scoring does not use, or most labels differ from the tokens at
            their positions; once for each loader.
    """
    n_labels = vocab_size if n_labels is None else n_labels
    if isinstance(loader, CalibrationLoader):
        loader = loader.calibration
    if isinstance(loader, CalibrationSet):
        for number, example in enumerate(loader.examples):
            _check_range(example, f"{name}, example {number}", vocab_size, n_labels)
        return loader
    examples: list[Example] = []
    unread: dict[str, None] = {}  # in order, each once
    for number, batch in enumerate(_iterator(loader, name)):
        where = f"{name}, batch {number}"
        input_ids, labels, attended = _tensors_of(batch, where)
        examples.extend(_examples_of(input_ids, labels, attended, where, vocab_size, n_labels))
        scored = _scored(labels, attended)
        _check_unshifted(input_ids, labels, attended, scored, where)
        unread.update(dict.fromkeys(unread_keys(batch, scored, where, accepted)))
    if not examples:
        raise CalibrationError(f"{name}: expected at least one example, got none")
    if unread:
        message = f"{name}: its batches hold {', '.join(unread)}, which scoring does not use"
        warn(message)
    _note_other_tokens(examples, name)
    return CalibrationSet(examples)


def _iterator(loader: Any, name: str) -> Iterator[Any]:
    if isinstance(loader, (str, Path)):
        raise CalibrationError(
            f"{name}: expected an iterable of batches, got a path; read it with load_calibration(...).loader()"
        )
    if isinstance(loader, Mapping):
        kind = type(loader).__name__
        if "input_ids" in loader:
            raise CalibrationError(f"{name}: expected an iterable of batches, got a single {kind}; pass [batch]")
        raise CalibrationError(
            f"{name}: expected an iterable of batches, got a {kind} of {', '.join(map(str, loader)) or 'nothing'}; "
            "pass a loader over one of these"
        )
    try:
        return iter(loader)
    except TypeError:
        raise CalibrationError(f"{name}: expected an iterable of batches, got {type(loader).__name__}") from None


def _examples_of(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attended: torch.Tensor,
    where: str,
    vocab_size: int | None,
    n_labels: int | None,
) -> list[Example]:
    stray = (labels != UNSCORED) & ~attended
    if stray.any():
        row, column = torch.nonzero(stray)[0].tolist()
        raise CalibrationError(
            f"{where}, row {row}: labels scores token {column}, which attention_mask leaves out; use -100 on padding"
        )
    examples = []
    for row in range(input_ids.shape[0]):
        ids = input_ids[row][attended[row]].tolist()
        scored = labels[row][attended[row]].tolist()
        if not ids:
            raise CalibrationError(f"{where}, row {row}: attention_mask leaves out every token")
        scored[0] = UNSCORED
        if all(label == UNSCORED for label in scored):
            raise CalibrationError(f"{where}, row {row}: no scored token (the first real token never is)")
        examples.append(Example(tuple(ids), tuple(scored)))
        _check_range(examples[-1], f"{where}, row {row}", vocab_size, n_labels)
    return examples


def _scored(labels: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Tokens whose label counts, ``(rows, tokens)`` bool: attended ones except the first of each row."""
    return (labels != UNSCORED) & attended & (attended.cumsum(1) > 1)


def _check_unshifted(
    input_ids: torch.Tensor, labels: torch.Tensor, attended: torch.Tensor, scored: torch.Tensor, where: str
) -> None:
    """Refuse labels that are already shifted to the next token: scoring shifts them once more."""
    compared = scored[:, :-1] & attended[:, 1:]
    found = labels[:, :-1][compared]
    if (
        len(found) >= _ENOUGH
        and torch.equal(found, input_ids[:, 1:][compared])
        and not torch.equal(found, input_ids[:, :-1][compared])
    ):
        raise CalibrationError(
            f"{where}: labels: expected at each position the id of the token there, got that of the next token; give "
            "labels that are not shifted, the shift is made here"
        )


def _note_other_tokens(examples: Sequence[Example], name: str) -> None:
    pairs = [pair for each in examples for pair in zip(each.input_ids, each.labels, strict=True) if pair[1] != UNSCORED]
    other = sum(token != label for token, label in pairs)
    if 2 * other > len(pairs):
        warn(
            f"{name}: {other} of {len(pairs)} labels are other tokens than those at their positions; expected the "
            "same, as for causal language models (masked language modeling, mlm=True, hides the tokens it asks for)"
        )


def _tensors_of(batch: Any, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(batch, Mapping):
        found = batch[0] if isinstance(batch, list | tuple) and batch else batch
        way_out = "; pass a CalibrationSet of the examples" if isinstance(found, Example) else ""
        raise CalibrationError(
            f"{where}: expected a mapping with input_ids and labels, got {type(batch).__name__}{way_out}"
        )
    for key in ("input_ids", "labels"):
        if batch.get(key) is None:
            raise CalibrationError(f"{where}: expected the key {key}, got {sorted(map(str, batch))}")
    input_ids = _integers(batch["input_ids"], "input_ids", where)
    if input_ids.ndim != 2:
        raise CalibrationError(f"{where}: input_ids: expected the shape (rows, tokens), got {tuple(input_ids.shape)}")
    labels = _integers(batch["labels"], "labels", where)
    _check_shape(labels, input_ids, "labels", where)
    if batch.get("attention_mask") is None:
        attended = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        mask = _integers(batch["attention_mask"], "attention_mask", where)
        _check_shape(mask, input_ids, "attention_mask", where)
        if ((mask != 0) & (mask != 1)).any():
            raise CalibrationError(
                f"{where}: attention_mask: expected 0 and 1 only, got {sorted(set(mask.unique().tolist()))[:5]}"
            )
        attended = mask.bool()
        _check_runs(attended, where)
    if batch.get("position_ids") is not None:
        _check_positions(_integers(batch["position_ids"], "position_ids", where), attended, where)
    return input_ids, labels, attended


def _integers(value: Any, key: str, where: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(
            f"{where}: {key}: expected a tensor, got {type(value).__name__}; a collator makes tensors of rows "
            '(return_tensors="pt")'
        )
    if value.dtype not in _INTEGERS and not (key == "attention_mask" and value.dtype == torch.bool):
        raise CalibrationError(f"{where}: {key}: expected int64, got {value.dtype}")
    return value.detach().to(device="cpu", dtype=torch.int64)


def _check_shape(tensor: torch.Tensor, input_ids: torch.Tensor, key: str, where: str) -> None:
    if tensor.shape != input_ids.shape:
        raise CalibrationError(
            f"{where}: {key}: expected the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
        )


def _check_runs(attended: torch.Tensor, where: str) -> None:
    """Refuse holes in a mask: without the tokens under them the model would be shown another text."""
    begins = attended & ~torch.nn.functional.pad(attended, (1, 0))[:, :-1]
    runs = begins.sum(1)
    if (runs > 1).any():
        row = int(torch.nonzero(runs > 1)[0])
        starts = torch.nonzero(begins[row]).flatten().tolist()
        raise CalibrationError(
            f"{where}, row {row}: attention_mask: expected zeros on the left and right only, got {len(starts)} "
            f"runs of attended tokens, which begin at {starts[:5]}"
        )


def _check_positions(positions: torch.Tensor, attended: torch.Tensor, where: str) -> None:
    """Refuse positions other than those made from the mask: they are how packed examples are told apart."""
    expected = position_ids(attended)
    if (
        positions.ndim != 2
        or positions.shape[1] != expected.shape[1]
        or positions.shape[0] not in (1, expected.shape[0])
    ):
        raise CalibrationError(
            f"{where}: position_ids: expected the shape (rows, tokens), got {tuple(positions.shape)}"
        )
    if ((positions != expected) & attended).any():
        raise CalibrationError(
            f"{where}: position_ids: expected each row's tokens counted from 0, got other numbers; "
            "packed rows cannot be scored, give each example a row of its own"
        )


def _check_range(example: Example, where: str, vocab_size: int | None, n_labels: int | None) -> None:
    """Refuse ids that the model has no embedding or logit for; ids of padding, often out of range, are gone by now."""
    labels = [label for label in example.labels if label != UNSCORED]
    for key, ids, limit in (("input_ids", example.input_ids, vocab_size), ("labels", labels, n_labels)):
        low, high = min(ids), max(ids)
        if low < 0 or (limit is not None and high >= limit):
            expected = "of 0 or more" if limit is None else f"in [0, {limit})"
            raise CalibrationError(f"{where}: {key}: expected ids {expected}, got the id {low if low < 0 else high}")
