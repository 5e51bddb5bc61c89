from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.entry_clip import STOPPED, TURNED, UNCHANGED, draw, kinds_of_step, ratio
from benchmarks.problems import Shape


def test_a_clipped_entry_of_a_forward_kl_turns_round() -> None:
    kinds = kinds_of_step("forward_kl", 0.05, 99)
    assert kinds[49, 49] == kinds[50, 49] == UNCHANGED
    # The teacher's 0.9 and the student's 0.5: p_t log(p_t/p_s) = 0.53 for the first entry.
    assert kinds[49, 89] == TURNED
    # Both sides of the same: the first and the second entry change places.
    assert torch.equal(kinds, kinds.flip(0, 1))


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_without_a_clip_that_binds_nothing_changes(divergence: str) -> None:
    assert (kinds_of_step(divergence, 100.0, 19) == UNCHANGED).all()
    assert (kinds_of_step(divergence, 0.01, 19) != UNCHANGED).any()


def test_two_clipped_entries_have_no_step() -> None:
    assert (kinds_of_step("jsd", 0.01, 19) == STOPPED).any()


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw(0.05, tmp_path / "a.svg", points=9)
    draw(0.05, tmp_path / "b.svg", points=9)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_times_are_compared() -> None:
    threads = torch.get_num_threads()
    try:
        made, changed = ratio("forward_kl", 1e-4, 1, Shape(8, 16, 64))
    finally:
        torch.set_num_threads(threads)
    assert made > 0
    assert changed > 0
