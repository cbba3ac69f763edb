"""What a call of ``fastprune.score`` asks for, checked before any data are read or weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path

import torch
from torch import nn

from fastprune.calibration import CalibrationSet
from fastprune.errors import ArgumentError
from fastprune.files import as_path
from fastprune.ops import dispatch
from fastprune.scoring.criteria import parse_criteria, statistics_of

_STATISTICS_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_WEIGHT_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


Source = CalibrationSet | Iterable[Mapping[str, torch.Tensor]]
"""Where examples come from; what :class:`CalibrationSet` yields itself is no batch."""


class Request:
    """The arguments of :func:`fastprune.score`, which describes them.

    Attributes:
        model: A model in memory, or the folder of a checkpoint.
        sources: Where the examples of each role come from, as the caller gave them.
        criteria: Criteria of each role.
        fractions: Kept fraction of each role.
        statistics: Statistics that the criteria of each role need.
        statistics_dtype: Name of the dtype of the sums.
        resume: Folder of the journal.
        offload: Where hidden states lie between segments; ``None`` leaves it to the plan.
        dtype: Of the weights of a folder; ``None`` keeps that of the files.

    Raises:
        ArgumentError: An argument is out of range.
        BackendError: The named backend cannot serve.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        harm_loader: Source,
        benign_loader: Source | None,
        *,
        harm: str | tuple[str, ...],
        benign: str | tuple[str, ...],
        p_max: float,
        q_max: float,
        memory: int | str | None,
        host_memory: int | str | None,
        segments: int | None,
        offload: str | None,
        resume: str | Path | None,
        statistics_dtype: str,
        backend: str | None,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        progress: bool,
    ) -> None:
        self.criteria = {"harm": parse_criteria("harm", harm)}
        if benign_loader is not None or benign is not None:  # a name is checked whether or not it is needed
            self.criteria["benign"] = parse_criteria("benign", benign)
        if benign_loader is None:
            self.criteria.pop("benign", None)
        self.fractions = {"harm": _fraction("q_max", q_max), "benign": _fraction("p_max", p_max)}
        if statistics_dtype not in _STATISTICS_DTYPES:
            raise ArgumentError(
                f"expected one of {', '.join(_STATISTICS_DTYPES)}, got {statistics_dtype!r}",
                argument="statistics_dtype",
            )
        self.statistics_dtype = statistics_dtype
        self.statistics = {role: statistics_of(names) for role, names in self.criteria.items()}
        needed = sorted({f"accumulate_{name}" for names in self.statistics.values() for name in names})
        dispatch.check_serves(backend, [*needed, "top_scores"])
        self.backend = backend
        if harm_loader is None:
            raise ArgumentError("expected an iterable of batches, got None", argument="harm_loader")
        self.sources = {"harm": harm_loader}
        if benign_loader is not None:
            self.sources["benign"] = benign_loader
        self.resume = None if resume is None else as_path(resume, "resume")
        # What a journal names has to outlive the process.
        self.offload = "disk" if offload is None and resume is not None else offload
        self.model = model
        if not isinstance(model, str | os.PathLike):
            self._check_in_memory(device=device, dtype=dtype)
        self.device, self.dtype = device, _weight_dtype(dtype)
        self.memory, self.host_memory, self.segments = memory, host_memory, segments
        self.progress = progress

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return _STATISTICS_DTYPES[self.statistics_dtype]

    def _check_in_memory(self, **of_folders: object) -> None:
        if self.resume is not None:
            raise ArgumentError(
                f"expected a checkpoint folder as the model, got a {type(self.model).__name__} in memory; save "
                "it with save_pretrained and score that folder",
                argument="resume",
            )
        for argument, value in of_folders.items():
            if value is not None:
                raise ArgumentError(
                    "is for a checkpoint folder; move or cast the model itself instead", argument=argument
                )


def _fraction(argument: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ArgumentError(f"expected a fraction in (0, 1], got {value!r}", argument=argument)
    return float(value)


def _weight_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    if dtype not in _WEIGHT_DTYPES:
        raise ArgumentError(f"expected one of {', '.join(_WEIGHT_DTYPES)}, got {dtype!r}", argument="dtype")
    return _WEIGHT_DTYPES[dtype]
