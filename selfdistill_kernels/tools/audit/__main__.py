"""python -m selfdistill_kernels.tools.audit: see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import triton

from selfdistill_kernels.backends.triton.plan import is_amd
from selfdistill_kernels.tools.audit.build import build
from selfdistill_kernels.tools.audit.judgement import (
    LIMITS,
    refusals,
    resident_programs,
    resident_warps,
)
from selfdistill_kernels.tools.audit.record import DTYPES, HIDDEN_SIZES, Job, jobs

HEADER = (
    "| target | kernel | dtype | used by | far | tile | warps x stages | registers | of them AGPRs "
    "| spilled | scalars spilled | shared KiB | programs per SM | warps per SM | tensor core "
    "| async copies | code KiB | s | verdict |"
)


def audit(
    architectures: Iterable[str], dtypes: Iterable[str], kernels: Iterable[str] | None
) -> list[dict[str, object]]:
    """Compile and judge; prints a table row for each kernel as it is done."""
    print(HEADER)
    print("|---" * HEADER.count(" | ") + "|---|", flush=True)
    entries = []
    for architecture in architectures:
        for dtype in dtypes:
            for job in jobs(architecture, dtype):
                if kernels is None or job.name in kernels:
                    entry = entry_of(job, architecture, dtype)
                    entries.append(entry)
                    print(_row(entry), flush=True)
    return entries


def entry_of(job: Job, architecture: str, dtype: str) -> dict[str, object]:
    """What `--json` writes of one kernel: compiled, read and judged."""
    constants = dict(job.constants)
    blocks = [value for name, value in constants.items() if name.startswith("BLOCK")]
    entry: dict[str, object] = {
        "target": architecture,
        "kernel": job.name,
        "dtype": dtype,
        "uses": list(job.uses),
        "far": list(job.far) if is_amd(architecture) else [],
        "tile": "x".join(map(str, blocks)),
        "warps": job.shape.warps,
        "stages": job.shape.stages,
    }
    try:
        report = build(job, architecture)
    except Exception as error:  # a kernel that does not compile is an entry of the table
        first = str(error).strip().splitlines() or [repr(error)]
        return {**entry, "refusals": [f"does not compile: {first[0]}"]}
    return {
        **entry,
        **asdict(report),
        "resident": resident_programs(report, architecture),
        "resident_warps": resident_warps(report, architecture),
        "refusals": refusals(job.name, report, architecture),
    }


def _row(entry: dict[str, object]) -> str:
    def counts(name: str) -> str:
        found = entry.get(name)
        assert found is None or isinstance(found, dict)
        return ", ".join(f"{count} {what}" for what, count in (found or {}).items()) or "-"

    def kibibytes(name: str) -> str:
        value = entry.get(name, 0)
        assert isinstance(value, int)
        return f"{value / 1024:.1f}"

    uses, far, why = entry["uses"], entry["far"], entry["refusals"]
    assert isinstance(uses, list)
    assert isinstance(far, list)
    assert isinstance(why, list)
    seconds = entry.get("seconds", 0.0)
    cells = [
        entry["target"], entry["kernel"], entry["dtype"],
        uses[0] + (f" (+{len(uses) - 1})" if len(uses) > 1 else ""),
        ", ".join(far) or "-", entry["tile"], f"{entry['warps']} x {entry['stages']}",
        entry.get("registers", "-"), entry.get("accumulators", "-"), entry.get("spilled", "-"),
        entry.get("scalars_spilled", "-"), kibibytes("shared"), entry.get("resident", "-"),
        entry.get("resident_warps", "-"), counts("tensor"), counts("asynchronous"),
        kibibytes("code_bytes"), f"{seconds:.1f}", "; ".join(why) or "passes",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 when a kernel was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m selfdistill_kernels.tools.audit", description=__doc__
    )
    parser.add_argument("--target", choices=LIMITS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--kernel", action="append", help="default: all")
    parser.add_argument("--json", type=Path, help="write all entries here")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler; unset it for the audit")
    print(f"triton {triton.__version__}; H = {', '.join(map(str, HIDDEN_SIZES))} at run time\n")
    entries = audit(options.target or LIMITS, options.dtype or DTYPES, options.kernel)
    refused = [entry for entry in entries if entry["refusals"]]
    if options.json is not None:
        document = {"triton": triton.__version__, "entries": entries}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{len(entries)} kernels compiled, {len(refused)} refused")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
