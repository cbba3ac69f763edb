"""The command line inside the process of a test."""

from __future__ import annotations

import pytest

from fastprune.cli import main


def run(*words: object) -> int:
    """The exit status of one command."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code or 0
