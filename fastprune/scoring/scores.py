"""The outcome of scoring: the best-scored weights of every matrix under each criterion, with their provenance.

In: the kept lists of the engine. Out: lists by name, selections, and one safetensors file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from fastprune.artifact import read_artifact, write_artifact
from fastprune.errors import ArgumentError, ArtifactError, ScoringError, SelectionError, setting
from fastprune.masking.mask import PruneMask
from fastprune.scoring.select import select
from fastprune.scoring.top_scores import TopScores

Lists = Mapping[str, Mapping[str, TopScores]]
ROLES = ("harm", "benign")


class Scores:
    """Kept scores of two calibration sets.

    Args:
        harm: Criterion to matrix name to list; the first criterion is the default one. Matrices in model order.
        benign: The same for the benign set; empty without one.
        shapes: Shape of each matrix, in model order.
        provenance: JSON-able facts: model, ``fingerprint``, calibration hashes, versions, and ``block_of`` (matrix name
            to index of its decoder block).
        p_max: Fraction up to which benign lists were kept.
        q_max: The same for harm.

    Raises:
        ScoringError: The lists do not cover the matrices of ``shapes``.
    """

    def __init__(
        self,
        harm: Lists,
        benign: Lists,
        shapes: Mapping[str, tuple[int, ...]],
        provenance: Mapping[str, Any],
        p_max: float,
        q_max: float,
    ) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
        self.provenance: dict[str, Any] = dict(provenance)
        self.p_max, self.q_max = p_max, q_max
        self._lists = {
            role: {criterion: dict(lists) for criterion, lists in given.items()}
            for role, given in zip(ROLES, (harm, benign), strict=True)
        }
        if not self._lists["harm"]:
            raise ScoringError("scores need at least one harm criterion, got none")
        for role, by_criterion in self._lists.items():
            for criterion, lists in by_criterion.items():
                self._check_cover(f"{role} {criterion}", lists)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the matrices, in model order."""
        return tuple(self.shapes)

    @property
    def criteria(self) -> dict[str, tuple[str, ...]]:
        """Criteria of each role; the first is the default."""
        return {role: tuple(by_criterion) for role, by_criterion in self._lists.items()}

    @property
    def harm(self) -> dict[str, TopScores]:
        """Lists of the first harm criterion."""
        return self.of("harm")

    @property
    def benign(self) -> dict[str, TopScores]:
        """Lists of the first benign criterion; empty without a benign set."""
        return self.of("benign") if self._lists["benign"] else {}

    def of(self, role: str, criterion: str | None = None) -> dict[str, TopScores]:
        """Lists of one criterion.

        Args:
            role: ``"harm"`` or ``"benign"``.
            criterion: Its name; by default the first.

        Raises:
            SelectionError: The role is unknown, has no set, or the criterion was not scored.
        """
        if role not in ROLES:
            raise SelectionError(f"expected one of {', '.join(ROLES)}, got {role!r}", argument="role")
        lists = self._lists[role]
        if not lists:
            raise SelectionError(
                f"these scores have no {role} set; select with {setting('p', None)} or score with a {role} loader"
            )
        criterion = next(iter(lists)) if criterion is None else criterion
        if criterion not in lists:
            raise SelectionError(
                f"expected one of the scored criteria {', '.join(lists)}, got {criterion!r}", argument=role
            )
        return lists[criterion]

    def select(
        self,
        p: float | None,
        q: float,
        *,
        harm: str | None = None,
        benign: str | None = None,
        scope: str = "matrix",
        layers: Iterable[int] | None = None,
        slice: int = 0,
        protect: Iterable[PruneMask] | None = (),
    ) -> PruneMask:
        """The weights among the top ``q`` by harm score and not among the top ``p`` by benign score.

        Args:
            p: Fraction of protected weights in (0, 1]; ``None`` protects nothing.
            q: Fraction of weights asked of harm in (0, 1].
            harm: Harm criterion; by default the first.
            benign: Benign criterion; by default the first.
            scope: ``"matrix"``: the fractions hold in each matrix; ``"global"``: over all matrices together.
            layers: Indices of decoder blocks; P, Q and N are of these alone.
            slice: ``s`` takes the harm ranks ``[s*k, (s+1)*k)`` instead of the first ``k``.
            protect: Masks whose weights are never pruned; ``None`` is none.

        Returns:
            The mask; ``metadata["report"]`` has the counts asked, selected and spared.

        Raises:
            SelectionError: A fraction is out of range, was not kept, or rounds to no weight anywhere; a layer is
                unknown; a mask of ``protect`` has other shapes.
            ArgumentError: ``scope`` or ``slice`` is out of range, or ``protect`` is not iterable.

        Warns:
            FastpruneWarning: A fraction rounds to no weight in some matrix, or fewer scores are positive than asked.
        """
        layers = None if layers is None else self._checked_layers(layers)
        masks = self._checked_protect(protect)
        chosen = select(
            self.shapes,
            self.of("harm", harm),
            None if p is None else self.of("benign", benign),
            p,
            q,
            scope=scope,
            only=None if layers is None else {name for name in self.names if self._block_of[name] in layers},
            slice=slice,
            protect=masks,
        )
        criteria = {"harm": harm or self.criteria["harm"][0]}
        if p is not None:
            criteria["benign"] = benign or self.criteria["benign"][0]
        model = self.provenance.get("model")
        fingerprint = model.get("fingerprint") if isinstance(model, dict) else None
        metadata = {key: value for key, value in self.provenance.items() if key != "block_of"} | {
            "kind": "selection",
            "fingerprint": self.provenance.get("fingerprint", fingerprint),
            "criteria": criteria,
            "p": None if p is None else float(p),
            "q": float(q),
            "scope": scope,
            "layers": layers,
            "slice": int(slice),  # an integer of NumPy is not JSON-able
            "protect": [mask.digest for mask in masks],
            "report": chosen.report,
        }
        return PruneMask(chosen.indices, self.shapes, metadata, nominal=chosen.asked)

    @property
    def _block_of(self) -> Mapping[str, int]:
        return self.provenance.get("block_of", {})

    def _checked_layers(self, layers: Iterable[int]) -> list[int]:
        try:
            wanted = list(layers)
        except TypeError:
            raise SelectionError(f"expected an iterable of block indices, got {layers!r}", argument="layers") from None
        blocks = set(self._block_of.values())
        unknown = [
            layer
            for layer in wanted
            if isinstance(layer, bool) or not isinstance(layer, Integral) or layer not in blocks
        ]
        if unknown or not wanted:
            known = f"{min(blocks)} to {max(blocks)}" if blocks else "not known: the scores have no block_of"
            raise SelectionError(
                f"expected indices of decoder blocks ({known}), got {unknown or 'none'}", argument="layers"
            )
        return sorted({int(layer) for layer in wanted})

    def _checked_protect(self, protect: Iterable[PruneMask] | None) -> tuple[PruneMask, ...]:
        if protect is None or isinstance(protect, PruneMask):
            return () if protect is None else (protect,)
        try:
            masks = tuple(protect)
        except TypeError:
            raise ArgumentError(f"expected an iterable of PruneMasks, got {protect!r}", argument="protect") from None
        for mask in masks:
            if not isinstance(mask, PruneMask) or mask.shapes != self.shapes:
                got = f"one of {len(mask.shapes)} other shapes" if isinstance(mask, PruneMask) else type(mask).__name__
                raise SelectionError(
                    f"expected PruneMasks over the matrices of these scores, got {got}", argument="protect"
                )
        return masks

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file.

        Raises:
            NotFoundError: The folder does not exist.
            ArtifactError: The provenance is not JSON-able.
        """
        tensors = {}
        for role, by_criterion in self._lists.items():
            for criterion, lists in by_criterion.items():
                # One tensor for all matrices: a model of many experts has tens of thousands of these.
                key = f"{role}/{criterion}"
                tensors[f"{key}/indices"] = torch.cat([kept.indices for kept in lists.values()])
                tensors[f"{key}/values"] = torch.cat([kept.values for kept in lists.values()])
                tensors[f"{key}/lengths"] = torch.tensor([len(kept) for kept in lists.values()], dtype=torch.int64)
                tensors[f"{key}/floors"] = torch.tensor([kept.floor for kept in lists.values()], dtype=torch.float32)
        content = {
            "shapes": self.shapes,
            "criteria": self.criteria,
            "provenance": self.provenance,
            "p_max": self.p_max,
            "q_max": self.q_max,
        }
        return write_artifact(path, "scores", tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a file of :meth:`save`.

        Raises:
            NotFoundError: There is no such file.
            ArtifactError: It is truncated, foreign, of another kind or version, or its lists are damaged.
        """
        tensors, content = read_artifact(path, "scores")
        try:
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            lists = {
                role: {name: _unpack(tensors, f"{role}/{name}", shapes, path) for name in content["criteria"][role]}
                for role in ROLES
            }
            rest = (content["provenance"], content["p_max"], content["q_max"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: this scores file lacks {error}") from error
        return cls(lists["harm"], lists["benign"], shapes, *rest)

    def _check_cover(self, what: str, lists: Mapping[str, TopScores]) -> None:
        if list(lists) != list(self.shapes):
            differing = sorted(set(lists) ^ set(self.shapes))
            raise ScoringError(
                f"{what}: expected the matrices of shapes in their order, got a difference in "
                f"{differing[:3] or 'the order'}"
            )
        for name, kept in lists.items():
            if kept.numel != math.prod(self.shapes[name]):
                raise ScoringError(f"{what}: {name} has {kept.numel} weights, its shape says {self.shapes[name]}")

    def __repr__(self) -> str:
        entries = {r: sum(map(len, self.of(r).values())) for r in ROLES if self._lists[r]}
        return f"Scores({len(self.shapes)} matrices, criteria {self.criteria}, kept {entries})"


def _unpack(
    tensors: Mapping[str, torch.Tensor], key: str, shapes: Mapping[str, tuple[int, ...]], path: str | Path
) -> dict[str, TopScores]:
    """The lists of one criterion from their joined tensors, checked together."""
    indices, values = tensors[f"{key}/indices"], tensors[f"{key}/values"]
    lengths, floors = tensors[f"{key}/lengths"], tensors[f"{key}/floors"]
    numel = torch.tensor([math.prod(shape) for shape in shapes.values()], dtype=torch.int64)
    fits = len(lengths) == len(floors) == len(numel) and indices.shape == values.shape == (int(lengths.sum()),)
    if not fits or (lengths > numel).any() or indices.dtype != torch.int64 or values.dtype != torch.float32:
        raise ArtifactError(f"{path}: the lists of {key} do not fit the matrices; the file is damaged")
    owner = torch.repeat_interleave(torch.arange(len(numel)), lengths)
    rising = (values[1:] > values[:-1]) | ((values[1:] == values[:-1]) & (indices[1:] <= indices[:-1]))
    if (
        values.isnan().any()
        or (indices < 0).any()
        or (indices >= numel[owner]).any()
        or (rising & (owner[1:] == owner[:-1])).any()
    ):
        raise ArtifactError(f"{path}: the lists of {key} are not in order; the file is damaged")
    parts = zip(
        shapes, indices.split(lengths.tolist()), values.split(lengths.tolist()), numel.tolist(), floors, strict=True
    )
    return {name: TopScores(some, scores, size, float(floor)) for name, some, scores, size, floor in parts}
