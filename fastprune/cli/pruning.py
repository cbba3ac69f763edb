"""From rows to a pruned checkpoint: ``score``, ``select``, ``patch``, and ``plan``."""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fastprune
from fastprune.cli.app import app, command
from fastprune.cli.files import check_journal, check_room, output_file, written
from fastprune.cli.options import (
    Bos,
    BosOption,
    BoundariesOption,
    FinishOption,
    FormatOption,
    HostMemoryOption,
    MemoryOption,
    ModelFolder,
    Scope,
    SegmentsOption,
    StrictOption,
    SystemOption,
    TemplateArgsOption,
    finish_of,
    format_of,
    template_args_of,
)
from fastprune.cli.processes import is_first, note, process_group, say
from fastprune.errors import ArgumentError, FastpruneError

if TYPE_CHECKING:
    from fastprune.calibration import CalibrationSet


@app.command()
def score(
    context: typer.Context,
    model: ModelFolder,
    harm: Annotated[
        Path, typer.Option(help="Rows of the behaviour to remove: CSV or JSONL with prompt, response[, prefill].")
    ],
    benign: Annotated[Path | None, typer.Option(help="Rows of the behaviour to keep.")] = None,
    out: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("scores.safetensors"),
    format: FormatOption = None,
    bos: BosOption = Bos.auto,
    finish: FinishOption = None,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    harm_criterion: Annotated[str, typer.Option(help="One or several, separated by commas.")] = "signed",
    benign_criterion: Annotated[str, typer.Option(help="One or several, separated by commas.")] = "abs",
    p_max: Annotated[float, typer.Option(help="Largest p that `select` can ask for.")] = 1e-3,
    q_max: Annotated[float, typer.Option(help="Largest q that `select` can ask for.")] = 1e-3,
    max_length: Annotated[int | None, typer.Option(help="Leave out longer rows (tokens); nothing is ever cut.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a micro-batch.")] = 4096,
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    segments: SegmentsOption = None,
    offload: BoundariesOption = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a journal. Run the same command again after an interruption, and it goes on."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; a GPU if there is one.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Dtype of the weights: auto (as on disk), float32, bfloat16, float16.")
    ] = "auto",
) -> None:
    """Score every weight for harm and for benign use, in one pass over both sets.

    The model is read from its folder as it is needed, twice in all, so it may be larger than memory: `fastprune plan`
    says what a pass takes.

    Several processes share the examples, on one node or more. Rank 0 writes the file:

    `torchrun --nproc-per-node=8 -m fastprune score MODEL --harm harm.jsonl --benign benign.jsonl`

    After an interruption, the same command with the same `--resume` folder goes on where it was; the result has the
    same bits. Remove the folder when the scores are written.
    """
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.ops.devices import usable_device

    with process_group(device), _resumable(resume):
        if device is not None:
            usable_device(device)  # before the rows are read
        if is_first():
            context.with_resource(output_file(out, "scores", (harm, benign, model), resume))
            if resume is not None:
                check_journal(resume, model)
        tokenizer = load_tokenizer(model)
        encoding = {
            "format": format_of(format, model, tokenizer),
            "bos": bos.rule,
            "template_args": template_args_of(template_args),
            "system": system,
        }
        finishes = finish_of(finish)
        sets = [
            None
            if path is None
            else fastprune.load_calibration(path, tokenizer, max_length=max_length, finish=finishes[role], **encoding)
            for role, path in (("harm", harm), ("benign", benign))
        ]
        criteria = _listed(harm_criterion), _listed(benign_criterion)
        if is_first():
            _show_sets(*sets)
            fractions = [q_max] * len(criteria[0]) + [p_max] * (len(criteria[1]) if benign is not None else 0)
            check_room(out, model, fractions)
        scores = fastprune.score(
            model,
            *(None if group is None else group.loader(batch_tokens) for group in sets),
            harm=criteria[0],
            benign=criteria[1],
            p_max=p_max,
            q_max=q_max,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            offload=offload and offload.value,
            resume=resume,
            device=device,
            dtype=dtype,
        )
        if is_first():
            protect, prune = _fractions(scores)
            options = ("-q", prune) if benign is None else ("-p", protect, "-q", prune)
            with _kept(resume):
                say(f"{scores}\nwritten to {written(out, scores.save)}\nnext: {command('select', out, *options)}")


