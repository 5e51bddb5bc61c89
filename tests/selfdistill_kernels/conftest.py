"""Every test that takes `backend` runs on each of them."""

from __future__ import annotations

import pytest

from selfdistill_kernels.backends.registry import native_problem


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        problem = native_problem()
        assert problem is None, problem
    return request.param
