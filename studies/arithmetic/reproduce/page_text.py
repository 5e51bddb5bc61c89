"""The text of a page of results: sections of a template, and the folder where the page goes."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from selfdistill.places import PlaceTakenError, try_folder


class PageText:
    """A template whose sections begin with a comment that names them.

    Args:
        template: the file; names after a dollar sign are replaced.
        page: the name of the file that is written.
        command: what writes it, for messages.
    """

    def __init__(self, template: Path, *, page: str, command: str) -> None:
        pattern = r"<!-- ([a-z ]+) -->\n(.*?)\n(?=<!-- |\Z)"
        self._sections = dict(re.findall(pattern, template.read_text("utf-8"), re.DOTALL))
        self.page = page
        self._command = command

    def text(self, name: str, **values: object) -> str:
        """Return a section with its names replaced."""
        return Template(self._sections[name]).substitute(values)

    def note(self, name: str, **values: object) -> str:
        """Return a section as the one line below a table."""
        return " ".join(self.text(name, **values).split())

    def refuse_foreign_results(self, folder: Path) -> None:
        """Make sure that a page replaces nothing but an earlier one.

        Raises:
            PlaceTakenError: the folder has a file of that name that does not begin as the page.
            OSError: the folder cannot be created or written.
        """
        path, title = folder / self.page, self._sections["head"].splitlines()[0]
        if path.exists() and not path.read_bytes().startswith(title.encode()):
            raise PlaceTakenError(
                f"{path} is not the page of an earlier `{self._command}`, and would be replaced: "
                "choose another folder (--results)"
            )
        try_folder(folder)
