"""The imports of the package keep to the table of rooms in CONTRIBUTING.md, and go in no circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import fastprune

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.glob("fastprune/**/*.py")
    if path.name != "__main__.py"
}
FRONT_DOOR = "fastprune"  # imports every room, lazily; inside the package, fastprune.score stands for its home
HOME = {f"fastprune.{name}": getattr(getattr(fastprune, name), "__module__", "") for name in fastprune.__all__}


def imports(path: Path) -> set[str]:
    """The modules that a file names anywhere: in functions and for type checkers, too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name of what is imported"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in HOME:
            names.add(ast.unparse(node))
    names = {HOME.get(name, name) for name in names}
    return {next((m for m in (name, name.rpartition(".")[0]) if m in FILES), FRONT_DOOR) for name in names}


IMPORTS = {module: imports(path) - {module, FRONT_DOOR} for module, path in FILES.items() if module != FRONT_DOOR}


def rooms() -> dict[str, set[str]]:
    """What each room may import, from the bottom to the top of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are\n")[1]
    allowed: dict[str, set[str]] = {}
    for first, last in re.findall(r"^\| (`.*) \|.*\| (.*) \|$", text, flags=re.M):
        names, below = (set(re.findall(r"`(\w+)`", cell)) for cell in (first, last))
        below |= set(allowed) if last == "every earlier row" else {"errors", "files", "artifact", "progress"}
        assert below <= allowed.keys() | names, f"the row of {first} comes before what it may import"
        allowed |= {name: names | below for name in names}
    return allowed


def test_every_room_has_a_row_and_few_files_stand_outside() -> None:
    assert {module.split(".")[1] for module in IMPORTS} == set(rooms())
    assert len([path for path in FILES.values() if path.parent.name == "fastprune"]) <= 5


def test_rooms_import_only_what_the_table_allows() -> None:
    allowed = rooms()
    edges = [(module, name) for module, names in IMPORTS.items() for name in names]
    assert [edge for edge in edges if edge[1].split(".")[1] not in allowed[edge[0].split(".")[1]]] == []


def test_no_files_import_one_another_in_a_circle() -> None:
    list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names them
