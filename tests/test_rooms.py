"""The architecture, held: rooms, who may import whom, no circles, and imports that exist.

A room is a folder or some files with one purpose. The table lists them from the ground up, and a
file may import from its own room and from rooms above it in the table. Imports inside functions
count; a package's `__init__` counts where a name is imported from the package itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> rooms, lowest first, each with the modules or folders that are in it. A longer name
# goes before a shorter one, wherever the two stand.
ROOMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "selfdistill_kernels": {
        "definitions": (
            "autocast",
            "logits",
            "objective",
            "advantage",
            "statistics",
            "tolerance",
            "parallel",
            "parallel.shard",
        ),
        "token loss": ("token_loss",),
        "interface of a backend": ("backends.tokens", "backends.interface", "options"),
        "lots": ("backends.lots",),
        "choice of a backend": ("backends.dispatch", "backends.triton_versions"),
        "reference": ("backends.reference",),
        "native": ("backends.native",),
        "triton": ("backends.triton",),
        "backends": ("backends", "backends.registry"),
        "top-k": ("top_k",),
        "operators": ("passes", "ops", "eager", "transforms", "flops"),
        "arguments": ("arguments", "parallel.operands"),
        "public functions": ("loss", "logprobs", ""),
        "integrations": ("integrations",),
        "tools": ("tools",),
    },
    "selfdistill": {
        "ground": (
            "errors",
            "seeds",
            "visible",
            "checkout",
            "json_text",
            "places",
            "progress",
            "runlog",
            "",
        ),
        "config": ("config",),
        "model": ("model",),
        "tasks": ("tasks",),
        "prompts": ("prompts",),
        "rollout": ("rollout",),
        "evaluation": ("evaluation",),
        "critic": ("critic",),
        "methods": ("methods",),
        "training": ("training",),
        "filtering": ("filtering",),
        "export": ("export",),
        "planning": ("planning",),
        "analysis": ("analysis",),
        "prediction": ("prediction",),
        "command line": ("cli", "predict_command", "study_commands", "__main__"),
    },
}
# Whose imports of our own packages must name a file here: an editable installation would find a
# module that moved in the clone that was installed.
READERS = (
    "selfdistill_kernels",
    "selfdistill",
    "benchmarks",
    "examples",
    "kernel_hub",
    "studies",
    "tests",
)


def modules(package: str) -> dict[str, Path]:
    """Every module of a package with its file, by its dotted name."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(source: str, known: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """Each import of a source as (module, name in it that is no module, or None)."""
    known = set(known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner, None) if inner in known else (str(node.module), alias.name)


def arrows(package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    files = modules(package)
    return {
        module: {name for name, _ in imported(file.read_text(), files) if name in files} - {module}
        for module, file in files.items()
    }


def room_of(module: str, rooms: Mapping[str, tuple[str, ...]]) -> str:
    """The room of a module named without its package; that of the longest name that fits."""
    fitting = [
        (len(name), room)
        for room, names in rooms.items()
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    ]
    assert fitting, f"{module}: in no room of tests/test_rooms.py; add it to one"
    return max(fitting)[1]


def upward(package: str, found: Mapping[str, set[str]]) -> list[str]:
    """Imports that go up in the table."""
    rooms = ROOMS[package]
    floor = {room: number for number, room in enumerate(rooms)}

    def of(module: str) -> str:
        return room_of(module.removeprefix(package).removeprefix("."), rooms)

    return [
        f"{module} ({of(module)}) imports {other} ({of(other)})"
        for module, others in found.items()
        for other in sorted(others)
        if floor[of(other)] > floor[of(module)]
    ]


def circles(found: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of modules that all reach each other by imports."""
    reached: dict[str, set[str]] = {}
    for module in found:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            new = found.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[module] = seen
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in found
        if module in reached[module]
    }
    return [set(group) for group in groups]


@pytest.mark.parametrize("package", ROOMS)
def test_imports_go_down(package: str) -> None:
    assert upward(package, arrows(package)) == []


@pytest.mark.parametrize("package", ROOMS)
def test_no_circle_between_files(package: str) -> None:
    assert circles(arrows(package)) == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_files(package: str) -> None:
    inside = {module.removeprefix(package).removeprefix(".") for module in modules(package)}
    missing = {
        name
        for names in ROOMS[package].values()
        for name in names
        if not any(module == name or module.startswith(f"{name}.") for module in inside)
    }
    assert missing == set()


@pytest.mark.parametrize("package", ROOMS)
def test_init_files_hold_exports_and_no_substance(package: str) -> None:
    for path in (ROOT / package).rglob("__init__.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_name = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__")
            assert is_text or is_name or isinstance(node, ast.ImportFrom), (path, node.lineno)


@pytest.mark.parametrize("package", ROOMS)
def test_no_file_is_longer_than_450_lines(package: str) -> None:
    lengths = {
        str(path): len(path.read_text("utf-8").splitlines())
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length >= 450} == {}


def test_an_import_that_goes_back_up_is_found() -> None:
    package = "selfdistill_kernels"
    found = arrows(package)
    found[f"{package}.backends.native.store"].add(f"{package}.loss")
    found[f"{package}.objective"].add(f"{package}.statistics")  # in its own room
    assert upward(package, found) == [
        "selfdistill_kernels.backends.native.store (native) imports selfdistill_kernels.loss "
        "(public functions)"
    ]


def test_a_circle_is_found() -> None:
    found = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(found) == [{"a", "b", "c"}]


def test_imports_name_files_of_this_tree() -> None:
    owned = ("selfdistill_kernels", "selfdistill", "benchmarks", "kernel_hub", "studies")
    files = {module: file for package in owned for module, file in modules(package).items()}
    # Built, not written.
    built = {"selfdistill_kernels._C", "selfdistill_kernels._cuda"}
    wrong = []
    for reader in READERS:
        for file in sorted((ROOT / reader).rglob("*.py")):
            for module, name in imported(file.read_text(), files):
                if module.partition(".")[0] not in owned or module in built:
                    continue
                if module not in files:
                    wrong.append(f"{file.relative_to(ROOT)}: no module {module}")
                elif name is not None and name not in files[module].read_text():
                    wrong.append(f"{file.relative_to(ROOT)}: no {name} in {module}")
    assert wrong == []
