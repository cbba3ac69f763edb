"""Builds the C++ extension ``fastprune._cpp``; everything else about the package stands in pyproject.toml.

The extension takes addresses and sizes and includes no torch header, so one build serves every torch. It may be
absent (``optional=True``): the same operations then run in plain torch. ``FASTPRUNE_REQUIRE_EXT=1`` makes a failed
build fatal.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, LinkError

SOURCES = sorted(path.as_posix() for path in Path("csrc").glob("*.cpp"))
HEADERS = sorted(path.as_posix() for path in Path("csrc").glob("*.h"))
# Scores are products and nothing else; a multiplication contracted with an addition would round differently
# from torch, and the C++ and torch backends have to agree bit for bit.
UNIX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
OPENMP_SOURCE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class BuildExtension(build_ext):
    """Adds the flags of the compiler found, with OpenMP where it has it (Apple's clang does not)."""

    def build_extensions(self) -> None:
        """Choose flags by trying them, then build."""
        unix = self.compiler.compiler_type != "msvc"
        openmp = ["-fopenmp"] if unix else ["/openmp"]
        has_openmp = self._links(OPENMP_SOURCE, openmp)
        if not has_openmp:
            print("fastprune._cpp: the compiler has no OpenMP, the extension will use one thread", file=sys.stderr)
        for extension in self.extensions:
            extension.extra_compile_args += [*(UNIX_FLAGS if unix else ["/O2"]), *(openmp if has_openmp else [])]
            extension.extra_link_args += openmp if unix and has_openmp else []
        super().build_extensions()

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


setup(
    ext_modules=[
        Pybind11Extension(
            "fastprune._cpp",
            SOURCES,
            depends=HEADERS,
            cxx_std=17,
            optional=os.environ.get("FASTPRUNE_REQUIRE_EXT") != "1",
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
