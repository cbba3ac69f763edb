"""``fastprune eval``: what a model can do, unpruned and with each mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastprune.cli.columns import ColumnsOption, read_tables
from fastprune.cli.encoding import (
    BosOption,
    FormatOption,
    SystemOption,
    TemplateArgsOption,
    encoding_of,
    known_encodings,
)
from fastprune.cli.frame import Run, command
from fastprune.cli.models import loaded_model, named_masks
from fastprune.cli.options import (
    MASK,
    ROWS,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    JudgeOption,
    MainAttacksOption,
    ModelFolder,
    PrefillTokensOption,
    StrictOption,
    check_device,
    depths,
    limits,
)
from fastprune.cli.outputs import OutputFolder, check_report, written
from fastprune.cli.overlaps import AllowOverlapOption, check_overlaps
from fastprune.errors import ArgumentError

_REFUSAL_TOKENS = 128  # as in fastprune.evaluation.metrics, which loads torch


def _refusal_tokens(text: str) -> int | None:
    """``"128"`` as a number, ``"off"`` as ``None``.

    Raises:
        ArgumentError: It is neither.
    """
    if text == "off":
        return None
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentError(f"expected a number of tokens, or off, got {text!r}", argument="refusal_tokens")
    return int(text)


def _check_options(
    harm: Path | None, skills: Path | None, recognition: Path | None, device: str | None, **others: Any
) -> None:
    check_device(device, others["device_map"])
    depths(others["prefill_tokens"])
    limits(others["max_new_tokens"] or (), ("harm", "skill"))
    _refusal_tokens(others["refusal_tokens"])
    if harm is None and skills is None and recognition is None:
        raise ArgumentError("nothing to evaluate: give --harm, --skills or --recognition")


@command(
    check=_check_options,
    names={
        "harm_rows": "harm",
        "skill_rows": "skills",
        "recognition_rows": "recognition",
        "masks": "mask",
        "judges": "judge",
        "neighbour_skill": "neighbour",
        "out_dir": "out",
    },
)
def evaluate(
    run: Run,
    model: ModelFolder,
    harm: Annotated[Path | None, ROWS, typer.Option(help="Held-out harmful rows, in a layout of docs/data.md.")] = None,
    skills: Annotated[Path | None, ROWS, typer.Option(help="Benign rows with a column `skill`.")] = None,
    recognition: Annotated[Path | None, ROWS, typer.Option(help="Yes/no rows: is this request harmful?")] = None,
    mask: Annotated[
        list[Path] | None, MASK, typer.Option(help="Masks to measure, next to the unpruned model; repeatable.")
    ] = None,
    strict: StrictOption = True,
    attack: MainAttacksOption = None,
    prefill_tokens: PrefillTokensOption = None,
    judge: JudgeOption = "exact",
    neighbour: Annotated[str | None, typer.Option(help="The skill closest to harm in form.")] = None,
    allow_overlap: AllowOverlapOption = None,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    bos: BosOption = None,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    max_new_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Length limit of answers in tokens, or harm=N or skill=N; repeatable (default: that of the reference "
            "plus one)."
        ),
    ] = None,
    refusal_tokens: Annotated[
        str, typer.Option(help="Length limit of answers to direct requests, or off: refusal is not measured.")
    ] = str(_REFUSAL_TOKENS),
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = 64,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
    out: Annotated[
        Path | None, OutputFolder(check_report), typer.Option(help="Folder for report.html and record.json.")
    ] = None,
) -> None:
    """Measure harm, refusal, skills and recognition, unpruned and with each mask.

    Rows are encoded as those behind the masks were, unless the options say otherwise.
    """
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.evaluation import JUDGES, EvaluationSuite
    from fastprune.evaluation.attacks import attacks_of
    from fastprune.experiments import evaluation_record, stored_patch
    from fastprune.reporting import print_results, write_report

    masks, patched = named_masks(mask or ()), stored_patch(model)
    tokenizer = load_tokenizer(model)
    known = known_encodings({name: chosen.metadata for name, chosen in masks.items()})
    tables = read_tables(run, {"harm": harm, "skills": skills, "recognition": recognition}, columns)
    overlapping = check_overlaps(run, masks, tables, allow_overlap)
    suite = EvaluationSuite(
        tokenizer,
        harm_rows=tables.get("harm"),
        skill_rows=tables.get("skills"),
        recognition_rows=tables.get("recognition"),
        **encoding_of(tokenizer, model, format, bos, template_args, system, known).arguments(),
        attack=attacks_of(map(str, attack or ("prefilling",)), depths(prefill_tokens)),
        judges={"harm": JUDGES[judge].judge} if harm is not None else None,
        neighbour_skill=neighbour,
        max_new_tokens=limits(max_new_tokens or (), ("harm", "skill")),
        refusal_tokens=_refusal_tokens(refusal_tokens),
        batch_size=batch_size,
    )
    settings = {
        "judge": str(judge),
        **suite.encoder.facts,
        "neighbour": neighbour,
        "batch_size": batch_size,
        **({"overlap": overlapping} if overlapping else {}),
    }
    # resolved, because "." has no name
    name = model.resolve().name
    loaded = loaded_model(model, device, dtype, device_map)
    record = evaluation_record(name, loaded, suite, masks, strict=strict, settings=settings, patched=patched)
    run.result(record, lambda: print_results(record))
    if out is not None:
        run.files(written(out, lambda folder: write_report(record, folder)))
