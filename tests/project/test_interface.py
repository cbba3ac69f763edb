"""The lazy front door: what runs and what type checkers read are the same names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastprune
from fastprune import calibration, evaluation


def declared(package: ModuleType) -> dict[str, str]:
    """Name -> module of the imports under ``if TYPE_CHECKING``."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    (branch,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in branch.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


@pytest.mark.parametrize("package", [fastprune, calibration, evaluation], ids=lambda package: package.__name__)
def test_type_checkers_read_the_names_that_run(package: ModuleType) -> None:
    assert declared(package) == package._HOME
    assert set(package.__all__) >= set(package._HOME) and dir(package) == sorted(package.__all__)
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_the_front_door_lists_all_that_is_public() -> None:
    assert sorted(fastprune.__all__) == sorted(["FastpruneError", "FastpruneWarning", "__version__", *fastprune._HOME])


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(fastprune.__file__).with_name("py.typed").is_file()


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, fastprune; print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
