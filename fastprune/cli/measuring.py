"""``control`` and ``eval``: what a model can do, unpruned, with a mask, and with as many other weights removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import fastprune
from fastprune.cli.app import app, command, quiet_loading
from fastprune.cli.files import check_report, output_file, output_folder, written
from fastprune.cli.options import (
    AttackOption,
    Bos,
    BosOption,
    Control,
    FormatOption,
    JudgeOption,
    ModelFolder,
    StrictOption,
    SystemOption,
    TemplateArgsOption,
    format_of,
    template_args_of,
)
from fastprune.cli.processes import say
from fastprune.errors import ArgumentError, require


@app.command()
def control(
    context: typer.Context,
    model: ModelFolder,
    mask: Annotated[Path, typer.Argument(help="The mask that the control is to be like.", show_default=False)],
    kind: Annotated[
        Control,
        typer.Option(help="random: any weights. matched: random ones of nearly the same size. largest: by size."),
    ] = Control.random,
    seed: Annotated[int, typer.Option(help="Of the random kinds: same seed, same mask.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the control goes.")] = Path("control.safetensors"),
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "auto",
) -> None:
    """Choose as many weights in each matrix as a mask has, without looking at any behaviour."""
    from fastprune.masking import largest_magnitude_mask

    context.with_resource(output_file(out, "mask", (mask, model)))
    like, loaded = fastprune.PruneMask.load(mask), _load(model, "cpu", dtype)
    match kind:
        case Control.largest:
            chosen = largest_magnitude_mask(loaded, like)
        case _:
            chosen = fastprune.random_mask(loaded, like, seed, "count" if kind is Control.random else "magnitude")
    following = command("eval", model, "--mask", mask, "--mask", out)
    say(f"{chosen}\nwritten to {written(out, chosen.save)}\nnext: {following} …")


@app.command(name="eval")
def evaluate(
    context: typer.Context,
    model: ModelFolder,
    harm: Annotated[
        Path | None, typer.Option(help="Held-out harmful rows (prompt, response[, prefill, category]).")
    ] = None,
    skills: Annotated[Path | None, typer.Option(help="Benign rows with a column `skill`.")] = None,
    recognition: Annotated[Path | None, typer.Option(help="Yes/no rows: is this request harmful?")] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="Masks to measure beside the unpruned model; repeatable.")
    ] = None,
    strict: StrictOption = True,
    attack: AttackOption = "prefilling",
    judge: JudgeOption = "exact",
    neighbour: Annotated[str | None, typer.Option(help="The skill closest to harm in form.")] = None,
    format: FormatOption = None,
    bos: BosOption = Bos.auto,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of answers; the reference's and one more by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that go through the model together.")] = 64,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and record.json.")] = None,
) -> None:
    """Measure harm, refusal, skills and recognition, unpruned and with each mask."""
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.evaluation import JUDGES, EvaluationSuite
    from fastprune.experiments import evaluation_record, stored_patch
    from fastprune.reporting import print_files, print_results, write_report

    if out is not None:
        require("matplotlib", "report")  # the pictures come last
        context.with_resource(output_folder(out))
        check_report(out)
    masks, patched = _named(mask or ()), stored_patch(model)
    tokenizer = load_tokenizer(model)
    chosen = format_of(format, model, tokenizer)
    suite = EvaluationSuite(
        tokenizer,
        harm_rows=harm,
        skill_rows=skills,
        recognition_rows=recognition,
        format=chosen,
        bos=bos.rule,
        template_args=template_args_of(template_args),
        system=system,
        attack=str(attack),
        judges={"harm": JUDGES[judge].judge} if harm is not None else None,
        neighbour_skill=neighbour,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    settings = {
        "judge": str(judge),
        **suite.encoder.facts,
        "neighbour": neighbour,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
    }
    # resolved, because "." has no name
    name = model.resolve().name
    loaded = _load(model, device, dtype)
    record = evaluation_record(name, loaded, suite, masks, strict=strict, settings=settings, patched=patched)
    print_results(record)
    if out is not None:
        print_files(written(out, lambda folder: write_report(record, folder)))


def _named(paths: Sequence[Path]) -> dict[str, fastprune.PruneMask]:
    """The masks by the names of their files without ending, which is what the report calls them."""
    names = [path.stem for path in paths]
    for name, path in zip(names, paths, strict=True):
        if name == "none":
            raise ArgumentError(f'mask: "none" is what the report calls the unpruned model; rename {path}')
        if names.count(name) > 1:
            raise ArgumentError(
                f"mask: two of the mask files have the same name, {name}, so their rows could not be told apart"
            )
    return {name: fastprune.PruneMask.load(path) for name, path in zip(names, paths, strict=True)}


def _load(folder: Path, device: str | None, dtype: str):
    import torch

    from fastprune.checkpoint.load import load_model
    from fastprune.ops.devices import usable_device

    quiet_loading()
    names = ("auto", "float32", "bfloat16", "float16")
    if dtype not in names:
        raise ArgumentError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    place = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"), ("cpu", "cuda", "mps"))
    model = load_model(folder, dtype if dtype == "auto" else getattr(torch, dtype))
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device: {str(place)!r} cannot hold the model: {error}") from error
