"""The command line: ``fastprune demo | score | select | patch | plan | control | eval | organism``.

Thin: each command reads files, calls one function of the library and writes files. Results go to standard output, talk
to standard error. Errors that fastprune raises on purpose, and those of the file system (no permission, no space), are
one line on standard error; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Iterator

from fastprune.cli.processes import complain, is_first, started
from fastprune.errors import FastpruneError

_STOPPED = {128 + signal.SIGINT: "interrupted", 128 + signal.SIGTERM: "terminated"}  # the shell's exit statuses


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error that is no bug, 2 wrong usage, 130 Ctrl-C, 143 SIGTERM.

    Args:
        arguments: Words after the program's name; ``None``: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode is no reason to lose an evaluation
            stream.reconfigure(errors="replace")
    try:
        with _terminable():
            _run(arguments)
    except (FastpruneError, OSError) as error:
        complain(error)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:  # typer makes the latter of the former
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        if code in _STOPPED and is_first():
            print(f"fastprune: {_STOPPED[code]}", file=sys.stderr)
        sys.exit(code)


def _run(arguments: list[str] | None) -> None:
    from fastprune.cli.app import program

    program()(args=arguments)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM leaves every context on its way out, so that temporary files are removed; by itself it does not.

    Not where there are several processes: one that waits for another in a collective would not hear of it.
    """

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    plain = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a caller that ignores or handles it has a reason
    # Only the main thread may set handlers.
    if not plain or started() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
