"""``fastprune generate``: a model's own replies to prompts, as rows to score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fastprune.cli.app import pasted
from fastprune.cli.columns import ColumnsOption, read_tables
from fastprune.cli.encoding import BosOption, FormatOption, SystemOption, TemplateArgsOption, encoding_of
from fastprune.cli.frame import Run, command
from fastprune.cli.models import loaded_model
from fastprune.cli.options import (
    ROWS,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelFolder,
    SamplesOption,
    SamplingSeedOption,
    TemperatureOption,
    TopPOption,
    check_device,
)
from fastprune.cli.outputs import OutputFile


@command(check=check_device, names={"rows": "prompts"})
def generate(
    run: Run,
    model: ModelFolder,
    prompts: Annotated[
        Path,
        ROWS,
        typer.Argument(help="Prompts, in a layout of docs/data.md; replies are not needed.", show_default=False),
    ],
    out: Annotated[Path, OutputFile("rows"), typer.Option(help="File to write the rows to.")] = Path("rows.jsonl"),
    prefill: Annotated[
        str | None,
        typer.Option(
            help="Start of every reply, not scored later (default: the column `prefill`; --columns prefill=NAME takes "
            "another one)."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of replies in tokens.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    samples: SamplesOption = 1,
    seed: SamplingSeedOption = 0,
    keep_refusals: Annotated[
        bool, typer.Option("--keep-refusals", help="Keep replies that refuse, by keywords.")
    ] = False,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    bos: BosOption = None,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows in a batch (default: up to 64, fewer where they are long).")
    ] = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Let a model reply to prompts, and keep its replies as rows for `score`.

    Replies that refuse are left out and counted, and those that end at the limit say so in the column `finish`. After
    an interruption the same command goes on. The rows may be harmful: the file is for you alone, beside it stands one
    with settings and counts, and nothing but numbers is printed.

    `fastprune generate MODEL advbench.csv --columns prompt=goal,prefill=target --out harm.jsonl`
    """
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.evaluation.decoding import Sampling
    from fastprune.evaluation.generated_rows import generated, left_out_text

    tokenizer = load_tokenizer(model)
    encoding = encoding_of(tokenizer, model, format, bos, template_args, system).arguments()
    table = read_tables(run, {"prompts": prompts}, columns)["prompts"]
    sampling = Sampling(temperature, top_p)
    made = generated(
        loaded_model(model, device, dtype, device_map),
        tokenizer,
        table,
        encoding=encoding,
        prefill=prefill,
        max_new_tokens=max_new_tokens,
        samples=samples,
        sampling=sampling,
        seed=seed,
        keep_refusals=keep_refusals,
        batch_size=batch_size,
        out=out,
        overwrite=run.force,
        progress=not run.quiet,
    )
    run.result({"rows": out, **made.counts}, _summary(made.counts, out))
    if left_out := left_out_text(made.counts):
        run.talk(left_out)
    following = pasted("score", model, "--harm", out, "--format", encoding["format"])
    run.talk(f"next: {following} …, or with it as --benign")


def _summary(counts: Mapping[str, Any], out: Path) -> str:
    mean = counts["new_tokens"] / counts["asked"]
    cut = f", {counts['cut']} of them cut at their limit" if counts["cut"] else ""
    return f"{counts['kept']} rows in {out}{cut}; {mean:.0f} tokens a reply"
