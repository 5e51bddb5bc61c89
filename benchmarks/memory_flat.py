"""Peak extra memory against the number of tokens: it should not grow with them.

    python -m benchmarks.memory_flat --output runs/benchmarks
    python -m benchmarks.memory_flat --contenders ours torch --tokens 1024 4096

Extra is beyond inputs and returned gradients; "beyond" is what remains after the plan's workspace.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import arguments
from benchmarks.environment import environment
from benchmarks.memory import MEBIBYTE, peak_extra_bytes
from benchmarks.peers import contenders, plan_of
from benchmarks.problems import DTYPES, Shape
from benchmarks.report import Table, markdown_table, print_table

TOKENS = (1024, 4096, 16384, 65536)


@dataclass(frozen=True)
class Peak:
    """One measurement; `workspace_bytes` is that of the plan, None for contenders without one."""

    contender: str
    dtype: str
    shape: str
    workspace_bytes: int | None
    extra_bytes: int


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parse(argv)
    console = Console()
    torch.set_num_threads(args.threads)
    peaks: list[Peak] = []
    for key in args.contenders:
        for dtype in args.dtypes:
            for tokens in args.tokens:
                shape = Shape(tokens, args.hidden, args.vocabulary)
                with console.status(f"{key}, {dtype}, {tokens} tokens"):
                    peaks.append(measure_peak(key, shape, dtype, args.workspace))
                _write(args.output, peaks)
    print_table(console, peak_table(peaks))
    console.print(f"wrote memory_flat.json and memory_flat.md to {args.output}", highlight=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_flat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", nargs="+", type=arguments.positive, default=TOKENS, metavar="N")
    add("--hidden", type=arguments.positive, default=576, metavar="H")
    add("--vocabulary", type=arguments.positive, default=49152, metavar="V")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--contenders", nargs="+", choices=contenders(), default=["ours"], metavar="NAME")
    add("--workspace", default="auto", type=arguments.workspace, help="of ours: MiB, or auto")
    add("--threads", type=arguments.positive, default=torch.get_num_threads())
    add("--output", type=Path, default=Path("runs/benchmarks"), metavar="DIR")
    return parser.parse_args(argv)


def measure_peak(key: str, shape: Shape, dtype: str, workspace: str | int) -> Peak:
    """Measure one contender on the CPU."""
    contender = contenders()[key]
    plan = None
    if contender.is_ours:
        plan = plan_of(
            shape, DTYPES[dtype], trained_head=contender.trained_head, workspace=workspace
        )
    return Peak(
        key,
        dtype,
        str(shape),
        None if plan is None else plan.bytes,
        peak_extra_bytes(key, shape, dtype, workspace=workspace),
    )


def peak_table(peaks: Sequence[Peak]) -> Table:
    body = []
    for peak in peaks:
        extra, workspace = peak.extra_bytes / MEBIBYTE, peak.workspace_bytes
        planned = ("", "")
        if workspace is not None:
            planned = (f"{workspace / MEBIBYTE:.1f}", f"{extra - workspace / MEBIBYTE:.1f}")
        body.append((peak.contender, peak.dtype, peak.shape, f"{extra:.1f}", *planned))
    head = ("", "dtype", "N/H/V", "extra MiB", "workspace MiB", "beyond MiB")
    return Table("Peak extra memory", head, body)


def _write(folder: Path, peaks: Sequence[Peak]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"environment": environment("cpu"), "peaks": [asdict(peak) for peak in peaks]}
    (folder / "memory_flat.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "memory_flat.md").write_text("\n".join(markdown_table(peak_table(peaks))) + "\n")


if __name__ == "__main__":
    main()
