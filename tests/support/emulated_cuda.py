"""The CUDA sources as an extension for the CPU, compiled against a stand-in for CUDA's headers."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pybind11

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
STAND_IN = Path(__file__).parent / "cuda_emulation"
# Contraction would let the CPU do what the GPU is forbidden to, and fortification takes a change of fibers for an
# error (so not -O2). The binding is not optimised: it is most of the time.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Werror"]


def build(folder: Path) -> ModuleType:
    """Load it, compiled first unless the folder has it; ``folder`` has to outlive the module."""
    library = folder / "_cuda.so"
    if not library.exists():
        _compile(library)
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(library))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compile(library: Path) -> None:
    folder = library.parent
    includes = ["-I", str(STAND_IN), "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    compilers = []
    for source in [*sorted(SOURCES.glob("*.cu")), SOURCES / "cuda_bindings.cpp"]:
        optimise = "-O1" if source.suffix == ".cu" else "-O0"
        target = ["-x", "c++", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        compilers.append(
            (source, subprocess.Popen(["g++", *FLAGS, *includes, optimise, *target], stderr=subprocess.PIPE, text=True))
        )
    for source, compiler in compilers:
        _, messages = compiler.communicate()
        assert compiler.returncode == 0, f"{source.name}: {messages}"
    subprocess.run(["g++", "-shared", *map(str, folder.glob("*.o")), "-o", str(library)], check=True)
