"""The record of a run: one JSON, and a page of the same for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Wrong
from benchmarks.report import Table, markdown_table

TITLES = {
    "values": "Small problems against float64",
    "whole": "A real size against float64",
    "tiles": "Tiles",
    "losses": "The loss beside floor and peers",
    "step": "A training step",
    "specialised": "A sweep with specialised warps",
}


def wrong_of(record: Mapping[str, Any]) -> Wrong | None:
    """The wrong value that ended a section, from its file."""
    found = record["wrong"]
    return None if found is None else Wrong(**{**found, "entry": tuple(found["entry"])})


def write(
    folder: Path,
    environment: Mapping[str, Any],
    sections: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
) -> list[Path]:
    """Write record.json and page.md.

    Args:
        environment: facts of the machine; sections: what each left in its file.
        failures: sections that ended in an error, with its last lines, by name.
    """
    record = {"environment": environment, "sections": sections, "failures": failures}
    paths = [folder / "record.json", folder / "page.md"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    paths[1].write_text("\n".join(page(environment, sections, failures)) + "\n")
    return paths


def page(
    environment: Mapping[str, Any],
    sections: Sequence[Mapping[str, Any]],
    failures: Mapping[str, str],
) -> list[str]:
    """Markdown lines."""
    lines = [f"# {environment['device']}", "", *_verdict(sections, failures), ""]
    lines += [f"- {fact}: {value}" for fact, value in environment.items()]
    for section in sections:
        name = section["name"]
        lines += ["", f"## {TITLES[name]}", "", f"{section['seconds']:.0f} s."]
        wrong = wrong_of(section)
        if wrong is not None:
            lines += ["", "```", *wrong.lines(), "```"]
        for table in section["tables"]:
            body = [tuple(cells) for cells in table["body"]]
            lines += markdown_table(Table(table["title"], tuple(table["head"]), body))
        lines += [text for plot in section["plots"] for text in ("", f"![{plot}]({plot})")]
        if section["left_out"]:
            lines += ["", *(f"- left out: {what}" for what in section["left_out"])]
    for name, error in failures.items():
        lines += ["", f"## {TITLES[name]}: failed", "", "```", error, "```"]
    return lines


def _verdict(sections: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> list[str]:
    wrong = [section["name"] for section in sections if section["wrong"] is not None]
    if wrong:
        return [f"**A value is wrong ({TITLES[wrong[0]]}); nothing ran after it.**"]
    if failures:
        return [f"**Failed: {', '.join(TITLES[name] for name in failures)}.**"]
    left_out = sum(len(section["left_out"]) for section in sections)
    ran = ", ".join(section["name"] for section in sections)
    return [f"No value was wrong. Sections: {ran}; {left_out} things were left out, named below."]
