"""Compiles the GPU kernels with every Triton that was shipped with a supported torch.

    python tests/triton_matrix.py [--variants 3] [3.6.0 ...]

For each version of TESTED_TRITON it unpacks the wheel under build/matrix (no torch of CUDA's is
needed, and no GPU) and compiles, for the six audited targets and bfloat16, the first variants of
the sweep, the mixture sweep, the gradient and the product with their shipped tiles. It writes the
last section of docs/compatibility.md, which tests/test_compatibility.py reads; the rows of versions
that were not named stay as they are. About a minute of one core a version and variant.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from selfdistill_kernels.backends.triton_versions import TESTED_TRITON

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "compatibility.md"
TITLE = "## The Tritons that torch ships"
KERNELS = ("sweep", "mixture", "gradient", "product")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
# The torch whose wheel asks for it.
TORCH = {
    "3.5.1": "2.9",
    "3.6.0": "2.10, 2.11",
    "3.7.1": "2.12, 2.13",
    "3.8.0": "2.14",
    "3.9.0": "-",
}
HEAD = f"""
{TITLE}

Written by `python tests/triton_matrix.py`: the sweep, the mixture sweep, the gradient and the
product in bfloat16 with their shipped tiles, the first variants of each, compiled for the target on
a CPU. A cell says how many compiled, and what the audit (docs/gpu-evidence.md) says against some;
nothing here has run on a GPU. `backend="auto"` takes these releases and no other. The audit counts
every byte of stack as spilled: the 8 bytes of the product on sm_120 with 3.5.1 and 3.6.0 are
written and never read, those of the first sweep on sm_80 with 3.6.0 are one register that is
written and read once.

"""


def unpacked(version: str) -> Path:
    """A folder for PYTHONPATH with that Triton and nothing else."""
    folder = WORK / f"triton-{version}"
    if not (folder / "triton").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder,
             f"triton=={version}"],
            check=True,
        )  # fmt: skip
    return folder


def compile_all(variants: int) -> list[dict[str, Any]]:
    """Entries of the audit, with the Triton of this process."""
    from selfdistill_kernels.tools.audit.__main__ import entry_of
    from selfdistill_kernels.tools.audit.record import jobs

    entries = []
    for target in TARGETS:
        known = jobs(target, "bf16", [4096])
        for kernel in KERNELS:
            for job in [job for job in known if job.name == kernel][:variants]:
                entries.append(entry_of(job, target, "bf16"))
    return entries


def cell(entries: list[dict[str, Any]]) -> str:
    """How many kernels of a target compiled, and what is said against which."""
    against: dict[str, int] = {}
    for entry in entries:
        for reason in entry["refusals"]:
            against[f"{entry['kernel']} {reason}"] = (
                against.get(f"{entry['kernel']} {reason}", 0) + 1
            )
    said = "; ".join(f"{count} {what}" for what, count in against.items())
    return f"{len(entries)}" + (f": {said}" if said else "")


def row(version: str, record: dict[str, Any]) -> str:
    """One line of the table."""
    by_target = [[e for e in record["entries"] if e["target"] == target] for target in TARGETS]
    return line_of(version, TORCH[version], record["date"], *map(cell, by_target))


def line_of(*cells: str) -> str:
    """Cells as a line of a table."""
    return f"| {' | '.join(cells)} |"


def rows_of(page: str) -> dict[str, str]:
    """The lines that the page's table has, by their version."""
    _, _, table = page.partition(f"\n{TITLE}")
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


def section(rows: dict[str, str]) -> str:
    """The table, a row a version in the order of TESTED_TRITON."""
    titles = ["Triton", "torch that ships it", "date", *TARGETS]
    head = [line_of(*titles), line_of(*("---" for _ in titles))]
    return HEAD + "\n".join(head + [rows[v] for v in TESTED_TRITON if v in rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="default: all")
    parser.add_argument("--variants", type=int, default=3, help="of each kernel (default: 3)")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        record = {
            "date": date.today().isoformat(), "entries": compile_all(arguments.variants)
        }  # fmt: skip
        arguments.one.write_text(json.dumps(record, indent=1))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    page = PAGE.read_text("utf-8")
    rows = rows_of(page)
    for version in arguments.versions or TESTED_TRITON:
        file = WORK / f"triton-{version}.json"
        path = os.pathsep.join(map(str, (unpacked(version), ROOT)))
        subprocess.run(
            [sys.executable, __file__, "--one", file, "--variants",
             str(arguments.variants)],
            cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        rows[version] = row(version, json.loads(file.read_text("utf-8")))
    first, _, _ = page.partition(f"\n{TITLE}")
    PAGE.write_text(first.rstrip("\n") + "\n" + section(rows), "utf-8")


if __name__ == "__main__":
    main()
