"""What README says about installing, in fresh environments: needs a package index."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
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
    """A virtual environment; commands run in a folder that imports find nothing in.

    Args:
        folder: of the test.
        programs: of an environment that is there already, which nothing may change; None makes one.
    """

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        if programs is None:
            venv.create(folder / "env", with_pip=True)
        self.programs = programs or folder / "env" / "bin"
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
            "VIRTUAL_ENV": str(self.programs.parent),
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


@pytest.fixture
def own(tmp_path: Path) -> Environment:
    """The environment of the tests themselves, for what installs into a folder, or nothing."""
    return Environment(tmp_path, Path(sys.executable).parent)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the working tree, without anything that was built in it."""
    working_tree.copy_to(tmp_path / "source")
    return tmp_path / "source"


def readme_lines() -> list[str]:
    """The commands of README's section "Install"."""
    section = (ROOT / "README.md").read_text().split("## Install\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)
    lines = (line.partition("#")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


def source_distribution(own: Environment, source: Path, folder: Path) -> Path:
    """Make the archive, and return the folder that it unpacks to."""
    hook = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    own.must(f"python -c '{hook}' {folder}", cwd=source)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    return unpacked


def test_lines_of_the_readme_in_a_source_distribution(
    own: Environment, source: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    unpacked = source_distribution(own, source, made)
    missing = [name for name in working_tree.files() if not (unpacked / name).is_file()]
    assert not missing

    (tmp_path / "fresh").mkdir()
    environment = Environment(tmp_path / "fresh")
    torch, kernels, trainer, setuptools, unisolated = readme_lines()
    environment.must(torch)
    environment.must(kernels, cwd=unpacked)
    environment.run_natively()

    installed = environment.must("pip list").lower()
    assert "transformers" not in installed
    assert "numpy" not in installed
    told = environment.shell("selfdistill doctor")
    assert told.returncode == 1
    assert "is not installed: run `pip install '.[train]'` in the source folder" in told.stderr
    assert "Traceback" not in told.stderr

    environment.must(trainer, cwd=unpacked)
    environment.run_natively()
    assert "native on cpu" in environment.must("selfdistill doctor")
    assert "doctor" in environment.must("python -m selfdistill --help")

    environment.must("pip uninstall --yes selfdistill")
    environment.must(setuptools)
    environment.must(unisolated, cwd=unpacked)
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
    own: Environment, source: Path, variables: dict[str, str], said: str
) -> None:
    done = own.shell("pip install --no-deps --target packages .", cwd=source, **variables)
    assert done.returncode != 0
    assert said in done.stderr


def test_kernels_can_be_left_out(own: Environment, source: Path) -> None:
    own.must(
        "pip install --no-deps --target packages .",
        cwd=source, SELFDISTILL_KERNELS_BUILD="none", CXX="/no/compiler",
    )  # fmt: skip
    target = source / "packages"
    assert not list(target.glob("selfdistill_kernels/*.so"))
    # Without `site`, which would hand the missing extension over from the editable installation.
    paths = os.pathsep.join([str(target), sysconfig.get_path("purelib")])
    done = own.shell(f"python -S -c '{SCRIPT}'", PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert "using the reference backend" in done.stderr
