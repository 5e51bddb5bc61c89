"""AdvantageMask.select against a plain reading of its definition."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill_kernels import AdvantageMask

ADVANTAGES = st.lists(st.sampled_from([-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 2.0]), max_size=12)


@settings(deadline=None)
@given(
    values=ADVANTAGES,
    threshold=st.sampled_from([0.0, 0.1, 0.4]),
    sign=st.sampled_from(["any", "negative", "positive"]),
    top=st.sampled_from([None, 0.1, 0.5, 1.0]),
    data=st.data(),
)
def test_definition(values, threshold, sign, top, data):
    exists = [data.draw(st.booleans()) for _ in values]
    threshold = float(torch.tensor(threshold))  # the threshold as float32 sees it
    advantage = torch.tensor(values)
    keep = [
        there
        and {
            "any": abs(a) > threshold,
            "negative": a < -threshold,
            "positive": a > threshold,
        }[sign]
        for there, a in zip(exists, advantage.tolist(), strict=True)
    ]
    if top is not None:
        allowed = math.ceil(sum(exists) * top)
        ranked = sorted((i for i, k in enumerate(keep) if k), key=lambda i: -abs(values[i]))
        keep = [i in ranked[:allowed] for i in range(len(values))]
    chosen = AdvantageMask(threshold, sign, top).select(advantage, torch.tensor(exists).bool())
    assert chosen.tolist() == keep


def test_nan_is_kept_so_that_it_is_seen():
    advantage = torch.tensor([float("nan"), 0.0])
    exists = torch.ones(2, dtype=torch.bool)
    for sign in ("any", "negative", "positive"):
        for top in (None, 0.5):
            assert AdvantageMask(0.1, sign, top).select(advantage, exists).tolist() == [True, False]
