"""The commands and their options."""

from __future__ import annotations

import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

import fastprune
from fastprune.cli.processes import is_first, process_group, started
from fastprune.errors import ArgumentError, FastpruneWarning

app = typer.Typer(
    name="fastprune",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="""Find the few weights that a language model needs for one behaviour, remove them, and measure what stays.

    Start with `fastprune demo`. With a model of your own, a folder on disk:

    1. `fastprune score MODEL --harm harm.jsonl --benign benign.jsonl --out scores.safetensors`

    2. `fastprune select scores.safetensors -p 5e-5 -q 1e-5 --out mask.safetensors`

    3. `fastprune eval MODEL --mask mask.safetensors --harm held_out.jsonl --skills skills.jsonl`

    4. `fastprune patch MODEL mask.safetensors --out PRUNED_MODEL`
    """,
)
organism_app = typer.Typer(no_args_is_help=True, help="The synthetic model organism: data files and retraining.")
app.add_typer(organism_app, name="organism")


class Format(StrEnum):
    """How rows become tokens."""

    raw = "raw"
    chat = "chat"


class Scope(StrEnum):
    """Where the best-scored weights are counted."""

    matrix = "matrix"
    all = "global"


class Boundaries(StrEnum):
    """Where hidden states between segments lie."""

    device = "device"
    host = "host"
    disk = "disk"


class AttackName(StrEnum):
    """Attacks that bear on harm during an evaluation."""

    none = "none"
    prefilling = "prefilling"


class HarmJudge(StrEnum):
    """Who decides that an answer is harmful."""

    exact = "exact"
    not_refused = "not-refused"


ModelFolder = Annotated[
    Path, typer.Argument(help="Checkpoint folder (config, safetensors, tokenizer).", show_default=False)
]
MemoryOption = Annotated[
    str | None, typer.Option(help="Budget on the model's device, such as 80GiB, of each process; decides the segments.")
]
HostMemoryOption = Annotated[
    str | None, typer.Option(help="Budget in host memory beside a GPU, such as 128GiB, of each process.")
]
SegmentsOption = Annotated[
    int | None,
    typer.Option(
        help="Cut the blocks into so many runs, 1 to all: more take less memory, and up to a third more time."
    ),
]
BoundariesOption = Annotated[
    Boundaries | None,
    typer.Option(help="Where hidden states between segments lie; by default the first that has room."),
]
FormatOption = Annotated[Format, typer.Option(help="raw: prompt, line break, reply. chat: the tokenizer's template.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fastprune {fastprune.__version__}")
        raise typer.Exit
    if started() > 1 and context.invoked_subcommand != "score":
        raise ArgumentError(
            f"{context.invoked_subcommand}: runs in one process, and {started()} were started; only score shares its "
            "work between several"
        )
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *rest: object) -> None:
    """One line, without the place in the library's code that a warning otherwise shows; once, not once a process."""
    if is_first():
        kind = "note" if issubclass(category, FastpruneWarning) else category.__name__
        typer.echo(f"fastprune: {kind}: {message}", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report, pictures and artifacts.")] = Path("demo"),
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder of `organism train`; the shipped checkpoints by default.")
    ] = None,
    q: Annotated[float, typer.Option("-q", help="Harm fraction of each matrix.")] = 3e-3,
    p: Annotated[float, typer.Option("-p", help="Protected fraction of each matrix.")] = 5e-2,
    seed: Annotated[int, typer.Option(help="Of the drawn rows and the random mask.")] = 0,
) -> None:
    """See the effect and its controls on a tiny model that was really trained (about a minute)."""
    from fastprune.experiments import DemoSettings, run_demo
    from fastprune.reporting import print_results, write_report

    _quiet_loading()
    settings = DemoSettings(p=p, q=q, seed=seed, checkpoints=checkpoints)
    out.mkdir(parents=True, exist_ok=True)
    result = run_demo(out / "data", settings)
    files = write_report(result.record, out)
    files["scores"] = result.scores.save(out / "scores.safetensors")
    files["mask"] = result.mask.save(out / "mask.safetensors")
    print_results(result.record, files=files)
    typer.echo(f"\nOpen {out / 'report.html'} in a browser. The rows that went in are in {out / 'data'}.")


