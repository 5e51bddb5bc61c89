"""What the kernel's folder holds before anything is compiled."""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath

import pytest

from kernel_hub.card import card, figures
from kernel_hub.layout import ROOT, python_sources, write_sources
from kernel_hub.relocation import relocate


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel-hub")
    write_sources(folder)
    return folder


def test_modules_import_each_other_relatively_and_by_files_that_exist(target: Path) -> None:
    package = target / "torch-ext/selfdistill_kernels"
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert all(not alias.name.startswith("selfdistill") for alias in node.names), file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert not str(node.module).startswith("selfdistill"), file
            elif isinstance(node, ast.ImportFrom):
                base = file.parents[node.level - 1]
                module = base.joinpath(*(node.module or "").split("."))
                names = [module, *(module / alias.name for alias in node.names)]
                found = any(p.with_suffix(".py").exists() or p.is_dir() for p in names)
                assert found or node.module == "_ops", f"{file}:{node.lineno}"


def test_operators_lie_in_the_namespace_of_the_build(target: Path) -> None:
    for file in (target / "torch-ext").rglob("*.py"):
        code = ast.unparse(ast.parse(file.read_text()))
        assert "torch.ops.selfdistill" not in code, file
        for text in re.findall(r"'selfdistill::\w+'", code):
            pytest.fail(f"{file}: {text}")


def test_a_source_that_names_the_package_is_refused() -> None:
    place = PurePosixPath("backends/other.py")
    for line in ("import selfdistill_kernels", 'import_module("selfdistill_kernels.loss")'):
        with pytest.raises(ValueError, match=r"backends/other\.py: .* names the package"):
            relocate(f"{line}\n", place)
    moved = relocate("from selfdistill_kernels.loss import f\n", place)
    assert moved == "from ..loss import f\n"
    assert (
        relocate("    from selfdistill_kernels import ops\n", place) == "    from .. import ops\n"
    )


def test_every_module_of_the_loss_is_there() -> None:
    places = {place.as_posix() for place, _ in python_sources()}
    assert {"__init__.py", "loss.py", "backends/triton/sweep.py"} <= places
    assert not any(place.startswith(("integrations", "tools")) for place in places)


def test_build_toml_names_every_source_once_for_each_backend(target: Path) -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or later")
    build = tomllib.loads((target / "build.toml").read_text())
    compiled: dict[str, list[str]] = {"cpu": [], "cuda": []}
    for section in build["kernel"].values():
        for name in section["src"]:
            assert (target / name).exists()
            if name.endswith((".cpp", ".cu")):
                compiled[section["backend"]].append(name)
        assert "-DSELFDISTILL_NAMESPACE=TORCH_EXTENSION_NAME" in section["cxx-flags"]
    cpu = {f"csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.cpp")}
    gpu = {
        f"csrc/cuda/{path.name}"
        for path in (ROOT / "csrc/cuda").glob("*.c*")
        if path.suffix in (".cpp", ".cu")
    }
    assert sorted(compiled["cpu"]) == sorted(cpu)
    assert sorted(compiled["cuda"]) == sorted(cpu | gpu)
    assert build["torch"]["src"][0] == "csrc/bindings.cpp"


def test_figures_of_the_card_are_read_off() -> None:
    benchmarks = ROOT / "docs/benchmarks.md"
    text = card(benchmarks, 7)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert any(row.startswith("| selfdistill |") for row in rows)
    assert all(row in benchmarks.read_text() for row in rows)
    assert "version=7" in text
    assert "@" not in text
    with pytest.raises(ValueError, match="no heading '## One long run'"):
        figures("# Benchmarks\n")
