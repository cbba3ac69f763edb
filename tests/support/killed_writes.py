"""Kill a process at its n-th write, for every n, and look at what another one makes of what is left."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def killed_at(work: Callable[[], object], call: int) -> bool:
    """Run ``work`` in a forked child that dies in its n-th write or rename, half of a line written; whether it died.

    The tests' process must have computed nothing with several threads before: those do not survive a fork.
    """
    child = os.fork()
    if child == 0:
        try:
            _die_in(call)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed by itself"
    return False


def _die_in(call: int) -> None:
    left = [call]

    def dies() -> bool:
        left[0] -= 1
        return left[0] == 0

    write, replace = os.write, Path.replace

    def half_written(handle: int, data: bytes) -> int:
        if dies():
            write(handle, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)

    def not_renamed(path: Path, target: Path) -> Path:
        if dies():
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    os.write, Path.replace = half_written, not_renamed  # type: ignore[assignment,method-assign]
