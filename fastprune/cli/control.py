"""``fastprune control``: a mask of as many weights as another one has, chosen without looking at any behavior."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import fastprune
from fastprune.cli.app import pasted
from fastprune.cli.frame import Run, command
from fastprune.cli.models import loaded_model
from fastprune.cli.options import MASK, Control, DeviceMapOption, DtypeOption, ModelFolder
from fastprune.cli.outputs import OutputFile, written
from fastprune.cli.select import mask_facts


@command(names={"like": "mask"})
def control(
    run: Run,
    model: ModelFolder,
    mask: Annotated[Path, MASK, typer.Argument(help="Mask to match.", show_default=False)],
    kind: Annotated[
        Control,
        typer.Option(help="random: any weights. matched: random weights of similar magnitude. largest: by magnitude."),
    ] = Control.random,
    seed: Annotated[int, typer.Option(help="Seed of the random kinds.")] = 0,
    out: Annotated[Path, OutputFile("mask"), typer.Option(help="File to write the control mask to.")] = Path(
        "control.safetensors"
    ),
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Choose as many weights in each matrix as a mask has, without looking at any behavior."""
    from fastprune.masking import largest_magnitude_mask

    like, loaded = fastprune.PruneMask.load(mask), loaded_model(model, "cpu", dtype, device_map)
    if kind is Control.largest:
        chosen = largest_magnitude_mask(loaded, like)
    else:
        chosen = fastprune.random_mask(loaded, like, seed, "count" if kind is Control.random else "magnitude")
    written(out, chosen.save)
    run.result(mask_facts(chosen, out), str(chosen))
    following = pasted("eval", model, "--mask", mask, "--mask", out)
    run.talk(f"written to {out}\nnext: {following} …")
