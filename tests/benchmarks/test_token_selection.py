from __future__ import annotations

import torch

from benchmarks.problems import Shape
from benchmarks.token_selection import ratios, ways


def test_every_way_is_compared_with_all_tokens() -> None:
    threads = torch.get_num_threads()
    try:
        found = ratios(0.2, 1, trained=True, shape=Shape(10, 16, 64))
    finally:
        torch.set_num_threads(threads)
    assert found.keys() == ways(0.2).keys()
    assert found["all tokens"] == 1.0
    assert all(ratio > 0 for ratio in found.values())
