"""Compares what two versions of the code wrote.

    python tests/support/same_numbers.py BEFORE AFTER

Both folders hold what the same commands left there: runs of `selfdistill train`, of the demo, of
`reproduce`. Every record of every .json and .jsonl file must be the same, number by number and to
the last bit, but for what depends on the moment and on the machine (IGNORED) and for the folders'
own names. Checkpoints are left out; the metrics of the next step tell of them. The status is 1
where something differs.

It shows of a change that must not change results that it does not: run the same commands with the
code before and after it, and compare.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Times, memory and dates; what describes the machine; the configuration, whose spelling may change.
IGNORED = {
    "seconds", "minutes", "peak_rss_mib", "date", "environment", "config", "job", "settings", "run",
}  # fmt: skip


def records(path: Path) -> list[Any]:
    """The documents of a .json file (one) or a .jsonl file (one a line)."""
    text = path.read_text("utf-8")
    return [json.loads(line) for line in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def differences(before: Any, after: Any, place: str) -> Iterator[str]:
    """Every place where two documents differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after} - IGNORED):
            if key not in before or key not in after:
                yield f"{place}.{key}: only {'after' if key in after else 'before'}"
            else:
                yield from differences(before[key], after[key], f"{place}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    # NaN is the same as NaN, 1 is not 1.0, and floats are written so that they can be read back.
    elif type(before) is not type(after) or repr(before) != repr(after):
        yield f"{place}: {before!r:.60} before, {after!r:.60} after"


def compare(before: Path, after: Path) -> tuple[list[str], int]:
    """What differs between two folders, and how many files were compared."""
    found = [
        {
            path.relative_to(folder)
            for path in folder.rglob("*.json*")
            if "checkpoints" not in path.parts and path.suffix in (".json", ".jsonl")
        }
        for folder in (before, after)
    ]
    told = [f"{name}: only in one of the folders" for name in sorted(found[0] ^ found[1])]
    both = sorted(found[0] & found[1])
    for name in both:
        told += differences(records(before / name), records(after / name), str(name))
    return told, len(both)


def main(before: str, after: str) -> int:
    told, count = compare(Path(before), Path(after))
    print(*told[:40], sep="\n")
    if len(told) > 40:
        print(f"and {len(told) - 40} more")
    if not count:
        print(f"{before} and {after} have no .json or .jsonl file in common: nothing was compared")
    print(f"{count} files compared, {len(told)} differences")
    return int(bool(told) or not count)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
