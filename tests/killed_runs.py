"""Run a scoring with a journal in child processes, kill them, and run again until one ends by itself.

    python killed_runs.py CHECKPOINT JOURNAL OUT SEED random|calls

``random``: each child is killed with SIGKILL after a random time. ``calls``: the n-th child kills itself at its n-th
write, rename or flush of a file, so that every state of the files is seen. Prints, as JSON, how many children were
killed and how many lines the journal had each time. Children are forked from a process that has imported everything
and computed nothing, so that one takes less than a second.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from architectures import BENIGN, HARM

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.model import weights  # noqa: F401 - what a child would import is imported once
from fastprune.model.selfcheck import checked_view  # noqa: F401
from fastprune.scoring import hidden, journal, score  # noqa: F401

SETTINGS = {"harm": ("signed", "wanda"), "segments": 4, "progress": False}


def run(checkpoint: str, folder: str | None, out: str) -> None:
    """One uninterrupted attempt."""
    torch.set_num_threads(1)
    sets = (CalibrationSet(HARM).loader(24), CalibrationSet(BENIGN).loader(24))
    fastprune.score(checkpoint, *sets, resume=folder, **SETTINGS).save(out)


def die_at(call: int) -> None:
    """Make this process kill itself at its n-th call of what changes files for good."""
    left = [call]

    def counted(real):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapper

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    hidden.HiddenStates.put = counted(hidden.HiddenStates.put)
    hidden.HiddenStates.drop = counted(hidden.HiddenStates.drop)


def attempt(checkpoint: str, folder: str, out: str, *, call: int | None, seconds: float | None) -> bool:
    """Fork one child; whether it ended by itself."""
    child = os.fork()
    if child == 0:
        try:
            if call is not None:
                die_at(call)
            run(checkpoint, folder, out)
            os._exit(0)
        except BaseException as error:  # a child must not go on as a copy of this process
            print(repr(error), file=sys.stderr)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        sys.exit("a child failed")
    return os.WIFEXITED(status)


def main() -> None:
    checkpoint, folder, out, seed, how = sys.argv[1:]
    draw, lines, number = random.Random(int(seed)), [], 0
    start = time.monotonic()
    attempt(checkpoint, folder + "-timed", out + "-timed", call=None, seconds=None)
    whole = time.monotonic() - start
    while True:
        number += 1
        seconds = draw.uniform(0.3, 1.1) * whole if how == "random" else None
        # Progress is slow where each child dies a little later than the one before: from 60 on let it through.
        if attempt(checkpoint, folder, out, call=number if how == "calls" and number < 60 else None, seconds=seconds):
            break
        journal_file = Path(folder) / "journal.jsonl"
        lines.append(len(journal_file.read_bytes().splitlines()) if journal_file.exists() else 0)
    print(json.dumps({"killed": number - 1, "lines": lines}))


if __name__ == "__main__":
    main()
