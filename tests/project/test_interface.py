"""The lazy front door: what runs and what type checkers read are the same names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import fastprune


def declared() -> dict[str, str]:
    """Name -> module of the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(fastprune.__file__).read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_type_checkers_read_the_names_that_run() -> None:
    assert declared() == fastprune._HOME
    assert sorted(fastprune.__all__) == sorted(["FastpruneError", "FastpruneWarning", "__version__", *fastprune._HOME])


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(fastprune.__file__).with_name("py.typed").is_file()


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, fastprune; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
