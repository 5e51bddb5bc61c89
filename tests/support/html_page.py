"""Reads a page of `selfdistill.analysis.report` for assertions."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = ("meta", "line", "rect", "polyline", "input")


class Page(HTMLParser):
    """Collects what the assertions look at; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.sections: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "section":
            self.sections.append(found["id"] or "")
        if tag not in VOID:
            self.open.append((tag, found.get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(([name for _, names in self.open for name in names.split()], data))

    def within(self, *classes: str) -> str:
        """Return the text inside elements that nest all these classes."""
        return "".join(text for around, text in self.texts if set(classes) <= set(around))


def read(path: Path) -> Page:
    return Page(path.read_text("utf-8"))
