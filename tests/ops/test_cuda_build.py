"""What nvcc makes of the CUDA sources.

No warnings, no spills, the instructions that are meant, and a module that can be imported without a driver. Nothing
here runs on a device.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine"),
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension as setup.py builds it, with warnings as errors."""
    folder = tmp_path_factory.mktemp("cuda")
    target, other = (folder / f"fastprune/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_cuda", "_cpp"))
    other.parent.mkdir()
    other.touch()  # newer than its sources, so it is not compiled here
    strict = "-Werror=all-warnings -Xcompiler=-Wall,-Werror"
    environment = {**os.environ, "NVCC_APPEND_FLAGS": strict, "FASTPRUNE_REQUIRE_EXT": "1", "FASTPRUNE_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}", f"--build-temp={folder / 'temp'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    assert other.stat().st_size == 0
    return target


@pytest.fixture(scope="session")
def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if found is None and triton is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(bundled) if bundled.exists() else None
    if found is None:
        pytest.skip("no cuobjdump on this machine")
    return found


def _run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def _kernels() -> set[str]:
    text = "".join(path.read_text() for path in SOURCES.glob("*.cu*"))
    return set(re.findall(r"\b(\w+_kernel)\(const ", text)) | set(re.findall(r"\b(extend_cut_kernel)\(", text))


def test_every_kernel_is_compiled_for_every_architecture_without_spills(library: Path, cuobjdump: str) -> None:
    found: dict[str, set[str]] = {}
    for architecture in ARCHITECTURES:
        usage = _run(cuobjdump, "-res-usage", "-arch", architecture, library)
        functions = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
        found[architecture] = {kernel for kernel in _kernels() for name, *_ in functions if kernel in name}
        for name, registers, stack, shared, local in functions:
            assert (stack, local) == ("0", "0"), f"{name} spills on {architecture}"
            assert int(registers) <= 128 and int(shared) <= 48 << 10, f"{name} on {architecture}"
    assert len(_kernels()) == 10
    assert found == {architecture: _kernels() for architecture in ARCHITECTURES}


def test_newer_architectures_find_ptx(library: Path, cuobjdump: str) -> None:
    assert "sm_90.ptx" in _run(cuobjdump, "-lptx", library)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pass_over_the_weights_loads_vectors_and_contracts_nothing(
    library: Path, cuobjdump: str, architecture: str
) -> None:
    functions = _run(cuobjdump, "-sass", "-arch", architecture, library).split("Function :")[1:]
    (code,) = [code for code in functions if "collect_kernel" in code.split("\n", 1)[0]]
    # Four vectors of the statistic and four of float32 weights; those of 16 bit weights are half as wide.
    assert len(re.findall(r"LDG\.E\.128", code)) == 8
    assert len(re.findall(r"LDG\.E\.64\.CONSTANT", code)) == 8
    assert "FMUL" in code and "FADD" in code
    assert not re.search(r"\bFFMA|\bF(MUL|ADD)\.FTZ|\bLDL|\bSTL", code)


def test_without_a_driver_it_is_imported_and_a_call_says_what_is_missing(library: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(library.parent)!r})
import _cuda
for call in (
    lambda: _cuda.top_scores_workspace([4], [1], [1], 0),
    lambda: _cuda.difference_workspace(4, 0),
    lambda: _cuda.apply_sparse([], 0.0, 0, 0, 0, 0),
    lambda: _cuda.restore_sparse([], 0, 0, 0, 0),
):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["top_scores", "difference", "apply_sparse", "restore_sparse"]
    assert all(re.search(r": cudaSetDevice: .+ \(cudaError(InsufficientDriver|NoDevice)\)", line) for line in lines)