@app.command()
def score(
    model: ModelFolder,
    harm: Annotated[
        Path, typer.Option(help="Rows of the behaviour to remove: CSV or JSONL with prompt, response[, prefill].")
    ],
    benign: Annotated[Path | None, typer.Option(help="Rows of the behaviour to keep.")] = None,
    out: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("scores.safetensors"),
    format: FormatOption = Format.raw,
    harm_criterion: Annotated[str, typer.Option(help="One or several, separated by commas.")] = "signed",
    benign_criterion: Annotated[str, typer.Option(help="One or several, separated by commas.")] = "abs",
    p_max: Annotated[float, typer.Option(help="Largest p that `select` can ask for.")] = 1e-3,
    q_max: Annotated[float, typer.Option(help="Largest q that `select` can ask for.")] = 1e-3,
    max_length: Annotated[int | None, typer.Option(help="Leave out longer rows (tokens); nothing is ever cut.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens of a micro-batch.")] = 4096,
    memory: MemoryOption = None,
    host_memory: HostMemoryOption = None,
    segments: SegmentsOption = None,
    boundaries: BoundariesOption = None,
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
    from fastprune.model.checkpoint import load_tokenizer

    with process_group(device):
        if is_first():
            _writable(out)
        tokenizer = load_tokenizer(model)
        sets = [
            None
            if path is None
            else fastprune.load_calibration(path, tokenizer, format=format.value, max_length=max_length)
            for path in (harm, benign)
        ]
        scores = fastprune.score(
            model,
            *(None if group is None else group.loader(batch_tokens) for group in sets),
            harm=tuple(harm_criterion.split(",")),
            benign=tuple(benign_criterion.split(",")),
            p_max=p_max,
            q_max=q_max,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            boundaries=boundaries and boundaries.value,
            resume=resume,
            device=device,
            dtype=dtype,
        )
        if is_first():
            typer.echo(f"{scores}\nwritten to {scores.save(out)}\nnext: fastprune select {out} -p 5e-5 -q 1e-5")


@app.command()
def select(
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
    """Choose weights: the best by harm score without the best by benign score."""
    mask = fastprune.Scores.load(scores).select(
        p,
        q,
        harm=harm_criterion,
        benign=benign_criterion,
        scope=scope.value,
        layers=None if layers is None else _blocks(layers),
        slice=slice,
        protect=tuple(fastprune.PruneMask.load(path) for path in protect or ()),
    )
    typer.echo(f"{mask}\nwritten to {mask.save(out)}\nnext: fastprune patch MODEL {out} --out PRUNED_MODEL")


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
    scale: Annotated[float | None, typer.Option(help="Factor on the masked weights.", show_default="0")] = None,
) -> None:
    """Write a mask into a checkpoint, or into a copy of it, shard by shard; or take it out again.

    A patched folder holds `fastprune.undo` with the original values, so --undo needs nothing else. A patch in place
    that was killed half way is undone the same way.
    """
    _check_patch_options(mask, out, in_place, backup, undo, scale)
    if undo:
        fastprune.undo_patch(model)
        typer.echo(f"{model} has its original weights again")
        return
    chosen, factor = fastprune.PruneMask.load(mask), scale or 0.0
    if in_place:
        fastprune.patch_in_place(model, chosen, backup=backup, scale=factor)
    else:
        fastprune.patch_checkpoint(model, chosen, out, scale=factor)
    done = "zeroed" if factor == 0 else f"scaled by {factor:g}"
    target = model if in_place else out
    typer.echo(f"{chosen.total:,} weights {done}; pruned model in {target}\nundo: fastprune patch --undo {target}")


def _check_patch_options(
    mask: Path | None, out: Path | None, in_place: bool, backup: bool, undo: bool, scale: float | None
) -> None:
    given = [name for name, value in (("--out", out), ("--in-place", in_place), ("--undo", undo)) if value]
    if len(given) != 1:
        came = " and ".join(given) or "none of them"
        raise ArgumentError(f"patch: expected one of --out DIR, --in-place and --undo, got {came}")
    if undo and (mask is not None or scale is not None):
        raise ArgumentError("patch: --undo takes neither a MASK nor --scale; what to put back is in the folder")
    if not undo and mask is None:
        raise ArgumentError(f"patch: {given[0]} expects a MASK after the model, got none")
    if backup and not in_place:
        raise ArgumentError(f"patch: --backup goes with --in-place only, got {given[0]}")


@app.command(name="eval")
def evaluate(
    model: ModelFolder,
    harm: Annotated[
        Path | None, typer.Option(help="Held-out harmful rows (prompt, response[, prefill, category]).")
    ] = None,
    skills: Annotated[Path | None, typer.Option(help="Benign rows with a column `skill`.")] = None,
    recognition: Annotated[Path | None, typer.Option(help="Yes/no rows: is this request harmful?")] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(help="Masks to measure beside the unpruned model; repeatable.")
    ] = None,
    attack: Annotated[AttackName, typer.Option(help="Attack behind the harm rate.")] = AttackName.prefilling,
    judge: Annotated[
        HarmJudge, typer.Option(help="exact: the reference answer. not-refused: no refusal phrase (misleading alone).")
    ] = HarmJudge.exact,
    neighbour: Annotated[str | None, typer.Option(help="The skill closest to harm in form.")] = None,
    format: FormatOption = Format.raw,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Length of answers; the reference's and one more by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows that go through the model together.")] = 64,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu; a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for report.html and record.json.")] = None,
) -> None:
    """Measure harm, refusal, skills and recognition, unpruned and with each mask."""
    from fastprune.evaluation import EvaluationSuite, exact_match, keyword_refusal
    from fastprune.experiments.btap import measure_controls
    from fastprune.experiments.demo import environment
    from fastprune.model.checkpoint import load_tokenizer
    from fastprune.reporting import print_results, write_report

    refused = keyword_refusal()
    judges = {"harm": exact_match if judge is HarmJudge.exact else lambda row, text: 1.0 - refused(row, text)}
    suite = EvaluationSuite(
        load_tokenizer(model),
        harm_rows=harm,
        skill_rows=skills,
        recognition_rows=recognition,
        format=format.value,
        attack=attack.value,
        judges=judges if harm is not None else None,
        neighbour_skill=neighbour,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    masks = {path.stem: fastprune.PruneMask.load(path) for path in mask or ()}
    if len(masks) < len(mask or ()):
        raise ArgumentError("mask: two of the mask files have the same name, so their rows could not be told apart")
    results, by_skill = measure_controls(model.name, _load(model, device, dtype), suite, masks)
    record = {
        "schema": 1,
        "title": f"Evaluation of {model.name}",
        "environment": environment(),
        "settings": {"attack": attack.value, "judge": judge.value, "format": format.value},
        "results": results,
        "skills": by_skill,
    }
    print_results(record, files=write_report(record, out) if out is not None else None)


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
    boundaries: BoundariesOption = None,
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
    from fastprune.model.checkpoint import load_config

    typer.echo(
        fastprune.plan(
            load_config(model),
            examples,
            tokens,
            memory=memory,
            host_memory=host_memory,
            segments=segments,
            boundaries=boundaries and boundaries.value,
            flops_per_second=None if tflops is None else tflops * 1e12,
            read_bytes_per_second=None if read_gbps is None else read_gbps * 1e9,
        )
    )


@organism_app.command("train")
def organism_train(
    out: Annotated[Path, typer.Option(help="Folder for base, sft and aligned.")],
    seed: Annotated[int, typer.Option(help="Of initialisation and data.")] = 1,
) -> None:
    """Train base, SFT control and aligned model from scratch (a few minutes on two cores)."""
    from fastprune.organism import train_organism

    train_organism(seed, out)
    typer.echo(f"written to {out}\nnext: fastprune demo --checkpoints {out}")


@organism_app.command("export")
def organism_export(
    out: Annotated[Path, typer.Option(help="Folder for the files.")],
    seed: Annotated[int, typer.Option(help="Of the drawn rows.")] = 0,
) -> None:
    """Write the organism's calibration and evaluation rows as JSONL, to try the other commands on."""
    from fastprune.organism import checkpoint_path, export_data

    for name, path in export_data(out, seed=seed).items():
        typer.echo(f"{name:>18}  {path}")
    model = checkpoint_path("aligned")
    typer.echo(f"{'model':>18}  {model}")


def _load(folder: Path, device: str | None, dtype: str):
    import torch

    from fastprune.model.checkpoint import load_model

    _quiet_loading()
    names = ("auto", "float32", "bfloat16", "float16")
    if dtype not in names:
        raise ArgumentError(f"dtype: expected one of {', '.join(names)}, got {dtype!r}")
    model = load_model(folder, dtype if dtype == "auto" else getattr(torch, dtype))
    try:
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(f"device: {device!r} cannot hold the model: {error}") from error


def _quiet_loading() -> None:
    """Silence transformers' own bar for loading weights, which it draws even where there is no terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _writable(path: Path) -> None:
    """Refuse an impossible output before hours of work, not after."""
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ArgumentError(f"out: expected a file in a folder that can be written to, got {path}")


def _blocks(text: str) -> list[int]:
    """``"0-2,5"`` as ``[0, 1, 2, 5]``."""
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"layers: expected block numbers such as 0-11,14, got {text!r}")
        chosen += range(int(first), int(last if dash else first) + 1)
    return chosen