@app.command()
def select(
    context: typer.Context,
    scores: Annotated[Path, typer.Argument(help="File of `fastprune score`.", show_default=False)],
    q: Annotated[float, typer.Option("-q", help="Fraction of the best harm scores to prune, in (0, 1].")],
    p: Annotated[
        float | None, typer.Option("-p", help="Fraction of the best benign scores to protect; none by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the mask goes.")] = Path("mask.safetensors"),
    scope: Annotated[Scope, typer.Option(help="Count per matrix, or over all of them.")] = Scope.matrix,
    harm_criterion: Annotated[str | None, typer.Option(help="If several were scored.")] = None,
    benign_criterion: Annotated[str | None, typer.Option(help="If several were scored.")] = None,
    layers: Annotated[str | None, typer.Option(help="Blocks to prune in, such as 0-11,14.")] = None,
    slice: Annotated[int, typer.Option(help="0: the best q; 1: the next q, as a control.")] = 0,
    protect: Annotated[
        list[Path] | None, typer.Option(help="Masks whose weights are never pruned; repeatable.")
    ] = None,
) -> None:
    """Choose weights: the best by harm score without the best by benign score.

    The mask says where the model does what was removed, so whoever has it beside the original has both.
    """
    context.with_resource(output_file(out, "mask", (scores, *(protect or ()))))
    loaded = fastprune.Scores.load(scores)
    if p is None and not protect and loaded.criteria["benign"]:
        note("nothing is protected without -p, although the scores hold a benign set")
    mask = loaded.select(
        p,
        q,
        harm=harm_criterion,
        benign=benign_criterion,
        scope=scope.value,
        layers=None if layers is None else _blocks(layers),
        slice=slice,
        protect=tuple(fastprune.PruneMask.load(path) for path in protect or ()),
    )
    from fastprune.masking.storable import why_not_storable

    if (reason := why_not_storable(mask.metadata)) is None:
        following = command("patch", "MODEL", out, "--out", "PRUNED_MODEL")
    else:
        note(f"this mask may not be written into a checkpoint: {reason}")
        following = f"{command('eval', 'MODEL', '--mask', out)} …"
    say(f"{mask}\nwritten to {written(out, mask.save)}\nnext: {following}")


@app.command()
def patch(
    model: ModelFolder,
    mask: Annotated[
        Path | None, typer.Argument(help="File of `fastprune select`; not with --undo.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for a pruned copy; MODEL stays as it is.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the weights of MODEL itself.")] = False,
    backup: Annotated[
        bool, typer.Option("--backup", help="With --in-place: copy changed shards to <shard>.bak first.")
    ] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the mask out of MODEL again, bit by bit.")] = False,
    scale: Annotated[
        float | None, typer.Option(help="Factor on the masked weights, from 0 to 1.", show_default="0")
    ] = None,
    strict: StrictOption = True,
    no_undo: Annotated[
        bool, typer.Option("--no-undo", help="Leave no fastprune.undo: for a folder that is passed on.")
    ] = False,
) -> None:
    """Write a mask into a checkpoint, or into a copy of it, shard by shard; or take it out again.

    A patched folder holds `fastprune.undo` with the original values, so --undo needs nothing else. A patch in place
    that was killed half way is undone the same way.

    The mask and `fastprune.undo` reveal and restore what was removed: publish neither with the pruned model unless that
    is wanted. With --no-undo the folder holds no such file; in place, it is there only while weights are written.

    Masks that remove refusals stay in memory: those of `signed_reverse`, and those whose harm rows are mostly refusals.
    """
    _check_patch_options(mask, out, in_place, backup, undo, scale, strict, no_undo)
    if undo:
        fastprune.undo_patch(model)
        say(f"{model} has its original weights again")
        return
    chosen, factor = fastprune.PruneMask.load(mask), scale or 0.0
    if in_place:
        fastprune.patch_in_place(model, chosen, backup=backup, scale=factor, strict=strict, undo=not no_undo)
    else:
        fastprune.patch_checkpoint(model, chosen, out, scale=factor, strict=strict, undo=not no_undo)
    done = "zeroed" if factor == 0 else f"scaled by {factor:g}"
    target = model if in_place else out
    following = "no undo file was left" if no_undo else f"undo: {command('patch', '--undo', target)}"
    say(f"{chosen.total:,} weights {done}; pruned model in {target}\n{following}")


