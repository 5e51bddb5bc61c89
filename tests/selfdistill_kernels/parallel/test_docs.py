"""docs/parallel.md names tests that exist, in the files that it names."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def test_every_test_that_is_named_exists() -> None:
    text = (ROOT / "docs/parallel.md").read_text()
    here = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`(?: of `(\S+\.py)`)?", text)
    assert len(named) > 10
    for test, file in named:
        source = (HERE.parent / file).read_text() if file else here
        assert f"def {test}(" in source, f"{test} is not in {file or 'the files beside this'}"
