"""Files appear whole or not at all, whoever is killed, and whoever writes at the same time."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.mask_models import mask_of

import fastprune
from fastprune import files
from fastprune.checkpoint import patch
from fastprune.checkpoint.shards import stored_tensors
from fastprune.errors import ArgumentError, ArtifactError, DiskError, NotFoundError, ScoringError
from fastprune.files import check_space, claimed, replacing, scratch
from fastprune.masking.mask import PruneMask
from fastprune.organism import checkpoint_path
from fastprune.reporting import write_report
from fastprune.scoring.activation_store import ActivationStore


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def left(tmp_path: Path):
    """Runs code in a forked child that kills itself where it calls ``die``, and gives what it has left."""

    def run(code) -> list[str]:
        if (child := os.fork()) == 0:
            try:
                code()
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return [name for name in names(tmp_path) if "fastprune-" in name]

    return run


def die(*args: object, **kwargs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, PruneMask]:
    """The organism's checkpoint beside the other files, and a mask for it."""
    folder = checkpoint_path("aligned")
    name = "model.layers.0.mlp.up_proj.weight"
    shape = stored_tensors(folder)[name].shape
    return folder, PruneMask({name: torch.arange(9)}, {name: shape})


def test_what_a_killed_patch_has_copied_is_swept_by_the_next(model, left, tmp_path: Path, monkeypatch) -> None:
    """Regression: a copy of the whole model stayed for good."""
    folder, mask = model
    with monkeypatch.context() as patched:
        patched.setattr(patch, "write_undo", die)
        copies = left(lambda: fastprune.patch_checkpoint(folder, mask, tmp_path / "P"))
        assert len(copies) == 1 and (tmp_path / copies[0] / "P" / "model.safetensors").is_file()
        assert len(left(lambda: fastprune.patch_checkpoint(folder, mask, tmp_path / "P"))) == 1
        assert len(left(lambda: fastprune.patch_checkpoint(folder, mask, tmp_path / "Q"))) == 2
    fastprune.patch_checkpoint(folder, mask, tmp_path / "P")
    fastprune.patch_checkpoint(folder, mask, tmp_path / "Q")
    assert names(tmp_path) == ["P", "Q"]


def test_a_living_copy_and_a_strangers_folder_are_not_swept(tmp_path: Path) -> None:
    stranger = tmp_path / ".out.fastprune-mine.tmp"
    stranger.mkdir()
    (tmp_path / ".out.123.tmp").mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / ".out.fastprune-aaaaaaaa.tmp").symlink_to(target)
    with replacing(tmp_path / "out") as one:
        one.write_text("one")
        with replacing(tmp_path / "out") as two:
            two.write_text("two")
        assert one.read_text() == "one"
    assert (tmp_path / "out").read_text() == "one"
    assert names(tmp_path) == [".out.123.tmp", ".out.fastprune-aaaaaaaa.tmp", stranger.name, "out", "target"]


def test_nothing_is_swept_where_there_are_no_locks(tmp_path: Path, left, monkeypatch) -> None:
    monkeypatch.setattr(files, "_lock", lambda handle: None)
    with replacing(tmp_path / "out") as one:
        one.write_text("one")
        (tmp_path / "out").write_text("two")
        with replacing(tmp_path / "out") as two:
            two.write_text("two")
        assert one.is_file()
    assert names(tmp_path) == ["out"]


def test_files_of_killed_writers_are_swept(left, tmp_path: Path, monkeypatch) -> None:
    mask = mask_of(a=[1])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        for write in (lambda: mask.save(tmp_path / "mask"), lambda: write_report({}, tmp_path)):
            assert len(left(write)) == 1
            for path in tmp_path.glob(".*"):
                assert path.is_dir()
            patched.undo()
            write()
            patched.setattr(Path, "replace", die)
            assert not left(die)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    put = lambda: ActivationStore("disk", torch.device("cpu")).put("boundary-0", 0, torch.ones(2))  # noqa: E731

    def run_and_die() -> None:
        store = ActivationStore("disk", torch.device("cpu"))
        store.put("boundary-0", 0, torch.ones(2))
        die()

    assert len(left(run_and_die)) == 1
    put()
    assert not left(die)


RACE = """
import sys, time
from pathlib import Path
import fastprune
from fastprune.checkpoint import patch
folder, mask, out = sys.argv[1:]
real = patch.write_undo
def slow(*args):
    print("copied", flush=True)
    sys.stdin.readline()
    return real(*args)
patch.write_undo = slow
fastprune.patch_checkpoint(folder, fastprune.PruneMask.load(mask), out)
"""


def test_the_loser_of_a_race_for_a_folder_is_told(model, tmp_path: Path) -> None:
    """Regression: OSError, directory not empty, after the whole copy."""
    folder, mask = model
    mask.save(tmp_path / "mask")
    words = [sys.executable, "-c", RACE, str(folder), str(tmp_path / "mask"), str(tmp_path / "out")]
    root = str(Path(fastprune.__file__).parent.parent)
    first = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert first.stdout.readline() == b"copied\n"
    with pytest.raises(ArgumentError, match=r"out_dir: .*another process is writing now"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "out")
    first.communicate(b"\n", timeout=60)
    assert first.returncode == 0 and names(tmp_path) == ["mask", "out"]
    with pytest.raises(ArgumentError, match="expected a new or an empty folder"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "out")


