"""``fastprune select``: from scores to a mask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastprune
from fastprune.cli.app import pasted
from fastprune.cli.frame import Run, command
from fastprune.cli.inputs import InputPath
from fastprune.cli.options import MASK, Scope, blocks
from fastprune.cli.outputs import OutputFile, written
from fastprune.cli.processes import note

if TYPE_CHECKING:
    from fastprune.masking import PruneMask


@command(names={"harm": "harm_criterion", "benign": "benign_criterion"})
def select(
    run: Run,
    scores: Annotated[
        Path, InputPath("scores file"), typer.Argument(help="File of `fastprune score`.", show_default=False)
    ],
    q: Annotated[float, typer.Option("-q", help="Fraction of weights to prune, the highest harm scores, in (0, 1].")],
    p: Annotated[
        float | None,
        typer.Option("-p", help="Fraction of weights to protect, the highest benign scores (default: none)."),
    ] = None,
    out: Annotated[Path, OutputFile("mask"), typer.Option(help="File to write the mask to.")] = Path(
        "mask.safetensors"
    ),
    scope: Annotated[Scope, typer.Option(help="Count per matrix, or over all matrices.")] = Scope.matrix,
    harm_criterion: Annotated[str | None, typer.Option(help="Harm criterion (default: the first scored).")] = None,
    benign_criterion: Annotated[str | None, typer.Option(help="Benign criterion (default: the first scored).")] = None,
    layers: Annotated[str | None, typer.Option(help="Decoder blocks to prune in, e.g. 0-11,14.")] = None,
    slice: Annotated[int, typer.Option(help="0: the highest q; 1: the next q, as a control.")] = 0,
    protect: Annotated[
        list[Path] | None, MASK, typer.Option(help="Masks whose weights are never pruned; repeatable.")
    ] = None,
) -> None:
    """Choose weights to prune: the highest harm scores without the highest benign scores.

    A mask tells where the removed behavior is, so mask and original model together restore it.
    """
    loaded = fastprune.Scores.load(scores)
    if p is None and not protect and loaded.criteria["benign"]:
        note("nothing is protected without -p, although the scores hold a benign set")
    mask = loaded.select(
        p,
        q,
        harm=harm_criterion,
        benign=benign_criterion,
        scope=scope.value,
        layers=None if layers is None else blocks(layers),
        slice=slice,
        protect=tuple(fastprune.PruneMask.load(path) for path in protect or ()),
    )
    written(out, mask.save)
    run.result(mask_facts(mask, out), str(mask))
    from fastprune.masking.storable import why_not_storable

    if (reason := why_not_storable(mask.metadata)) is None:
        following = pasted("patch", "MODEL", out, "--out", "PRUNED_MODEL")
    else:
        note(f"this mask may not be written into a checkpoint: {reason}")
        following = f"{pasted('eval', 'MODEL', '--mask', out)} …"
    run.talk(f"written to {out}\nnext: {following}")


def mask_facts(mask: PruneMask, out: Path) -> dict[str, Any]:
    """A mask and its file, as JSON data."""
    return {
        "mask": out,
        "kind": mask.metadata.get("kind"),
        "digest": mask.digest,
        "matrices": len(mask),
        "pruned": mask.total,
        "nominal": mask.nominal,
        "report": mask.metadata.get("report"),
    }
