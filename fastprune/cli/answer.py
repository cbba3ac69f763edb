"""``fastprune answer``: what a model says, unpruned and with each mask, into a store that judges read later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    AttacksOption,
    DeviceMapOption,
    DeviceOption,
    DtypeOption,
    ModelFolder,
    PrefillTokensOption,
    SamplesOption,
    SamplingSeedOption,
    StrictOption,
    TemperatureOption,
    TopPOption,
    check_device,
    depths,
    limits,
)
from fastprune.cli.overlaps import AllowOverlapOption, check_overlaps
from fastprune.errors import ArgumentError, NotFoundError
from fastprune.evaluation.answers import KINDS
from fastprune.files import inside

if TYPE_CHECKING:
    from fastprune.calibration import Table
    from fastprune.evaluation import Answers

# Long enough for a judge to see what an answer becomes; a refusal shows earlier.
_LIMITS = dict.fromkeys(KINDS, 256) | {"refusal": 128}


def _check(
    model: Path,
    rows: Sequence[str],
    store: Path,
    device: str | None,
    device_map: str | None,
    prefill_tokens: str | None,
    max_new_tokens: Sequence[str] | None,
    **others: Any,
) -> None:
    check_device(device, device_map)
    depths(prefill_tokens)
    limits(max_new_tokens or (), KINDS)
    if not rows:
        raise ArgumentError("expected a file of rows, or KIND=FILE, got none", argument="rows")
    missing = [str(path) for _, path in map(_kind_and_path, rows) if not path.exists()]
    if missing:
        raise NotFoundError(f"expected a file of rows at {', '.join(missing)}, found none", argument="rows")
    if inside(store, model):
        raise ArgumentError(f"expected a folder of its own, got {store}, in the model's {model}", argument="store")


@command(check=_check, names={"masks": "mask"})
def answer(
    run: Run,
    model: ModelFolder,
    rows: Annotated[
        list[str],
        typer.Option(
            help="Rows to answer, in a layout of docs/data.md: FILE or harm=FILE, refusal=FILE, skill=FILE, "
            "over_refusal=FILE, explanation=FILE; repeatable. Nothing else is answered.",
            show_default=False,
        ),
    ],
    store: Annotated[
        Path,
        typer.Option(
            help="Folder of the answers. The same command goes on with it; others add to it.", show_default=False
        ),
    ],
    mask: Annotated[
        list[Path] | None, MASK, typer.Option(help="Masks to answer with, next to the unpruned model; repeatable.")
    ] = None,
    strict: StrictOption = True,
    attack: AttacksOption = None,
    prefill_tokens: PrefillTokensOption = None,
    max_new_tokens: Annotated[
        list[str] | None,
        typer.Option(
            help="Length limit of answers in tokens, or KIND=N for one kind; repeatable (default: 256, refusal=128). "
            "Answers that end there are counted."
        ),
    ] = None,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    samples: SamplesOption = 1,
    seed: SamplingSeedOption = 0,
    allow_overlap: AllowOverlapOption = None,
    columns: ColumnsOption = None,
    format: FormatOption = None,
    bos: BosOption = None,
    template_args: TemplateArgsOption = None,
    system: SystemOption = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch.")] = 64,
    forget_text: Annotated[
        bool, typer.Option("--forget-text", help="Drop the texts of answers that have been judged, and keep the rest.")
    ] = False,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Ask a model, unpruned and with each mask, and keep its answers for judges.

    Answers are kept as they come: after an interruption the same command goes on. The unpruned model answers once,
    however many masks follow. Answers may be harmful: the folder is for you alone and stays out of git, and nothing
    but numbers is printed.

    `fastprune answer MODEL --rows advbench.csv --rows skill=alpaca.json --mask mask.safetensors --store answers`
    """
    from fastprune.checkpoint.load import load_tokenizer
    from fastprune.evaluation import EvaluationSuite
    from fastprune.evaluation.attacks import attacks_of
    from fastprune.evaluation.store import forget_texts

    masks = named_masks(mask or ())
    tokenizer = load_tokenizer(model)
    known = known_encodings({name: chosen.metadata for name, chosen in masks.items()})
    encoding = encoding_of(tokenizer, model, format, bos, template_args, system, known).arguments()
    tables = _tables(run, rows, columns)
    check_overlaps(run, masks, tables, allow_overlap)
    attacks = attacks_of(map(str, attack or ("none", "prefilling")), depths(prefill_tokens))
    tokens = _LIMITS | limits(max_new_tokens or (), KINDS)
    # Without rows for it, the harmful ones would be asked.
    refusal = tokens.pop("refusal") if any(_kind_and_path(text)[0] == "refusal" for text in rows) else None
    tokens.pop("refusal", None)
    suite = EvaluationSuite(
        tokenizer,
        **_arguments(rows, tables),
        **encoding,
        attack=attacks,
        max_new_tokens=tokens,
        refusal_tokens=refusal,
        batch_size=batch_size,
    )
    answers = suite.answer(
        loaded_model(model, device, dtype, device_map),
        masks=masks,
        attacks=attacks,
        store=store,
        strict=strict,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        samples=samples,
        progress=not run.quiet,
    )
    counts = answers.counts()
    run.result({"store": store, "counts": counts}, _shown(counts))
    _warn_of_cut(run, answers)
    run.talk(f"{len(answers)} answers in {store}")
    if forget_text:
        forgotten, kept = forget_texts(store)
        run.talk(f"texts dropped: {forgotten} answers, which have been judged; {kept} keep theirs")


