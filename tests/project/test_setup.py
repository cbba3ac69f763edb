"""What setup.py says and does where the CUDA extension cannot or must not be built. Nothing is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None, reason="the extensions are built with g++ here"
)


@pytest.fixture
def build(tmp_path: Path):
    """Runs ``setup.py build_ext`` with an nvcc of the given exit code, or none."""

    def run(nvcc: int | None, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        package = tmp_path / "lib" / "fastprune"
        package.mkdir(parents=True)
        (package / f"_cpp{sysconfig.get_config_var('EXT_SUFFIX')}").touch()  # newer than its sources: not compiled
        tools = tmp_path / "cuda" / "bin"
        tools.mkdir(parents=True)
        for name in ("g++", "gcc", "cc", "c++", "as", "ld", "sh"):  # PATH without the machine's own nvcc
            if found := shutil.which(name):
                (tools / name).symlink_to(found)
        if nvcc is not None:
            script = '#!/bin/sh\nfor target; do :; done\ncase $target in *.so) echo "$@" >"$target" ;; esac\nexit '
            (tools / "nvcc").write_text(f"{script}{nvcc}\n")
            (tools / "nvcc").chmod(0o755)
        command = [sys.executable, "setup.py", "build_ext", f"--build-lib={package.parent}", f"--build-temp={tmp_path}"]
        environment = {"PATH": str(tools), "HOME": str(tmp_path), "CUDA_HOME": str(tools.parent), **settings}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        return done, sorted(path.name.split(".")[0] for path in package.iterdir() if path.stat().st_size)

    return run


@pytest.mark.parametrize("required", ["0", "1"])
def test_without_nvcc_the_cuda_extension_is_left_out_with_one_line(build, required: str) -> None:
    done, built = build(None, FASTPRUNE_REQUIRE_EXT=required)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "_cuda" in line]
    assert lines == ["fastprune._cuda: not built, there is no nvcc in CUDA_HOME/bin or on PATH"]
    assert built == []


def test_it_is_left_out_on_purpose(build) -> None:
    done, built = build(0, FASTPRUNE_CUDA="0", FASTPRUNE_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert "fastprune._cuda: not built, FASTPRUNE_CUDA=0\n" in done.stderr
    assert built == []


@pytest.mark.parametrize("found_by", ["CUDA_HOME", "PATH"])
def test_nvcc_is_given_all_sources_and_architectures(build, tmp_path: Path, found_by: str) -> None:
    settings = {"PATH": os.defpath} if found_by == "CUDA_HOME" else {"CUDA_HOME": str(tmp_path / "elsewhere")}
    done, built = build(0, FASTPRUNE_REQUIRE_EXT="1", **settings)
    assert done.returncode == 0, done.stderr
    assert built == ["_cuda"]
    command = next((tmp_path / "lib" / "fastprune").glob("_cuda*")).read_text()
    for source in [*(ROOT / "csrc" / "cuda").glob("*.cu"), ROOT / "csrc" / "cuda" / "cuda_bindings.cpp"]:
        assert f"csrc/cuda/{source.name}" in command
    for flag in ("code=sm_80", "code=[sm_90,compute_90]", "-cudart=static"):
        assert flag in command


def test_an_nvcc_that_fails_is_fatal_only_where_extensions_are_required(build, tmp_path: Path) -> None:
    done, _ = build(3)
    assert done.returncode == 0
    assert "nvcc" in done.stderr and "fastprune._cuda" in done.stderr
    shutil.rmtree(tmp_path / "lib")
    shutil.rmtree(tmp_path / "cuda")
    done, _ = build(3, FASTPRUNE_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert "nvcc" in done.stderr
