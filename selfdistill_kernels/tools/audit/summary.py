"""python -m selfdistill_kernels.tools.audit.summary FILE...: one line for each kernel.

The files are what `--json` wrote. A whole audit has some 1,400 entries; this prints ranges over the
variants of each kernel, and how much memory would be spilled where. --join writes the entries of
all files into one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    "| target | dtype | kernel | variants | far | tiles | registers | of them AGPRs | spilled "
    "| scalars spilled | shared KiB | programs per SM | warps per SM | tensor core "
    "| asynchronous copies | code KiB | s | refused |"
)
Entry = Mapping[str, Any]


def summarize(entries: Sequence[Entry]) -> list[str]:
    """Return Markdown lines: a row for each target, dtype and kernel, in order of appearance."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["target"], entry["dtype"], entry["kernel"]), []).append(entry)
    rows = ["| " + " | ".join([*key, *_cells(group)]) + " |" for key, group in groups.items()]
    return [HEADER, "|---" * HEADER.count(" | ") + "|---|", *rows]


def _cells(group: Sequence[Entry]) -> list[str]:
    compiled = [entry for entry in group if "registers" in entry]
    return [
        str(len(group)),
        str(sum(bool(entry.get("far")) for entry in group)),
        ", ".join(dict.fromkeys(entry["tile"] for entry in group)),
        _range(entry["registers"] for entry in compiled),
        _range(entry["accumulators"] for entry in compiled if "accumulators" in entry),
        str(sum(sum(_counts(entry["spilled"])) for entry in compiled)),
        _range(entry["scalars_spilled"] for entry in compiled if "scalars_spilled" in entry),
        _range(entry["shared"] / 1024 for entry in compiled),
        _range(entry["resident"] for entry in compiled),
        _range(entry["resident_warps"] for entry in compiled if "resident_warps" in entry),
        _instructions(compiled, "tensor"),
        _instructions(compiled, "asynchronous"),
        _range(entry["code_bytes"] / 1024 for entry in compiled),
        f"{sum(entry['seconds'] for entry in compiled):.0f}",
        str(sum(bool(entry["refusals"]) for entry in group)),
    ]


def _counts(value: int | Mapping[str, int]) -> Iterable[int]:
    return value.values() if isinstance(value, Mapping) else [value]


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    if not found:
        return "-"
    low, high = f"{found[0]:.0f}", f"{found[-1]:.0f}"
    return low if low == high else f"{low}-{high}"


def _instructions(entries: Sequence[Entry], name: str) -> str:
    kinds = dict.fromkeys(kind for entry in entries for kind in entry[name])
    return ", ".join(
        f"{_range(entry[name].get(kind, 0) for entry in entries)} {kind}" for kind in kinds
    )


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m selfdistill_kernels.tools.audit.summary", description=__doc__
    )
    parser.add_argument("files", type=Path, nargs="+", help="what --json wrote")
    parser.add_argument("--join", type=Path, help="write the entries of all files here")
    options = parser.parse_args(arguments)
    documents = [json.loads(path.read_text()) for path in options.files]
    versions = sorted({document["triton"] for document in documents})
    if len(versions) > 1:
        parser.error(f"files come from different versions of triton: {', '.join(versions)}")
    entries = [entry for document in documents for entry in document["entries"]]
    if options.join is not None:
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        options.join.write_text(f'{{"triton": "{versions[0]}", "entries": [\n{lines}\n]}}\n')
    refused = sum(bool(entry["refusals"]) for entry in entries)
    print(f"triton {versions[0]}; {len(entries)} kernels compiled, {refused} refused\n")
    print("\n".join(summarize(entries)))


if __name__ == "__main__":
    main()
