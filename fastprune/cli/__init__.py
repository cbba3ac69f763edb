"""The command line: ``fastprune demo | score | select | patch | plan | control | eval | organism``.

Thin: each command reads files, calls one function of the library and writes files. Errors that fastprune raises on
purpose, and those of the file system (no permission, no space), are one line on standard error; anything else is a bug
and shows its traceback.
"""

from __future__ import annotations

import importlib
import io
import sys

from fastprune.errors import FastpruneError, require


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error that is no bug, 2 wrong usage, 130 Ctrl-C.

    Args:
        arguments: Words after the program's name; ``None``: those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode is no reason to lose an evaluation
            stream.reconfigure(errors="replace")
    try:
        require("typer", "cli")
        require("rich", "cli")
        for commands in ("organism", "pruning", "measuring"):  # which register themselves; the order of the help
            importlib.import_module(f"fastprune.cli.{commands}")
        from fastprune.cli.app import app

        app(args=arguments)
    except (FastpruneError, OSError) as error:
        print(f"fastprune: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("fastprune: interrupted", file=sys.stderr)
        sys.exit(130)