@app.command()
def plan(
    model: Annotated[
        Path, typer.Argument(help="Checkpoint folder, or a config.json alone: no weight is read.", show_default=False)
    ],
    examples: Annotated[int, typer.Option(help="Examples of both sets together.")] = 824,
    tokens: Annotated[int, typer.Option(help="Mean tokens of an example.")] = 250,
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    segments: SegmentsOption = None,
    offload: BoundariesOption = None,
    tflops: Annotated[
        float | None, typer.Option(help="What your device reaches in matrix products, TFLOP/s; gives the time.")
    ] = None,
    read_gbps: Annotated[
        float | None, typer.Option(help="What your disk delivers, GB/s; without it reading counts as free.")
    ] = None,
) -> None:
    """Say what a pass of `fastprune score` would take, without running it: segments, memory, work, time.

    Without `--memory` there is no limit. With `--host-memory` the device is a GPU beside the host, which takes the
    hidden states that the GPU has no room for; without it, the pass runs on a CPU.

    `fastprune plan config.json --memory 80GiB --host-memory 128GiB --tflops 600 --read-gbps 5`
    """
    from fastprune.checkpoint.load import load_config

    say(
        fastprune.plan(
            load_config(model),
            examples,
            tokens,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            offload=offload and offload.value,
            flops_per_second=None if tflops is None else tflops * 1e12,
            read_bytes_per_second=None if read_gbps is None else read_gbps * 1e9,
        )
    )


def _check_patch_options(
    mask: Path | None,
    out: Path | None,
    in_place: bool,
    backup: bool,
    undo: bool,
    scale: float | None,
    strict: bool,
    no_undo: bool,
) -> None:
    given = [name for name, value in (("--out", out), ("--in-place", in_place), ("--undo", undo)) if value]
    if len(given) != 1:
        came = " and ".join(given) or "none of them"
        raise ArgumentError(f"patch: expected one of --out DIR, --in-place and --undo, got {came}")
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


@contextlib.contextmanager
def _resumable(journal: Path | None) -> Iterator[None]:
    """Say that nothing is lost when somebody stops a run with a journal."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if journal is not None:
            note(f"the same command, with --resume {shlex.quote(str(journal))}, goes on from here")
        raise


@contextlib.contextmanager
def _kept(journal: Path | None) -> Iterator[None]:
    """Say that scores which could not be written are in the journal still."""
    try:
        yield
    except (FastpruneError, OSError):
        if journal is not None:
            note(
                f"the scores are in the journal too: the same command, with --resume {shlex.quote(str(journal))}, "
                "writes them without another pass"
            )
        raise


def _show_sets(harm: CalibrationSet, benign: CalibrationSet | None) -> None:
    """How many rows count, and how many of them have the context that a prefilling attack would give."""
    for role, examples in (("harm", harm), ("benign", benign)):
        if examples is not None:
            say(f"{role}: {len(examples)} rows, {examples.prefilled} of them with a prefill")
    from fastprune.calibration.refusals import MOSTLY

    if (harm.refusals or 0) > MOSTLY:
        note(
            f"{harm.refusals * len(harm):.0f} of the {len(harm)} harm replies are refusals; a mask of what the model "
            "refuses with can be measured in memory, and may not be written into a checkpoint"
        )


def _fractions(scores: fastprune.Scores) -> tuple[str, str]:
    """The paper's p and q, or the first power of ten times them at which q is a weight of the largest matrix."""
    largest = max(map(math.prod, scores.shapes.values()))
    exponent = next((digits for digits in (5, 4, 3, 2) if int(float(f"1e-{digits}") * largest) > 0), 1)
    return f"5e-{exponent}", f"1e-{exponent}"


def _listed(text: str) -> tuple[str, ...]:
    """``"signed, abs"`` as ``("signed", "abs")``."""
    return tuple(name.strip() for name in text.split(","))


def _blocks(text: str) -> list[int]:
    """``"0-2,5"`` as ``[0, 1, 2, 5]``."""
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"layers: expected block numbers such as 0-11,14, got {text!r}")
        blocks = range(int(first), int(last if dash else first) + 1)
        if not blocks:
            raise ArgumentError(
                f"layers: expected the lower block of a range first, such as 0-11, got {part.strip()!r}"
            )
        chosen += blocks
    return chosen
