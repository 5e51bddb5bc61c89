"""What the shipped tiles of AMD GPUs cost in executed instructions."""

from __future__ import annotations

import pytest
from amd_machine.count import executed
from slow import slow_but

from selfdistill_kernels import Objective


@pytest.mark.parametrize("architecture", slow_but([], ["gfx942", "gfx950"]))
def test_whole_tiles_take_less_than_half_of_the_sweep_in_parts(architecture):
    """Parts of a tile are summed across lanes and waves, each for itself; a whole tile once."""
    shipped = executed(architecture, Objective("forward_kl"))["sweep"]
    in_parts = executed(architecture, Objective("forward_kl"), parts=4)["sweep"]
    assert shipped["MFMA"] == in_parts["MFMA"] > 0
    assert shipped["all"] < in_parts["all"] / 2
    assert shipped["S_BARRIER"] < in_parts["S_BARRIER"] / 2
