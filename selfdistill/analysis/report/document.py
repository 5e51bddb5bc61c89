"""The frame of every page, and tables in it."""

from __future__ import annotations

import re

from selfdistill.analysis.report.style import STYLE
from selfdistill.analysis.report.text import isolated, plain
from selfdistill.evaluation.tables import TextTable


def document(title: str, body: str) -> str:
    """Return a whole page that needs nothing from elsewhere.

    Args:
        title: plain text.
        body: HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{plain(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def html_table(table: TextTable, *, figures: bool = True) -> str:
    """Return a table with its title and note; a wide one scrolls within itself.

    Args:
        table: what to show.
        figures: cells after the first are numbers: intervals become smaller, hyphens minus signs.
    """
    cell = _figure if figures else isolated
    head = "".join(f"<th>{isolated(name)}</th>" for name in table.head)
    rows = "".join(
        f"<tr><th>{isolated(name)}</th>{''.join(f'<td>{cell(text)}</td>' for text in texts)}</tr>"
        for name, *texts in table.rows
    )
    note = f"<p>{plain(table.note)}</p>" if table.note else ""
    return (
        f'<h3>{isolated(table.title)}</h3>{note}<div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _figure(text: str) -> str:
    """Escape "-8.1 [-9.1, -7.2]" and set its interval apart."""
    shown = re.sub(r"-(?=[\d.])", "&minus;", plain(text)).replace(" %", "&nbsp;%")
    return re.sub(r" (\[[^]]*\])$", r" <i>\1</i>", shown)
