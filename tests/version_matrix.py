"""Runs the tests under several versions of Python and of what we depend on: `make test-matrix`.

For each row of ROWS it makes an environment under build/matrix, builds the extension there in a
copy of the working tree, and runs the parts of PARTS; then it writes docs/compatibility.md from
what every row gave last. tests/test_compatibility.py holds pyproject.toml's ranges against that
table. A row takes about 6 GB while it runs, because the registry's torch brings CUDA's libraries.

    python tests/version_matrix.py [--keep] [ROW ...]

`--keep` leaves the environments there, which makes the next run shorter. The status is 1 where a
test failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from support import working_tree

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "matrix"
TABLE = ROOT / "docs" / "compatibility.md"

# What every row has besides its own versions: the tests, and what they compare with.
COMMON = ("setuptools>=77", "wheel", "hypothesis", "httpx2", "pytest-timeout", "pytest-xdist")


@dataclass(frozen=True)
class Row:
    """One environment: a Python "3.N", and what pip installs beside COMMON."""

    python: str
    packages: tuple[str, ...]
    why: str


ROWS = {
    "lowest": Row(
        "3.10",
        (
            "torch==2.9.1", "triton==3.5.1", "numpy==1.26.4", "filelock==4.1.0",
            "transformers==5.16.0", "tokenizers==0.23.1", "safetensors==0.8.0", "peft==0.20.0",
            "pydantic==2.7.0", "pyyaml==6.0.1", "typer==0.19.2", "rich==13.9.4", "datasets==3.0.0",
            "math-verify[antlr4_13_2]==0.8.0", "pytest==8.1.0",
        ),
        "the lower ends of pyproject.toml",
    ),
    # The interpreter of Triton 3.6 fails with numpy 2.4 and later.
    "gpu-machines": Row(
        "3.12",
        (
            "torch==2.11.0", "triton==3.6.0", "numpy==2.3.5", "transformers==5.17.0", "peft",
            "pydantic", "pyyaml", "typer", "rich", "datasets", "math-verify[antlr4_13_2]", "pytest",
        ),
        "what machines with GPUs often have",
    ),
    "pinned": Row("3.11", ("--requirement", "requirements.txt"), "requirements.txt, as in CI"),
    "newest": Row(
        "3.13",
        (
            "torch==2.14.1", "triton==3.8.0", "numpy", "transformers==5.24.0", "peft", "pydantic",
            "pyyaml", "typer", "rich", "datasets", "math-verify[antlr4_13_2]", "pytest",
        ),
        "the newest that there were",
    ),
}  # fmt: skip

# Title -> pytest's arguments, and the environment's. Left out is what hangs on the machine or on
# the problem rather than on versions, and what compares with packages that requirements.txt pins.
TRAINER = (
    "config", "model", "prompts", "rollout", "tasks", "test_cli.py", "training/test_agreement.py",
    "training/test_checkpoint.py", "training/test_loop.py",
)  # fmt: skip
PARTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "kernels": (
        (
            "tests/selfdistill_kernels", "-m", "not slow",
            "-k", "not trl and not sdpo_rl and not liger and not fuzz and not test_memory",
        ),
        {},
    ),
    "Triton, compiled": (("tests/aot", "-m", "not slow"), {}),
    "Triton, interpreted": (("tests/triton", "-m", "not slow"), {"TRITON_INTERPRET": "1"}),
    "trainer": ((*(f"tests/selfdistill/{name}" for name in TRAINER), "-m", "not slow"), {}),
}  # fmt: skip
SHOWN = (
    "torch", "triton", "numpy", "filelock", "transformers", "tokenizers", "safetensors", "peft",
    "pydantic", "pyyaml", "typer", "rich", "datasets", "math-verify",
    "latex2sympy2-extended", "sympy",
)  # fmt: skip

HEAD = """# Which versions were tested

Written by `make test-matrix` (tests/version_matrix.py), one environment a row, on a CPU. Each part
says passed / failed / skipped; `-rs` in the run says why something was skipped. The CUDA rows are
not built here. The ranges in pyproject.toml go from the lowest to the highest version of this table
(tests/test_compatibility.py).
"""


def find_python(version: str) -> str:
    """The interpreter of a version "3.N": on PATH, or the newest that pyenv has.

    Raises:
        RuntimeError: there is none.
    """
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [found] if found else []
    candidates += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/python")), reverse=True)
    for candidate in candidates:
        # A shim of pyenv is on PATH for versions that are not switched on, and fails.
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    raise RuntimeError(f"python{version}: neither on PATH nor in pyenv; install it with either")


def make_environment(row: Row, folder: Path) -> Path:
    """Install the row's packages; returns the interpreter that has them."""
    python = folder / "env" / "bin" / "python"
    if not python.exists():
        subprocess.run([find_python(row.python), "-m", "venv", folder / "env"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *COMMON, *row.packages], cwd=ROOT, check=True
    )
    return python


