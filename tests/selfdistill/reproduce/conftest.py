"""Output folders of finished plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finished_plan import SMALL, write_finished

from selfdistill.reproduce.plan import build_plan


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[Callable[[str], float]], Path]:
    """Return a factory of output folders in which every job of SMALL is finished.

    It takes the share of right attempts as a function of the job's name.
    """

    def make(share: Callable[[str], float]) -> Path:
        output = tmp_path / "runs"
        for job in build_plan("solver", SMALL):
            write_finished(job, output, share)
        return output

    return make
