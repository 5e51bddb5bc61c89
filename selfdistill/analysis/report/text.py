"""Foreign text on a page: from models, data, files and configurations."""

from __future__ import annotations

from html import escape

from selfdistill.visible import visible


def plain(text: str) -> str:
    """Return text for where no element may stand: attributes, drawings, the page's title."""
    return escape(visible(text))


def isolated(text: str) -> str:
    """Return text as HTML that does not turn round what is written beside it."""
    return f"<bdi>{plain(text)}</bdi>"