def test_a_folder_that_somebody_else_fills_meanwhile_stays(model, tmp_path: Path, monkeypatch) -> None:
    folder, mask = model
    real = patch.write_undo

    def meanwhile(*args):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        return real(*args)

    monkeypatch.setattr(patch, "write_undo", meanwhile)
    with pytest.raises(ArgumentError, match=r"out_dir: expected a new or an empty folder"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["mine"]


def test_a_name_is_kept_until_it_is_let_go(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("out")
    with claimed(tmp_path / "out", "out"):
        for same in (tmp_path / "out", tmp_path / "x" / ".." / "out", tmp_path / "link"):
            with (
                pytest.raises(ArgumentError, match=r"^out: .*which another process is writing now"),
                claimed(same, "out"),
            ):
                pass
        with claimed(tmp_path / "other", "out"):
            pass
    with claimed(tmp_path / "out", "out"):
        pass
    assert names(tmp_path) == ["link"]


def test_a_lock_that_a_killed_process_has_left_is_none(left, tmp_path: Path) -> None:
    def hold() -> None:
        with claimed(tmp_path / "out", "out"):
            die()

    left(hold)
    assert names(tmp_path) == [".out.fastprune.lock"]
    with claimed(tmp_path / "out", "out"):
        pass
    assert names(tmp_path) == []


def test_many_at_once_hold_a_name_one_at_a_time(tmp_path: Path) -> None:
    """Each adds to a number, which is lost if two do so together; the lock is made and removed hundreds of times."""
    counter, children = tmp_path / "counter", []
    counter.write_text("0")
    for _ in range(3):
        if (child := os.fork()) == 0:
            status, done = 1, 0
            try:
                while done < 60:
                    try:
                        with claimed(tmp_path / "out", "out"):
                            number = int(counter.read_text())
                            time.sleep(0)
                            counter.write_text(str(number + 1))
                            done += 1
                    except ArgumentError:
                        pass
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert counter.read_text() == "180"
    assert names(tmp_path) == ["counter"]


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 4 KB: what a full disk or a quota says, from the system itself.

    Around single calls, not a whole test: pytest's own output may be a file, and grows between the phases of a test.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """Regression: SafetensorError, which the command line showed as a traceback."""
    shape = (64, 64)
    path = PruneMask({"a": torch.arange(8)}, {"a": shape}).save(tmp_path / "mask")
    before = path.read_bytes()
    with full_disk(), pytest.raises(DiskError, match=r"cannot write mask: .*os error 27.*name another folder"):
        PruneMask({"a": torch.arange(4096)}, {"a": shape}).save(path)
    assert path.read_bytes() == before and names(tmp_path) == ["mask"]
    with (
        full_disk(),
        pytest.raises(DiskError, match=r"cannot write .*record\.json: its disk is full, or a quota is met"),
    ):
        write_report({"title": "x" * 5000}, tmp_path / "report")
    assert names(tmp_path / "report") == []


def test_a_full_disk_leaves_no_copy_of_a_model(model, tmp_path: Path) -> None:
    folder, mask = model
    with full_disk(), pytest.raises(DiskError, match=r"cannot write .*out: its disk is full"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "out")
    assert names(tmp_path) == []


def test_a_full_folder_of_temporary_files_is_said(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = ActivationStore("disk", torch.device("cpu"))
    with full_disk(), pytest.raises(ScoringError, match=r"disk of .* is full.*TMPDIR"):
        store.put("boundary-0", 0, torch.ones(4096))
    store.close()
    assert names(tmp_path) == []


def test_space_is_looked_at_before_the_copy(model, tmp_path: Path, monkeypatch) -> None:
    folder, mask = model
    check_space(tmp_path, 0, "x")
    with pytest.raises(DiskError, match=r"x: expected .* GiB of free space on the disk of .*, got .*B; free"):
        check_space(tmp_path, 1 << 60, "x")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    monkeypatch.setattr("shutil.copyfile", die)
    with pytest.raises(DiskError, match=r"out_dir .*: expected .* MiB of free space .*, got 1\.00 MiB"):
        fastprune.patch_checkpoint(folder, mask, tmp_path / "out")
    assert names(tmp_path) == []


def test_links_are_written_through(tmp_path: Path) -> None:
    """Regression: a link to a file on a large disk was replaced by the file."""
    mask, far = mask_of(a=[1]), tmp_path / "far"
    far.mkdir()
    (tmp_path / "link").symlink_to(far / "mask")  # dangling at first
    for chosen in (mask, mask_of(a=[2])):
        chosen.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and PruneMask.load(far / "mask") == chosen
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "mask")
    with pytest.raises(NotFoundError, match=r"the folder .*gone does not exist"):
        mask.save(tmp_path / "nowhere")
    (tmp_path / "folder").symlink_to(far)
    with pytest.raises(ArtifactError, match="it is a folder"):
        mask.save(tmp_path / "folder")
    assert names(far) == ["mask"]


def test_a_copy_does_not_go_into_its_original(model, tmp_path: Path) -> None:
    folder, mask = model
    (tmp_path / "link").symlink_to(folder)
    for out in (folder / "pruned", tmp_path / "link" / "pruned"):
        with pytest.raises(ArgumentError, match="out_dir: expected a folder outside of in_dir"):
            fastprune.patch_checkpoint(folder, mask, out)
    assert not (folder / "pruned").exists()


def test_a_scratch_folder_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch(tmp_path, "x-") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_names_that_no_file_can_have_are_refused_by_name(tmp_path: Path) -> None:
    mask = PruneMask({"a": torch.arange(3)}, {"a": (4, 4)})
    with pytest.raises(ArgumentError, match="path: expected a path, got"):
        mask.save(f"{tmp_path}/a\0b")
    odd = PruneMask({"\ud800": torch.arange(3)}, {"\ud800": (4, 4)})
    with pytest.raises(ArtifactError, match="cannot write"):
        odd.save(tmp_path / "mask")
    assert names(tmp_path) == []
