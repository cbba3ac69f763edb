"""Builds the extensions ``fastprune._cpp`` and ``fastprune._cuda``; everything else stands in pyproject.toml.

Both take addresses and sizes and include no torch header, so one build serves every torch. Either may be absent
(``optional=True``): the same operations then run in plain torch. ``_cuda`` is built where nvcc is found, and
``FASTPRUNE_CUDA=0`` leaves it out (it compiles for about a minute on two cores). ``FASTPRUNE_REQUIRE_EXT=1`` makes a
failed build fatal.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError, ExecError, LinkError
from setuptools.modified import newer_group

OPTIONAL = os.environ.get("FASTPRUNE_REQUIRE_EXT") != "1"
# Scores are products and nothing else; a multiplication contracted with an addition would round differently
# from torch, and the C++ and torch backends have to agree bit for bit.
UNIX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OPENMP_SOURCE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
# Machine code for A100 and H100 and their like, and PTX from which drivers make it for whatever comes later. The
# runtime is linked in, so that the module can be imported on a machine without CUDA.
NVCC_FLAGS = [
    *("-shared", "-cudart=static", "-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
    *(f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"),
]


class BuildExtension(build_ext):
    """Compiles C++ with the flags of the compiler found, and CUDA with nvcc."""

    def build_extensions(self) -> None:
        """Choose flags by trying them (Apple's clang has no OpenMP), then build."""
        unix = self.compiler.compiler_type != "msvc"
        openmp = ["-fopenmp"] if unix else ["/openmp"]
        has_openmp = self._links(OPENMP_SOURCE, openmp)
        if not has_openmp:
            print("fastprune._cpp: the compiler has no OpenMP, the extension will use one thread", file=sys.stderr)
        for extension in self.extensions:
            extension.extra_compile_args += [*(UNIX_FLAGS if unix else ["/O2"]), *(openmp if has_openmp else [])]
            extension.extra_link_args += openmp if unix and has_openmp else []
        super().build_extensions()

    def build_extension(self, extension: Extension) -> None:
        """CUDA sources go to nvcc, in one call; all others to the compiler."""
        if extension.name != "fastprune._cuda":
            super().build_extension(extension)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        if not self.force and not newer_group(extension.sources + extension.depends, target):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.spawn([find_nvcc(), *NVCC_FLAGS, *extension.sources, "-o", str(target)])
        except ExecError as error:
            raise CompileError(f"nvcc: {error}") from error  # setuptools forgives an optional extension this one only

    def _links(self, source: str, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source)
            try:
                objects = self.compiler.compile([str(path)], output_dir=folder, extra_postargs=flags)
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=flags)
            except (CompileError, LinkError):
                return False
        return True


def find_nvcc() -> str | None:
    """CUDA's compiler: that of ``CUDA_HOME`` if it is set and has one, else the one on PATH."""
    return shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which("nvcc")


def extensions() -> list[Extension]:
    """``_cpp``, and ``_cuda`` unless there is a reason against it, which is printed."""
    found = [Pybind11Extension("fastprune._cpp", files("csrc/*.cpp"), depends=files("csrc/*.h"), cxx_std=17)]
    if os.environ.get("FASTPRUNE_CUDA") == "0":
        print("fastprune._cuda: not built, FASTPRUNE_CUDA=0", file=sys.stderr)
    elif sys.platform != "linux" or find_nvcc() is None:
        print("fastprune._cuda: not built, there is no nvcc in CUDA_HOME/bin or on PATH", file=sys.stderr)
    else:
        sources = [*files("csrc/cuda/*.cu"), "csrc/cuda/cuda_bindings.cpp"]
        headers = [*files("csrc/cuda/*.h"), *files("csrc/cuda/*.cuh")]
        found.append(Extension("fastprune._cuda", sources, depends=headers))
    for extension in found:
        extension.optional = OPTIONAL
    return found


def files(pattern: str) -> list[str]:
    """What matches, in an order that does not depend on the file system."""
    return sorted(path.as_posix() for path in Path().glob(pattern))


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
