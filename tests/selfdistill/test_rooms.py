"""The rooms of `selfdistill`: which may import which, and no circle between files or rooms.

A room is a folder of the package, or a file beside them. Every import counts, also one inside of a
function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import selfdistill

PACKAGE = "selfdistill"
ROOT = Path(selfdistill.__file__).parent

# From the ground up: a room imports from lower floors only, not even from its neighbours.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "seeds", "visible"),
    ("checkout", "places", "progress", "runlog"),
    ("config",),
    ("model", "tasks"),
    ("prompts",),
    ("rollout",),
    ("critic", "evaluation"),
    ("methods",),
    ("training",),
    ("analysis", "filtering", "planning"),
    ("cli",),
    ("__main__",),
)

Edges = Mapping[str, set[str]]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: Iterable[str]) -> set[str]:
    """The modules among `modules` that a source imports, anywhere in it."""
    known = set(modules)
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found & known


def files() -> dict[str, set[str]]:
    """The imports of every file of the package, by module."""
    sources = {module_of(path): path.read_text("utf-8") for path in ROOT.rglob("*.py")}
    return {module: imported(source, sources) - {module} for module, source in sources.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def rooms(edges: Edges) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, targets in edges.items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(t) for t in targets} - {room, PACKAGE})
    del found[PACKAGE]
    return found


def circle(edges: Edges) -> list[str]:
    """The nodes of a circle, the first one again at its end; empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def not_down(edges: Edges) -> list[str]:
    """Imports that do not go to a lower floor, with a file that has each of them."""
    floor = {room: number for number, level in enumerate(FLOORS) for room in level}
    return [
        f"{module} imports {target}"
        for module, targets in sorted(edges.items())
        for target in sorted(targets)
        if PACKAGE not in (module, target)
        and room_of(module) != room_of(target)
        and floor[room_of(target)] >= floor[room_of(module)]
    ]


def test_every_room_has_a_floor() -> None:
    assert sorted(rooms(files())) == sorted(room for level in FLOORS for room in level)


def test_imports_go_down() -> None:
    assert not_down(files()) == []


def test_no_circle_between_files_or_rooms() -> None:
    edges = files()
    assert circle(edges) == []
    assert circle(rooms(edges)) == []


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        (
            "selfdistill.rollout.attempts",
            "def late():\n    from selfdistill.training import solver",
            ["selfdistill.rollout.attempts imports selfdistill.training.solver"],
        ),
        (
            "selfdistill.model.weights",
            "from selfdistill.tasks.interface import Problem",
            ["selfdistill.model.weights imports selfdistill.tasks.interface"],
        ),
        ("selfdistill.training.loop", "import selfdistill.rollout.attempts", []),
    ],
    ids=["up, inside a function", "to a neighbour", "down"],
)
def test_an_import_back_up_is_found(module: str, source: str, told: list[str]) -> None:
    edges = files()
    assert module in edges
    edges[module] = edges[module] | imported(source, edges)
    assert not_down(edges) == told


def test_a_circle_is_found() -> None:
    edges = files()
    edges["selfdistill.model.layout"] = {"selfdistill.model.attention.loop"}
    assert set(circle(edges)) >= {"selfdistill.model.layout", "selfdistill.model.attention.loop"}


def test_init_files_hold_exports_and_no_substance() -> None:
    for path in ROOT.rglob("__init__.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_name = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__")
            assert is_text or is_name or isinstance(node, ast.ImportFrom), (path, node.lineno)


def test_no_file_is_longer_than_450_lines() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length >= 450} == {}
