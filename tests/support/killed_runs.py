"""Run a scoring with a journal in child processes, kill them, and run again until one ends by itself.

    python -m support.killed_runs CHECKPOINT WORK SEED random|calls

``random``: each child is killed with SIGKILL after a random time, in several rounds, each with a journal of its own.
``calls``: in round n the first child kills itself at its n-th rename or flush of a file and the second goes on from
there, until a first child has fewer of them: every state that the files can be left in is seen. Prints, as JSON, how
many children were killed, how many lines the journal had each time, and whether every round ended with the bytes of an
uninterrupted run. Children are forked from a process that has imported everything and computed nothing, so that one
takes less than a second.
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

import fastprune
from fastprune.calibration import CalibrationSet
from fastprune.checkpoint.skeleton import skeleton
from support.architectures import BENIGN, HARM

SETTINGS = {"harm": ("signed", "wanda"), "segments": 4, "progress": False}


def run(checkpoint: str, folder: str | None, out: str) -> None:
    """One uninterrupted attempt."""
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
    Path.unlink = counted(Path.unlink)


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
    checkpoint, work, seed, how = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    draw, lines, same = random.Random(seed), [], []
    torch.set_num_threads(1)  # before any work: threads do not survive a fork
    skeleton(checkpoint)  # imports the architecture's code
    for name in ("cold", "whole"):
        start = time.monotonic()
        attempt(checkpoint, str(work / name), str(work / f"{name}.out"), call=None, seconds=None)
        whole = time.monotonic() - start
    for number in range(1, 9 if how == "random" else 1000):
        folder, out, call = work / f"journal-{number}", work / f"{number}.out", number if how == "calls" else None
        killed = len(lines)
        while True:
            seconds = draw.uniform(0.1, 0.95) * whole if how == "random" else None
            if attempt(checkpoint, str(folder), str(out), call=call, seconds=seconds):
                break
            journal_file, call = folder / "journal.jsonl", None
            lines.append(len(journal_file.read_bytes().splitlines()) if journal_file.exists() else 0)
        same.append(out.read_bytes() == (work / "whole.out").read_bytes())
        if how == "calls" and killed == len(lines):
            break
    print(json.dumps({"killed": len(lines), "lines": lines, "same": all(same), "rounds": len(same)}))


if __name__ == "__main__":
    main()