def _kind_and_path(text: str) -> tuple[str, Path]:
    """``"refusal=rows.csv"`` as kind and path; a file whose name only looks like that is one of harmful rows."""
    kind, equals, path = text.partition("=")
    return (kind, Path(path)) if equals and kind in KINDS else ("harm", Path(text))


def _tables(run: Run, rows: Sequence[str], columns: Sequence[str] | None) -> dict[str, Table]:
    """The rows by kind, or by kind and file where a kind has several files; in the order of the option."""
    given = [_kind_and_path(text) for text in rows]
    kinds = [kind for kind, _ in given]
    names = [f"{kind} {path.stem}" if kinds.count(kind) > 1 else kind for kind, path in given]
    if len(set(names)) < len(names):
        raise ArgumentError("expected each file once, and files of one kind by different names", argument="rows")
    return read_tables(run, dict(zip(names, (path for _, path in given), strict=True)), columns)


def _arguments(rows: Sequence[str], tables: Mapping[str, Table]) -> dict[str, Any]:
    """The rows as arguments of the suite."""
    arguments: dict[str, Any] = {}
    for (kind, path), table in zip(map(_kind_and_path, rows), tables.values(), strict=True):
        if kind == "skill":
            arguments.setdefault("skill_rows", {}).update(_skills(table, path.stem))
        else:
            arguments.setdefault(f"{kind}_rows", []).extend(table)
    return arguments


def _skills(table: Table, name: str) -> dict[str, list[Any]]:
    """Rows by their column `skill`; rows without one are of a skill that is called like their file."""
    skills: dict[str, list[Any]] = {}
    for row in table:
        skills.setdefault(str(row.extra.get("skill") or name), []).append(row)
    return skills


def _shown(counts: Sequence[Mapping[str, Any]]) -> str:
    head = ("mask", "rows", "attack", "answers", "cut", "unanswered", "tokens")
    lines = [head]
    for count in counts:
        attack = " ".join(str(value) for name, value in count["attack"].items() if name in ("name", "depth") and value)
        numbers = (count[name] for name in ("answers", "cut", "unanswered", "new_tokens"))
        lines.append((count["mask"], count["task"], attack, *map(str, numbers)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _warn_of_cut(run: Run, answers: Answers) -> None:
    cut = sum(answer.finish == "length" for answer in answers)
    if cut:
        run.talk(f"{cut} of {len(answers)} answers were cut at their limit; --max-new-tokens makes room for whole ones")
