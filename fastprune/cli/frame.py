"""What every command has in common, so that a new one declares it in a line each.

A command is a function whose first parameter is its :class:`Run`. Its files are declared where its options are::

    @command()
    def select(
        run: Run,
        scores: Annotated[Path, InputPath("scores file"), typer.Argument(help="…")],
        out: Annotated[Path, OutputFile("mask"), typer.Option(help="…")] = Path("mask.safetensors"),
    ) -> None:

From that follow ``--json`` and ``--quiet``, ``--force`` where there is an output, the refusal of outputs that would
cost something and of inputs that are missing (before any work, and before torch is loaded), and messages that name the
command's options.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from fastprune.cli.inputs import InputPath, Journal, check_inputs, check_journal
from fastprune.cli.outputs import OutputFile, OutputFolder, output_file, output_folder
from fastprune.cli.processes import complain, is_first, note, process_group, say, started
from fastprune.cli.wording import Wording
from fastprune.errors import ArgumentError, FastpruneError, FastpruneWarning, printable

_Marker = InputPath | OutputFile | OutputFolder | Journal
_COMMON: dict[str, Any] = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print the results as one JSON document.")],
    "quiet": Annotated[bool, typer.Option("--quiet", help="Print results, warnings and errors only.")],
    "force": Annotated[bool, typer.Option("--force", help="Replace what an earlier run has written.")],
}


@dataclass(frozen=True)
class Run:
    """One run of a command: what it prints and where.

    Attributes:
        quiet: No progress and no talk.
        json: Results are a JSON document.
        force: What an earlier run has written may be replaced.
    """

    quiet: bool = False
    json: bool = False
    force: bool = False

    def talk(self, text: object) -> None:
        """What was done and what may follow, on standard error."""
        if not self.quiet and is_first():
            print(printable(text), file=sys.stderr)

    def result(self, facts: Mapping[str, Any], show: str | Callable[[], None]) -> None:
        """The result, on standard output, once a run.

        Args:
            facts: The JSON document: paths become text, numbers that are not finite become null.
            show: The same for people: text, or what prints it.
        """
        if not is_first():
            return
        if self.json:
            say(json.dumps(_plain(facts), indent=1, allow_nan=False))
        elif callable(show):
            show()
        else:
            say(show)

    def files(self, paths: Mapping[str, Path]) -> None:
        """Where the files of a report are, one a line, on standard error."""
        for name, path in paths.items():
            self.talk(f"{name:>10}  {path}")


def command(
    *,
    check: Callable[..., None] | None = None,
    shared: bool = False,
    names: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, for the table in :mod:`fastprune.cli.app`.

    Args:
        check: Takes the same arguments; refuses options that contradict each other before any file is looked at.
        shared: Whether several processes may share the work; then it runs in their process group.
        names: Arguments of the library that the command calls otherwise: argument to parameter.
    """

    def made(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        markers = {name: found for name, hint in hints.items() if (found := _marker(hint)) is not None}
        writes = any(isinstance(marker, OutputFile | OutputFolder) for marker in markers.values())
        common = {name: hint for name, hint in _COMMON.items() if name != "force" or writes}

        @functools.wraps(function)
        def invoke(context: typer.Context, **values: Any) -> None:
            asked = {name: values.pop(name) for name in common}
            run = Run(asked["quiet"], asked["as_json"], asked.get("force", False))
            options = context.command.params
            # What is refused here is called by its parameter, and what the library refuses by its argument.
            with _spoken(Wording(options)):
                _check_processes(context, shared)
                if check is not None:
                    check(**values)
                library = _spoken(Wording(options, names))
                with process_group(values.get("device")), _prepared(run, markers, values), library:
                    function(run, **values)

        parameters = _parameters(function, hints, common)
        invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return invoke

    return made


def _parameters(
    function: Callable[..., None], hints: Mapping[str, Any], common: Mapping[str, Any]
) -> list[inspect.Parameter]:
    """The parameters that typer is to see: its context instead of the run, the command's own, and the common ones."""
    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        parameters.append(parameter.replace(annotation=hints[parameter.name]))
    for name, hint in common.items():
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=False))
    return parameters


def show_warning(wording: Wording, message: Warning | str, category: type[Warning]) -> None:
    """One line, without the place in the library's code that a warning otherwise shows."""
    note(wording.text(message), "note" if issubclass(category, FastpruneWarning) else category.__name__)


@contextlib.contextmanager
def _spoken(wording: Wording) -> Iterator[None]:
    """Warnings and errors in the words of the command; an error ends it with exit status 1."""
    before = warnings.showwarning
    warnings.showwarning = lambda message, category, *rest, **more: show_warning(wording, message, category)
    try:
        yield
    except (FastpruneError, OSError) as error:
        complain(wording.text(error))
        raise typer.Exit(1) from error
    finally:
        warnings.showwarning = before


@contextlib.contextmanager
def _prepared(run: Run, markers: Mapping[str, _Marker], values: Mapping[str, Any]) -> Iterator[None]:
    """Hold the names of the outputs, and know that the inputs are there, for as long as the command runs."""
    given = [
        (name, marker, path)
        for name, marker in markers.items()
        if values[name] is not None
        for path in ([values[name]] if isinstance(values[name], Path) else values[name])
    ]
    inputs = [(name, marker, path) for name, marker, path in given if isinstance(marker, InputPath)]
    journal = next((path for _, marker, path in given if isinstance(marker, Journal)), None)
    with contextlib.ExitStack() as held:
        if journal is not None:
            check_journal(journal, inputs)
        for _, marker, path in given if is_first() else ():  # of several processes one writes
            if isinstance(marker, OutputFile):
                read = [path for _, _, path in inputs]
                held.enter_context(output_file(path, marker.kind, read, journal, force=run.force))
            elif isinstance(marker, OutputFolder):
                held.enter_context(output_folder(path))
                marker.check(path, run.force)
        check_inputs(inputs)
        yield


def _check_processes(context: typer.Context, shared: bool) -> None:
    if started() > 1 and not shared:
        name = context.command_path.partition(" ")[2]
        raise ArgumentError(
            f"{name}: runs in one process, and {started()} were started; only score shares its work between several"
        )


def _marker(hint: Any) -> _Marker | None:
    found = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((marker for marker in found if isinstance(marker, _Marker)), None)


def _plain(value: Any) -> Any:
    """JSON data."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a number of NumPy or torch
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