def build(python: Path, folder: Path) -> None:
    """Copy the working tree and build the extension in the copy."""
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    working_tree.copy_to(source)
    subprocess.run(
        [
            python, "setup.py", "--quiet", "build_ext", "--inplace",
            f"--build-lib={folder / 'built'}", f"--build-temp={folder / 'objects'}",
        ],
        # No CUDA rows: they take an nvcc of the very release, and most of an hour.
        cwd=source, check=True, env=os.environ | {"SELFDISTILL_KERNELS_BUILD": "cpu"},
    )  # fmt: skip


def run_part(python: Path, folder: Path, arguments: tuple[str, ...], extra: dict[str, str]) -> dict:
    """Counts and the names of failed tests of one part."""
    source, report = folder / "source", folder / "report.xml"
    report.unlink(missing_ok=True)
    began = time.monotonic()
    subprocess.run(
        [python, "-m", "pytest", "-q", "-rs", "-n", "2", f"--junitxml={report}", *arguments],
        cwd=source, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)} | extra,
    )  # fmt: skip
    if not report.exists():
        return {"passed": 0, "failed": 1, "skipped": 0, "failures": ["pytest gave no report"]}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "minutes": (time.monotonic() - began) / 60,
        "failures": [
            f"{case.get('classname')}.{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ],
    }


def versions(python: Path) -> dict[str, str]:
    """The installed versions of SHOWN."""
    told = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    installed = {e["name"].lower().replace("_", "-"): e["version"] for e in json.loads(told)}
    return {name: installed[name] for name in SHOWN}


def run_row(name: str, parts: list[str], keep: bool) -> None:
    """Make the row's environment, run its parts, and leave the result in build/matrix/NAME.json."""
    row, folder = ROWS[name], WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    python = make_environment(row, folder)
    build(python, folder)
    file = WORK / f"{name}.json"
    earlier = json.loads(file.read_text())["parts"] if file.exists() else {}
    result = {
        "date": date.today().isoformat(),
        "python": row.python,
        "versions": versions(python),
        "parts": earlier | {part: run_part(python, folder, *PARTS[part]) for part in parts},
    }
    file.write_text(json.dumps(result, indent=1))
    if not keep:
        shutil.rmtree(folder)


def table(results: dict[str, dict]) -> str:
    """docs/compatibility.md."""
    titles = ["row", "date", "python", *SHOWN, *PARTS]
    lines = [" | ".join(titles), " | ".join("---" for _ in titles)]
    failures = []
    for name, result in results.items():
        counts = []
        for part in PARTS:
            counted = result["parts"].get(part)
            keys = ("passed", "failed", "skipped")
            counts.append(" / ".join(str(counted[k]) for k in keys) if counted else "not run")
            by_test = Counter(f.partition("[")[0] for f in (counted or {}).get("failures", []))
            failures += [f"{name}, {part}: {count} of {test}" for test, count in by_test.items()]
        cells = [f"{name} ({ROWS[name].why})", result["date"], result["python"]]
        lines.append(" | ".join([*cells, *(result["versions"][key] for key in SHOWN), *counts]))
    text = HEAD + "\n" + "\n".join(f"| {line} |" for line in lines) + "\n"
    return text + "".join(f"\n- failed: {failure}" for failure in failures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="default: all")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    arguments = parser.parse_args()
    for name in arguments.rows or ROWS:
        print(f"== {name}", flush=True)
        run_row(name, arguments.part or list(PARTS), arguments.keep)
    files = {name: WORK / f"{name}.json" for name in ROWS}
    results = {n: json.loads(file.read_text()) for n, file in files.items() if file.exists()}
    # The Tritons below it are of tests/triton_matrix.py.
    _, title, others = TABLE.read_text().partition("\n## The Tritons that torch ships")
    TABLE.write_text(table(results).rstrip("\n") + "\n" + title + others)
    failed = sum(part["failed"] for result in results.values() for part in result["parts"].values())
    return 1 if failed or len(results) < len(ROWS) else 0


if __name__ == "__main__":
    sys.exit(main())
