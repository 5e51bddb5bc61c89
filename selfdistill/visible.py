"""Text from models, data and servers, safe to print: characters that act on the display are shown.

A terminal obeys escape sequences, and directional marks turn round what is written beside them.
"""

from __future__ import annotations

import re

from rich.console import Console

# C0 and C1 controls but tab and new line, directional embeddings, overrides and isolates, and lone
# surrogates, which no encoding can write.
_ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Replace each character that acts on the display by its escape, such as \x1b or \u202e."""
    return _ACTING.sub(lambda match: _escaped(ord(match[0])), text)


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def say(console: Console, text: str) -> None:
    """Print one line, however long: nothing in it is markup, and nothing acts on the terminal."""
    console.print(visible(text), markup=False, highlight=False, soft_wrap=True)
