"""Options that several commands share, and the values they take."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from fastprune.cli.inputs import InputPath
from fastprune.errors import ArgumentError
from fastprune.evaluation.attacks import ATTACKS
from fastprune.evaluation.judges import JUDGES


class Scope(StrEnum):
    """Where the best-scored weights are counted."""

    matrix = "matrix"
    all = "global"


class Offload(StrEnum):
    """Where hidden states between segments lie."""

    device = "device"
    host = "host"
    disk = "disk"


class Control(StrEnum):
    """Masks that are chosen without looking at any behavior."""

    random = "random"
    matched = "matched"
    largest = "largest"


if TYPE_CHECKING:
    AttackName: TypeAlias = str
    JudgeName: TypeAlias = str
else:  # typer offers the members of an enum as choices
    AttackName = StrEnum("AttackName", {name: name for name in ATTACKS})
    JudgeName = StrEnum("JudgeName", {name: name for name in JUDGES})

JudgeOption = Annotated[
    JudgeName,
    typer.Option(help=f"Judge of harm. {'. '.join(f'{name}: {kind.summary}' for name, kind in JUDGES.items())}."),
]


_ATTACKS = ". ".join(f"{name}: {kind.summary}" for name, kind in ATTACKS.items())
AttacksOption = Annotated[
    list[AttackName] | None,
    typer.Option(help=f"Attacks on the harmful rows; repeatable (default: none and prefilling). {_ATTACKS}."),
]
MainAttacksOption = Annotated[
    list[AttackName] | None,
    typer.Option(
        help="Attacks behind the harm rate; repeatable, and the first is that of the main table (default: prefilling). "
        f"{_ATTACKS}."
    ),
]
PrefillTokensOption = Annotated[
    str | None,
    typer.Option(
        help="Depths of prefilling to compare, e.g. row,10,20,40. row: the row's own prefill. A number: so many tokens "
        "of the reference reply, prefill and response."
    ),
]
TemperatureOption = Annotated[
    float, typer.Option(help="0: always the best token. Above: draw from the probabilities at this temperature.")
]
TopPOption = Annotated[float, typer.Option(help="Draw from the best tokens that hold this share of the probability.")]
SamplesOption = Annotated[int, typer.Option(help="Answers to each row, above temperature 0.")]
SamplingSeedOption = Annotated[int, typer.Option(help="Seed of what is drawn.")]

# What torch calls devices of machines that exist. Those that cannot serve are refused with the reason, by torch.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla", "meta")

CHECKPOINT = InputPath("checkpoint folder", holds="config.json")
ROWS = InputPath("file of rows")
MASK = InputPath("mask file")

ModelFolder = Annotated[
    Path,
    CHECKPOINT,
    typer.Argument(help="Checkpoint folder (config, safetensors, tokenizer).", show_default=False),
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Device memory budget per process, e.g. 80GiB (sets the number of segments)."),
]
HostMemoryOption = Annotated[
    str | None, typer.Option(help="Host memory budget per process when the device is a GPU, e.g. 128GiB.")
]
SegmentsOption = Annotated[
    int | None,
    typer.Option(
        help="Number of segments, from 1 to the number of decoder blocks. More segments take less memory and up to a "
        "third more time."
    ),
]
OffloadOption = Annotated[
    Offload | None,
    typer.Option(help="Where to keep hidden states between segments (default: the first that has room)."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict/--no-strict", help="Refuse a mask that was made for a model with other weights.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cuda, cuda:1 or cpu (default: cuda if available).")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over all GPUs of this machine, instead of --device: auto, balanced, balanced_low_0 or "
        "sequential, as accelerate calls them (extra `accelerate`)."
    ),
]
DtypeOption = Annotated[str, typer.Option(help="Dtype of the weights: auto (as stored), float32, bfloat16 or float16.")]


def check_device(device: str | None = None, device_map: str | None = None, **others: Any) -> None:
    """Refuse a device of a kind that does not exist, before torch is loaded to say so.

    Raises:
        ArgumentError: There is no such kind, or a map is given as well.
    """
    if device is not None and device_map is not None:
        raise ArgumentError(f"expected --device or --device-map, got both ({device}, {device_map})", argument="device")
    if device is not None and device.partition(":")[0] not in _DEVICES:
        raise ArgumentError(f"{device!r} cannot be used: expected cpu, cuda or one such as cuda:1", argument="device")


def listed(text: str) -> tuple[str, ...]:
    """``"signed, abs"`` as ``("signed", "abs")``."""
    return tuple(name.strip() for name in text.split(","))


def blocks(text: str) -> list[int]:
    """``"0-2,5"`` as ``[0, 1, 2, 5]``.

    Raises:
        ArgumentError: It is no such list.
    """
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ArgumentError(f"expected block numbers such as 0-11,14, got {text!r}", argument="layers")
        numbers = range(int(first), int(last if dash else first) + 1)
        if not numbers:
            raise ArgumentError(
                f"expected the lower block of a range first, such as 0-11, got {part.strip()!r}", argument="layers"
            )
        chosen += numbers
    return chosen


def depths(text: str | None) -> list[int | str] | None:
    """``"row,10"`` as ``["row", 10]``.

    Raises:
        ArgumentError: It is no such list.
    """
    if text is None:
        return None
    chosen: list[int | str] = []
    for part in map(str.strip, text.split(",")):
        if part != "row" and (not part.isdecimal() or int(part) == 0):
            raise ArgumentError(
                f"expected row, numbers of tokens, or both, such as row,10,20, got {text!r}", argument="prefill_tokens"
            )
        chosen.append(part if part == "row" else int(part))
    return chosen


def limits(given: Sequence[str], kinds: Sequence[str], argument: str = "max_new_tokens") -> dict[str, int]:
    """``["256", "refusal=64"]`` as a limit for each kind of rows that has one; one that is named wins.

    Raises:
        ArgumentError: It is no such list.
    """
    every: dict[str, int] = {}
    named: dict[str, int] = {}
    for text in given:
        kind, equals, number = text.rpartition("=")
        if not number.strip().isdecimal() or int(number) == 0 or (equals and kind not in kinds):
            raise ArgumentError(
                f"expected a number of tokens, or KIND=NUMBER with {', '.join(kinds)} for the kind, got {text!r}",
                argument=argument,
            )
        if equals:
            named[kind] = int(number)
        else:
            every = dict.fromkeys(kinds, int(number))
    return every | named
