"""``fastprune score``: one pass over a model with the rows of two sets, to a file of scores."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastprune
from fastprune.cli.app import pasted
from fastprune.cli.columns import ColumnsOption, read_tables
from fastprune.cli.encoding import (
    BosOption,
    FinishOption,
    FormatOption,
    SystemOption,
    TemplateArgsOption,
    encoding_of,
    finish_of,
)
from fastprune.cli.frame import Run, command
from fastprune.cli.inputs import Journal
from fastprune.cli.options import (
    ROWS,
    DeviceOption,
    DtypeOption,
    HostMemoryOption,
    MemoryOption,
    ModelFolder,
    OffloadOption,
    SegmentsOption,
    check_device,
    listed,
)
from fastprune.cli.outputs import OutputFile, check_room, written
from fastprune.cli.processes import is_first, note
from fastprune.errors import FastpruneError

if TYPE_CHECKING:
    from fastprune.calibration import CalibrationSet
    from fastprune.scoring.scores import Scores


@command(shared=True, check=check_device, names={"harm": "harm_criterion", "benign": "benign_criterion"})
def score(
    run: Run,
    model: ModelFolder,
    harm: Annotated[Path, ROWS, typer.Option(help="Rows of the behavior to remove, in a layout of docs/data.md.")],
    benign: Annotated[Path | None, ROWS, typer.Option(help="Rows of the behavior to keep.")] = None,
    out: Annotated[Path, OutputFile("scores"), typer.Option(help="File to write the scores to.")] = Path(
        "scores.safetensors"
    ),
    columns: ColumnsOption = None,
    format: FormatOption = None,
    bos: BosOption = None,
    finish: FinishOption = None,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    harm_criterion: Annotated[str, typer.Option(help="One or several criteria, separated by commas.")] = "signed",
    benign_criterion: Annotated[str, typer.Option(help="One or several criteria, separated by commas.")] = "abs",
    p_max: Annotated[float, typer.Option(help="Largest p that `select` can ask for.")] = 1e-3,
    q_max: Annotated[float, typer.Option(help="Largest q that `select` can ask for.")] = 1e-3,
    max_length: Annotated[int | None, typer.Option(help="Leave out rows of more tokens; no row is ever cut.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a micro-batch.")] = 4096,
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    segments: SegmentsOption = None,
    offload: OffloadOption = None,
    resume: Annotated[
        Path | None,
        Journal(),
        typer.Option(help="Folder of a journal. After an interruption, the same command continues from it."),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    forget_text: Annotated[
        bool,
        typer.Option(
            "--forget-text", help="Drop the texts of rows that `generate` wrote, once the scores are written."
        ),
    ] = False,
) -> None:
    """Score every weight for harm and for benign use, in one pass over both sets.

    Weights are read from the folder as they are needed, twice in all, so the model may be larger than memory:
    `fastprune plan` says what a pass takes.

    Several processes share the examples, on one node or more. Rank 0 writes the file:

    `torchrun --nproc-per-node=8 -m fastprune score MODEL --harm harm.jsonl --benign benign.jsonl`

    After an interruption, the same command with the same `--resume` folder continues; the result is bit-identical.
    Remove the folder when the scores are written.
    """
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.ops.devices import usable_device

    with _noting((KeyboardInterrupt, SystemExit), resume, "{again} goes on from here"):
        if device is not None:
            usable_device(device)  # before the rows are read
        tokenizer = load_tokenizer(model)
        encoding = encoding_of(tokenizer, model, format, bos, template_args, system).arguments()
        finishes = finish_of(finish)
        tables = read_tables(run, {"harm": harm, "benign": benign}, columns, references=True)
        sets = {
            role: fastprune.load_calibration(table, tokenizer, max_length=max_length, finish=finishes[role], **encoding)
            for role, table in tables.items()
        }
        criteria = {"harm": listed(harm_criterion), "benign": listed(benign_criterion)}
        if is_first():
            _show_sets(run, sets)
            limits = {"harm": q_max, "benign": p_max}
            check_room(out, model, [limits[role] for role in sets for _ in criteria[role]])
        scores = fastprune.score(
            model,
            sets["harm"].loader(batch_tokens),
            sets["benign"].loader(batch_tokens) if "benign" in sets else None,
            harm=criteria["harm"],
            benign=criteria["benign"],
            p_max=p_max,
            q_max=q_max,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            offload=None if offload is None else offload.value,
            resume=resume,
            device=device,
            dtype=dtype,
            progress=not run.quiet,
        )
        if is_first():
            with _noting(
                (FastpruneError, OSError),
                resume,
                "the scores are in the journal too: {again} writes them without another pass",
            ):
                written(out, scores.save)
            if forget_text:
                for path in filter(None, (harm, benign)):
                    _forget(run, path)
            run.result(_facts(scores, sets, out), str(scores))
            protect, prune = _fractions(scores)
            options = ("-q", prune) if benign is None else ("-p", protect, "-q", prune)
            run.talk(f"written to {out}\nnext: {pasted('select', out, *options)}")


@contextlib.contextmanager
def _noting(stops: tuple[type[BaseException], ...], journal: Path | None, text: str) -> Iterator[None]:
    """Say what a journal is good for when one of ``stops`` ends the block; ``{again}`` is the way to continue."""
    try:
        yield
    except stops:
        if journal is not None:
            note(text.format(again=f"the same command, with --resume {shlex.quote(str(journal))},"))
        raise


def _show_sets(run: Run, sets: Mapping[str, CalibrationSet]) -> None:
    """How many rows count, and how many of them have the context that a prefilling attack would give."""
    from fastprune.calibration.refusals import MOSTLY

    for role, examples in sets.items():
        run.talk(f"{role}: {len(examples)} rows, {examples.prefilled} of them with a prefill")
    harm = sets["harm"]
    if (refusals := harm.refusals or 0.0) > MOSTLY:
        note(
            f"{refusals * len(harm):.0f} of the {len(harm)} harm replies are refusals; a mask of what the model "
            "refuses with can be measured in memory, and may not be written into a checkpoint"
        )


def _forget(run: Run, path: Path) -> None:
    from fastprune.calibration.generated_files import forget_texts, is_generated

    if is_generated(path):
        run.talk(f"texts dropped: {forget_texts(path)} rows of {path}")
    else:
        note(f"{path} keeps its texts: `generate` did not write it, or it was changed since")


def _facts(scores: Scores, sets: Mapping[str, CalibrationSet], out: Path) -> dict[str, Any]:
    return {
        "scores": out,
        "matrices": len(scores.shapes),
        "weights": sum(map(math.prod, scores.shapes.values())),
        "criteria": scores.criteria,
        "kept": {role: sum(map(len, scores.of(role).values())) for role in sets},
        "sets": {role: {"rows": len(examples), "prefilled": examples.prefilled} for role, examples in sets.items()},
    }


def _fractions(scores: Scores) -> tuple[str, str]:
    """The paper's p and q, or the first power of ten times them at which q is a weight of the largest matrix."""
    largest = max(map(math.prod, scores.shapes.values()))
    exponent = next((digits for digits in (5, 4, 3, 2) if int(float(f"1e-{digits}") * largest) > 0), 1)
    return f"5e-{exponent}", f"1e-{exponent}"
