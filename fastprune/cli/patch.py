"""``fastprune patch``: a mask into the weights of a checkpoint, or out of them again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

import fastprune
from fastprune.cli.app import pasted
from fastprune.cli.frame import Run, command
from fastprune.cli.options import MASK, ModelFolder, StrictOption
from fastprune.errors import ArgumentError


def _check_options(
    mask: Path | None,
    out: Path | None,
    in_place: bool,
    backup: bool,
    undo: bool,
    scale: float | None,
    strict: bool,
    no_undo: bool,
    **others: Any,
) -> None:
    given = [name for name, value in (("--out", out), ("--in-place", in_place), ("--undo", undo)) if value]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise ArgumentError(f"patch: expected one of --out DIR, --in-place and --undo, got {found}")
    if undo and (mask is not None or scale is not None or not strict or no_undo):
        raise ArgumentError(
            "patch: --undo takes neither a MASK nor --scale nor --no-strict nor --no-undo; what to put back is in the "
            "folder"
        )
    if not undo and mask is None:
        raise ArgumentError(f"patch: {given[0]} expects a MASK after the model, got none")
    if backup and not in_place:
        raise ArgumentError(f"patch: --backup goes with --in-place only, got {given[0]}")
    if backup and no_undo:
        raise ArgumentError("patch: --no-undo leaves nothing of the old weights, so it does not go with --backup")


@command(check=_check_options, names={"out_dir": "out", "in_dir": "model", "folder": "model"})
def patch(
    run: Run,
    model: ModelFolder,
    mask: Annotated[
        Path | None, MASK, typer.Argument(help="File of `fastprune select`; not with --undo.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for a pruned copy; MODEL stays as it is.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the weights of MODEL itself.")] = False,
    backup: Annotated[
        bool, typer.Option("--backup", help="With --in-place: copy changed shards to <shard>.bak first.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Restore the original weights of MODEL, bit by bit.")] = False,
    scale: Annotated[
        float | None, typer.Option(help="Factor on the masked weights, from 0 to 1.", show_default="0")
    ] = None,
    strict: StrictOption = True,
    no_undo: Annotated[
        bool, typer.Option("--no-undo", help="Leave no fastprune.undo, for a folder to publish.")
    ] = False,
) -> None:
    """Write a mask into a checkpoint, or into a copy of it, shard by shard; or restore the original weights.

    A patched folder holds `fastprune.undo` with the original values, so --undo needs nothing else. An interrupted patch
    in place is undone the same way.

    The mask and `fastprune.undo` reveal and restore what was removed: publish neither with the pruned model unless that
    is wanted. With --no-undo the folder holds no such file; in place, it exists only while weights are written.

    Masks that remove refusals stay in memory: those of `signed_reverse`, and those whose harm rows are mostly refusals.
    """
    if undo:
        fastprune.undo_patch(model)
        run.result({"model": model, "undone": True}, f"{model} has its original weights again")
        return
    # The check of the options has seen to it that there is a mask, and either --out or --in-place.
    chosen, factor = fastprune.PruneMask.load(cast(Path, mask)), scale or 0.0
    target = model if in_place else cast(Path, out)
    if in_place:
        fastprune.patch_in_place(model, chosen, backup=backup, scale=factor, strict=strict, undo=not no_undo)
    else:
        fastprune.patch_checkpoint(model, chosen, target, scale=factor, strict=strict, undo=not no_undo)
    done = "zeroed" if factor == 0 else f"scaled by {factor:g}"
    run.result(
        {"model": target, "undone": False, "weights": chosen.total, "scale": factor, "undo_file": not no_undo},
        f"{chosen.total:,} weights {done}; pruned model in {target}",
    )
    run.talk("no undo file was left" if no_undo else f"undo: {pasted('patch', '--undo', target)}")
