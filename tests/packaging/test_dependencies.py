"""Who needs what: the kernels torch alone, the trainer the extra `train`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from selfdistill import __main__ as command

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "selfdistill_kernels"
# What each room needs beside torch is imported when the room is.
WITH_HOSTS = ("integrations", "backends/triton", "tools/audit")


def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imports(file: Path) -> Iterator[str]:
    """The packages that a file imports, in functions, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


def test_the_kernels_need_torch_only() -> None:
    assert [Requirement(text).name for text in project()["dependencies"]] == ["torch"]
    allowed = {*sys.stdlib_module_names, "selfdistill_kernels", "torch"}
    for file in KERNELS.rglob("*.py"):
        name = file.relative_to(KERNELS).as_posix()
        if not name.startswith(WITH_HOSTS):
            # The registry and the tools import Triton where it was found.
            assert set(imports(file)) - allowed <= {"triton"}, name


def test_the_command_knows_the_packages_of_the_extra() -> None:
    extra = [Requirement(text).name for text in project()["optional-dependencies"]["train"]]
    assert sorted({"pyyaml": "yaml"}.get(name, name) for name in extra) == sorted(
        command.OF_THE_TRAINER
    )


def run_without(module: str) -> str:
    """What `selfdistill train` says, in a process of its own, where a module is missing."""
    script = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['', 'train', 'no.yaml']; "
        "from selfdistill.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("missing", ["typer", "pydantic"])
def test_the_command_says_what_to_install(missing: str) -> None:
    said = run_without(missing)
    assert said.startswith(f"error: the trainer needs {missing}, which is not installed: run `pip")
    assert "'.[train]'" in said


def test_other_missing_modules_are_not_blamed_on_the_extra() -> None:
    assert "ModuleNotFoundError: import of selfdistill.visible" in run_without(
        "selfdistill.visible"
    )
