"""Which Tritons the kernels were compiled and run with, and how the one that is there is named.

The one list: docs/compatibility.md has a row for each, which a test holds equal.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

# What tests/triton_matrix.py compiled with. Of a minor release the patch that is named was tested,
# and stands for the others.
TESTED_TRITON = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")

# A release such as "3.6.0", "3.6.0.post1" or "3.6.0+git5ad4bd3". A development build such as
# "3.6.0.dev1" or "3.6.0rc1" comes before the release and may be anything.
_RELEASE = re.compile(r"(\d+\.\d+)(?:\.\d+)*(?:\.post\d+)?(?:\+.*)?")


def untested(version: str) -> str | None:
    """None for a tested Triton, else what "auto" says when it refuses it."""
    found = _RELEASE.fullmatch(version)
    if found is not None and found[1] in {_minor(tested) for tested in TESTED_TRITON}:
        return None
    return (
        f"Triton {version} is none of those that were tested ({', '.join(TESTED_TRITON)}); install "
        "one of them, or take this one all the same with backend='triton'"
    )


def installed_triton() -> str | None:
    """The version of the package triton, whatever pip calls it, without importing it; None where
    there is none."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return None
    if spec.origin is None:  # a folder that is no package
        return "of an unknown version"
    found = re.search(
        r"""^__version__\s*=\s*['"]([^'"]+)""", Path(spec.origin).read_text("utf-8"), re.MULTILINE
    )
    return "of an unknown version" if found is None else found[1]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
