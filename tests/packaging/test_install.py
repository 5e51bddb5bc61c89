"""What README says about installing, in fresh environments: needs a package index."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import venv
from pathlib import Path

import pytest
import working_tree

ROOT = working_tree.ROOT
pytestmark = pytest.mark.slow

# What a newcomer tries first. Torch's warning that there is no numpy is torch's own.
SCRIPT = """
import torch
from selfdistill_kernels import fused_linear_distillation

student = torch.randn(64, 32, requires_grad=True)
teacher, head = torch.randn(64, 32), torch.randn(500, 32)
out = fused_linear_distillation(student, teacher, head)
out.loss.backward()
plain = fused_linear_distillation(student, teacher, head, backend="reference")
assert torch.allclose(out.loss, plain.loss, rtol=1e-5), (out.loss, plain.loss)
assert student.grad.norm() > 0
"""


class Environment:
    """A fresh virtual environment; commands run in a folder that imports find nothing in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=True)
        self.programs = folder / "env" / "bin"
        self.empty = folder / "empty"
        self.empty.mkdir()
        # The torch of requirements.txt, and everything else that it pins.
        constraints = folder / "constraints.txt"
        constraints.write_text(
            re.sub(r"\[.*?\]", "", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
        )
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SELFDISTILL"))}
        self.variables = {
            **kept,
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "VIRTUAL_ENV": str(folder / "env"),
            "PIP_CONSTRAINT": str(constraints),
            "OMP_NUM_THREADS": "1",
        }

    def shell(
        self, line: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=cwd or self.empty, env={**self.variables, **variables},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def must(self, line: str, cwd: Path | None = None, **variables: str) -> str:
        done = self.shell(line, cwd, **variables)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def run_natively(self) -> None:
        """The script works, and on the native kernels: the reference would warn."""
        subprocess.run(
            [self.programs / "python", "-W", "error::RuntimeWarning", "-c", SCRIPT],
            cwd=self.empty, env=self.variables, check=True,
        )  # fmt: skip
        doctor = self.must("python -m selfdistill_kernels.tools.doctor")
        assert re.search(r"native on cpu +ready", doctor), doctor


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With torch and setuptools."""
    made = Environment(tmp_path_factory.mktemp("installation"))
    made.must("pip install torch 'setuptools>=77'")
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, without anything that was built in it."""
    folder = tmp_path_factory.mktemp("source")
    working_tree.copy_to(folder)
    return folder


def readme_lines() -> list[str]:
    """The commands of README's section "Install"."""
    section = (ROOT / "README.md").read_text().split("## Install\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    return [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]


def test_lines_of_the_readme(environment: Environment, source: Path) -> None:
    torch, kernels, trainer, setuptools, unisolated = readme_lines()
    environment.must(torch)
    environment.must(kernels, cwd=source)
    environment.run_natively()

    installed = environment.must("pip list").lower()
    assert "transformers" not in installed
    assert "numpy" not in installed
    told = environment.shell("selfdistill doctor")
    assert told.returncode == 1
    assert "is not installed: run `pip install '.[train]'` in the source folder" in told.stderr
    assert "Traceback" not in told.stderr

    environment.must(trainer, cwd=source)
    environment.run_natively()
    assert "native on cpu" in environment.must("selfdistill doctor")
    assert "doctor" in environment.must("python -m selfdistill --help")

    environment.must("pip uninstall --yes selfdistill")
    environment.must(setuptools)
    environment.must(unisolated, cwd=source)
    environment.run_natively()


def test_source_distribution(environment: Environment, source: Path, tmp_path: Path) -> None:
    hook = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    environment.must(f"python -c '{hook}' {tmp_path}", cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {str(name) for name in working_tree.files()} - names == set()

    environment.must("pip uninstall --yes selfdistill")
    environment.must(f"pip install {archive}")
    environment.run_natively()


def test_without_torch_it_says_so_before_anything_is_fetched(source: Path, tmp_path: Path) -> None:
    bare = Environment(tmp_path)
    done = bare.shell("pip install .", cwd=source)
    assert done.returncode != 0
    assert "there is none for " in done.stderr
    assert "install torch first" in done.stderr
    assert "Collecting torch" not in done.stdout


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CXX": "/no/compiler", "CC": "/no/compiler"}, "the build of the kernels failed ("),
        ({"SELFDISTILL_KERNELS_BUILD": "yes"}, "got 'yes', expected auto, cuda, cpu or none"),
    ],
    ids=["no compiler", "misspelt"],
)
def test_a_build_without_kernels_fails(
    environment: Environment, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    working_tree.copy_to(tmp_path / "source")
    done = environment.shell("pip install .", cwd=tmp_path / "source", **variables)
    assert done.returncode != 0
    assert said in done.stderr


def test_kernels_can_be_left_out(environment: Environment, tmp_path: Path) -> None:
    working_tree.copy_to(tmp_path / "source")
    target = tmp_path / "packages"
    environment.must(
        f"pip install --no-deps --target {target} .",
        cwd=tmp_path / "source", SELFDISTILL_KERNELS_BUILD="none", CXX="/no/compiler",
    )  # fmt: skip
    assert not list(target.glob("selfdistill_kernels/*.so"))
    done = environment.shell(f"python -c '{SCRIPT}'", PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert "using the reference backend" in done.stderr
