"""Batches of any origin to examples.

In: an iterable of Hugging Face batches, padded on either side, with or without an attention mask. Out: a
:class:`CalibrationSet`, one example a row, padding taken off. Everything that could silently change a score is checked
here, so that the engine can trust what it gets.
It must not know models; the size of the vocabulary is all it is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastprune.calibration.examples import UNSCORED, Example
from fastprune.calibration.sets import CalibrationLoader, CalibrationSet
from fastprune.errors import CalibrationError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def collect(loader: Iterable[Mapping[str, Any]], name: str, vocab_size: int | None = None) -> CalibrationSet:
    """Read a loader once and turn each row of each batch into an example.

    A set or a loader of :func:`load_calibration` passes through as it is; only the range of its ids is checked.

    Args:
        loader: Iterable of mappings with ``input_ids (rows, tokens)`` and ``labels (rows, tokens)`` (-100 = not
            scored), and optionally ``attention_mask (rows, tokens)`` of 0 and 1; without it every token is real.
        name: How messages call it, e.g. ``"harm_loader"``.
        vocab_size: Ids and labels must be below; ``None`` leaves that open.

    Returns:
        The examples in the order of their rows. The first real token of a row is never scored: its label is dropped.

    Raises:
        CalibrationError: No batch, labels missing, shapes or dtypes that do not fit, ids out of range, a label on a
            token that the mask leaves out, a mask with holes, packed rows, or a row without a scored token. The message
            names ``name``, the batch and the row.
    """
    if isinstance(loader, CalibrationLoader):
        loader = loader.calibration
    if isinstance(loader, CalibrationSet):
        _check_vocabulary(loader, name, vocab_size)
        return loader
    if isinstance(loader, (str, Path)):
        raise CalibrationError(
            f"{name} must be an iterable of batches, got a path; read it with load_calibration(...).loader()"
        )
    if isinstance(loader, Mapping):
        raise CalibrationError(
            f"{name} must be an iterable of batches, got a single {type(loader).__name__}; pass [batch]"
        )
    try:
        iterator = iter(loader)
    except TypeError:
        raise CalibrationError(f"{name} must be an iterable of batches, got {type(loader).__name__}") from None
    examples: list[Example] = []
    for number, batch in enumerate(iterator):
        examples.extend(_examples_of(batch, f"{name}, batch {number}", vocab_size))
    if not examples:
        raise CalibrationError(f"{name} yields no examples; at least one is needed")
    return CalibrationSet(examples)


def _examples_of(batch: Any, where: str, vocab_size: int | None) -> list[Example]:
    input_ids, labels, attended = _tensors_of(batch, where)
    # a pad id outside the vocabulary is common and harmless: only what the model will see counts
    _check_range(input_ids, attended, "input_ids", where, vocab_size)
    _check_range(labels, labels != UNSCORED, "labels", where, vocab_size)
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
    return examples


def _tensors_of(batch: Any, where: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not isinstance(batch, Mapping):
        raise CalibrationError(f"{where}: expected a mapping with input_ids and labels, got {type(batch).__name__}")
    for key in ("input_ids", "labels"):
        if batch.get(key) is None:
            raise CalibrationError(f"{where}: {key} is missing; found {sorted(map(str, batch))}")
    input_ids = _integers(batch["input_ids"], "input_ids", where)
    if input_ids.ndim != 2:
        raise CalibrationError(f"{where}: input_ids must be (rows, tokens), got the shape {tuple(input_ids.shape)}")
    labels = _integers(batch["labels"], "labels", where)
    _check_shape(labels, input_ids, "labels", where)
    if batch.get("attention_mask") is None:
        attended = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        mask = _integers(batch["attention_mask"], "attention_mask", where)
        _check_shape(mask, input_ids, "attention_mask", where)
        if ((mask != 0) & (mask != 1)).any():
            raise CalibrationError(
                f"{where}: attention_mask must hold 0 and 1 only, got {sorted(set(mask.unique().tolist()))[:5]}"
            )
        attended = mask.bool()
        _check_runs(attended, where)
    if batch.get("position_ids") is not None:
        _check_positions(_integers(batch["position_ids"], "position_ids", where), attended, where)
    return input_ids, labels, attended


def _integers(value: Any, key: str, where: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise CalibrationError(f"{where}: {key} must be a tensor, got {type(value).__name__}")
    if value.dtype not in _INTEGERS and not (key == "attention_mask" and value.dtype == torch.bool):
        raise CalibrationError(f"{where}: {key} must be int64, got {value.dtype}")
    return value.detach().to(device="cpu", dtype=torch.int64)


def _check_shape(tensor: torch.Tensor, input_ids: torch.Tensor, key: str, where: str) -> None:
    if tensor.shape != input_ids.shape:
        raise CalibrationError(
            f"{where}: {key} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
        )


def _check_runs(attended: torch.Tensor, where: str) -> None:
    """Without what a hole covers, the model would be shown another text than the caller's."""
    begins = attended & ~torch.nn.functional.pad(attended, (1, 0))[:, :-1]
    runs = begins.sum(1)
    if (runs > 1).any():
        row = int(torch.nonzero(runs > 1)[0])
        starts = torch.nonzero(begins[row]).flatten().tolist()
        raise CalibrationError(
            f"{where}, row {row}: attention_mask must leave out padding on the left and right only, got {len(starts)} "
            f"runs of attended tokens, which begin at {starts[:5]}"
        )


def _check_positions(positions: torch.Tensor, attended: torch.Tensor, where: str) -> None:
    """Positions are made anew from the mask; given ones may only say the same, or packed examples merge."""
    expected = (attended.cumsum(1) - 1).clamp(min=0)
    if (
        positions.ndim != 2
        or positions.shape[1] != expected.shape[1]
        or positions.shape[0] not in (1, expected.shape[0])
    ):
        raise CalibrationError(f"{where}: position_ids must be (rows, tokens), got the shape {tuple(positions.shape)}")
    if ((positions != expected) & attended).any():
        raise CalibrationError(
            f"{where}: position_ids do not count each row's tokens from 0; "
            "packed rows cannot be scored, give each example a row of its own"
        )


def _check_range(
    ids: torch.Tensor, where_it_counts: torch.Tensor, key: str, where: str, vocab_size: int | None
) -> None:
    wrong = where_it_counts & ((ids < 0) | (ids >= vocab_size) if vocab_size is not None else ids < 0)
    if wrong.any():
        row, column = torch.nonzero(wrong)[0].tolist()
        raise CalibrationError(_out_of_range(f"{where}, row {row}", key, int(ids[row, column]), vocab_size))


def _check_vocabulary(calibration: CalibrationSet, name: str, vocab_size: int | None) -> None:
    for number, example in enumerate(calibration.examples):
        for key, ids in (("input_ids", example.input_ids), ("labels", [i for i in example.labels if i != UNSCORED])):
            low, high = min(ids), max(ids)
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                raise CalibrationError(
                    _out_of_range(f"{name}, example {number}", key, low if low < 0 else high, vocab_size)
                )


def _out_of_range(where: str, key: str, value: int, vocab_size: int | None) -> str:
    limit = "0 or more" if vocab_size is None else f"in [0, {vocab_size})"
    return f"{where}: {key} must be {limit}, got the id {value}"
