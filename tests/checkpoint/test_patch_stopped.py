"""Patches that an error or SIGKILL stops half way, and the memory that one takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import slow_except
from support.checkpoints import contents, mask_for

import fastprune
from fastprune.checkpoint import byte_edits
from fastprune.masking.mask import PruneMask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_takes_the_patch_out_again(model, folder, monkeypatch, error, call):
    before, genuine, calls = contents(folder), os.pwrite, []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return genuine(*args)

    monkeypatch.setattr(byte_edits.os, "pwrite", fail)
    with pytest.raises(error):
        fastprune.patch_in_place(folder, mask_for(model))
    assert contents(folder) == before


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import fastprune
from fastprune.checkpoint import byte_edits
from fastprune.checkpoint.undo_file import UNDO_NAME

byte_edits._WINDOW_BYTES = 64
root, action = Path(sys.argv[1]), sys.argv[2]
mask = fastprune.PruneMask.load(root / "mask")
original = {path.name: path.read_bytes() for path in (root / "model").iterdir()}
shutil.copytree(root / "model", root / "whole")
fastprune.patch_in_place(root / "whole", mask, undo=False)
whole = {path.name: path.read_bytes() for path in (root / "whole").iterdir()}
work, real, killed, mixed = root / "work", {"pwrite": os.pwrite, "fsync": os.fsync}, 0, 0
while True:
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root / "model", work)
    if action == "undo":
        fastprune.patch_in_place(work, mask)
    if (child := os.fork()) == 0:
        calls = 0
        def count(name):
            def call(*args):
                global calls
                calls += 1
                if calls == killed + 1:
                    if name == "pwrite":  # half of a window
                        real[name](args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real[name](*args)
            return call
        os.pwrite, os.fsync = count("pwrite"), count("fsync")
        if action == "undo":
            fastprune.undo_patch(work)
        else:
            fastprune.patch_in_place(work, mask, undo=action != "patch for good")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    killed += 1
    now = {path.name: path.read_bytes() for path in work.iterdir() if not path.name.startswith(".")}
    if UNDO_NAME in now:
        mixed += any(now[name] != data for name, data in original.items())
        fastprune.undo_patch(work)
    now = {path.name: path.read_bytes() for path in work.iterdir() if not path.name.startswith(".")}
    done = action == "patch for good" and UNDO_NAME not in now and now == whole  # killed when the undo file was gone
    assert now == original or done, (action, killed)
print(killed, mixed)
"""


@pytest.mark.parametrize("action", slow_except(["patch", "patch for good", "undo"], "patch"))
def test_kill_at_any_write_can_be_undone(model, folder, action):
    """The process dies by SIGKILL at each write and each flush in turn, in the middle of the write."""
    mask_for(model).save(folder.parent / "mask")
    command = [sys.executable, "-c", KILLED, str(folder.parent), action]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    killed, mixed = map(int, done.stdout.split())
    assert killed > 20 and mixed > 10


MEMORY = """
import sys
from pathlib import Path
import torch, fastprune
from fastprune.checkpoint.patch import patch_checkpoint, patch_in_place, undo_patch

def peak():  # of this program; ru_maxrss would begin at that of the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10

mask = fastprune.PruneMask.load(sys.argv[1] + "/mask")
before = peak()
patch_checkpoint(sys.argv[1] + "/model", mask, sys.argv[1] + "/copy")
patch_in_place(sys.argv[1] + "/model", mask)
undo_patch(sys.argv[1] + "/copy")
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_a_window_and_not_a_shard(tmp_path):
    """Two shards of 100 MB; a loaded or mapped one would show. The limit has to hold for shards of any size."""
    (tmp_path / "model").mkdir()
    shapes, where = {f"layer.{index}.weight": (2500, 2500) for index in range(8)}, {}
    for shard in range(2):
        names = list(shapes)[4 * shard : 4 * shard + 4]
        save_file({name: torch.randn(2500, 2500) for name in names}, tmp_path / "model" / f"model-{shard}.safetensors")
        where |= dict.fromkeys(names, f"model-{shard}.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    mask = PruneMask({name: torch.randperm(6_250_000)[:300].sort().values for name in shapes}, shapes)
    mask.save(tmp_path / "mask")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 33, f"{done.stdout} MiB"  # a sixth of the checkpoint, as 100 MiB are of 600
