"""The kernel's card, with figures read off docs/benchmarks.md."""

from __future__ import annotations

import re
from pathlib import Path

import selfdistill_kernels

RUN = "One long run"
PROBLEM = "N/H/V 512/576/49152, float32"


def card(benchmarks: Path, version: int) -> str:
    """The text of the card.

    Args:
        benchmarks: docs/benchmarks.md.
        version: of the kernel.

    Raises:
        ValueError: benchmarks has no such run, problem or table.
    """
    table, when = figures(benchmarks.read_text(encoding="utf-8"))
    values = {
        "VERSION": str(version),
        "FUNCTIONS": ", ".join(f"`{name}`" for name in selfdistill_kernels.__all__),
        "WHEN": when,
        "TABLE": table,
    }
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    return re.sub(r"@([A-Z]+)@", lambda found: values[found[1]], text)


def figures(benchmarks: str) -> tuple[str, str]:
    """The table of one problem, and one sentence that says when and on what it was measured."""
    run = _between(benchmarks, f"\n## {RUN}\n", "\n## ")
    problem = _between(run, f"\n### {PROBLEM}\n", "\n### ")
    table = "\n".join(line for line in problem.splitlines() if line.startswith("|"))
    measured = re.search(r"(\d{4}-\d\d-\d\d), revision (\w+)", run)
    facts = dict(re.findall(r"^- (device|threads|torch): (.+)$", run, flags=re.MULTILINE))
    if not table or measured is None or facts.keys() != {"device", "threads", "torch"}:
        raise ValueError(f"docs/benchmarks.md: {RUN!r} lacks its table, its date or its machine")
    when = (
        f"Measured on {measured[1]} at revision {measured[2]}, {PROBLEM}: {facts['device']}, "
        f"{facts['threads']} threads, torch {facts['torch']}."
    )
    return table, when


def _between(text: str, start: str, end: str) -> str:
    if start not in text:
        raise ValueError(f"docs/benchmarks.md has no heading {start.strip()!r}")
    return text.partition(start)[2].partition(end)[0]
