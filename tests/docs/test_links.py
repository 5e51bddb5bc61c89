"""Pages link to pages here alone, which `make docs` checks; nothing checks other links. The
reader's own machine, in an example, is no link."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]


def test_no_page_links_elsewhere() -> None:
    pages = [*PAGES, *(ROOT / "docs").rglob("*.md")]
    assert len(pages) > 20
    found = {
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"https?://(?!localhost)[^\s)>`]+", page.read_text())
    }
    assert not found
