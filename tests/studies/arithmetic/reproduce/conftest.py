"""Output folders of finished plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from finished_plan import SMALL, write_finished

from studies.arithmetic.reproduce.findings import Findings, collect
from studies.arithmetic.reproduce.job_list import build_plan


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[str], float]], Path]:
    """Return a factory of output folders in which every job of SMALL is finished.

    It takes the share of right attempts as a function of the job's name.
    """

    def make(share: Callable[[str], float]) -> Path:
        output = tmp_path_factory.mktemp("runs")
        for job in build_plan("solver", SMALL):
            write_finished(job, output, share)
        return output

    return make


@pytest.fixture(scope="session")
def paper_findings(finished: Callable[[Callable[[str], float]], Path]) -> Findings:
    """Return the findings of runs that came out in the paper's order, everywhere."""

    def share(name: str) -> float:
        if "stepalign" in name:
            return 0.75
        return 0.5 if "refsol" in name else 0.25

    return collect(finished(share), SMALL)
