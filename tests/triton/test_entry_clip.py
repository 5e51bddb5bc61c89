"""Clipped entries in the Triton kernels, against float64, under the interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from clip_cases import (
    check_bits_of_rows,
    check_broken_token_alone,
    check_edge,
    check_exactly_at_the_clip,
    check_infinite_part,
    check_unclipped_bits,
    clipped_rows,
)
from interpreter import RAGGED_HIDDEN
from kernel_cases import DIVERGENCES, make_case
from slow import slow_but
from triton_case import check

from selfdistill_kernels import AdvantageMask, Objective
from selfdistill_kernels.backends.triton import backend as triton_backend

CAPPED = {"logit_scale": 1.7, "softcap": 6.0, "temperature": 1.3}
# At which some rows of the problem below are clipped and some are not.
CLIPS = dict.fromkeys(DIVERGENCES, 0.05) | {
    "jsd": 0.005, "skew_kl": 0.03, "skew_reverse_kl": 0.008,
}  # fmt: skip
MIXED = {"beta": 0.3, "cross_entropy": 0.3, "entropy": 0.2, "policy_gradient": 0.1}
SLABS = {"workspace": 7 * 4 * 64}
# Logits in memory, the sweep and the library's products, the sweep and ours.
PATHS = {"store": {}, "slabs": SLABS, "recompute": {"advantage_mask": AdvantageMask(0.05)}}
# Under the interpreter the maximum of a tile of NaNs is numpy's.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("transform", [{"bias": True}, CAPPED], ids=["bias", "soft cap"])
def test_values_and_gradients(divergence, path, transform):
    case = make_case(7, 17, 123, seed=3, closeness=0.3, **transform)
    objective = Objective(divergence, entry_clip=CLIPS[divergence], **MIXED)
    bound = clipped_rows(case, objective)
    assert bound.any()
    assert not bound.all()
    check(case, objective, mask=torch.arange(7) != 2, **PATHS[path])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", slow_but(["store"], PATHS))
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_16_bit_inputs(dtype, path, divergence):
    case = make_case(7, 64, 507, teacher_hidden=40, seed=5)
    objective = Objective(divergence, entry_clip=0.01)
    assert clipped_rows(case, objective).any()
    check(case, objective, dtype, roundings=48, **PATHS[path])


@pytest.mark.parametrize(
    ("divergence", "shape"), [("reverse_kl", (1, 65, 2)), ("skew_kl", (3, RAGGED_HIDDEN, 1031))]
)
@pytest.mark.parametrize("path", ["store", "recompute"])
def test_odd_shapes(divergence, shape, path):
    case = make_case(*shape, seed=6)
    objective = Objective(divergence, entry_clip=3e-4)
    assert clipped_rows(case, objective).any()
    # Of two entries one is clipped. What is left is log p / q = -0.45 of the other, whose logits
    # are -13: a rounding of theirs is thirty there, and plain torch may happen to have few.
    check(case, objective, roundings=96 if shape[2] == 2 else 8, **PATHS[path])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("path", slow_but(["store", "recompute"], PATHS))
def test_where_nothing_is_clipped_no_bit_changes(divergence, path):
    case = make_case(5, 9, 57, bias=True, seed=4)
    check_unclipped_bits(case, Objective(divergence, **MIXED), backend="triton", **PATHS[path])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_without_a_clipped_entry_keep_their_bits(divergence):
    case = make_case(9, 9, 57, seed=3, closeness=0.2)
    check_bits_of_rows(case, Objective(divergence, 0.3, entry_clip=CLIPS[divergence]), "triton")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_edge(divergence):
    check_edge(divergence, "triton")


def test_exactly_at_the_clip():
    check_exactly_at_the_clip("triton")


@pytest.mark.parametrize(
    ("divergence", "side"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0), ("skew_kl", 1)]
)
def test_an_infinite_part_is_clipped(divergence, side):
    check_infinite_part(divergence, side, "triton")


@pytest.mark.parametrize("divergence", slow_but(["forward_kl", "jsd"], DIVERGENCES))
def test_what_is_no_number_stays_in_its_token(divergence):
    check_broken_token_alone(divergence, "triton")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_rows_that_cannot_be_clipped_are_not_swept_again(divergence, monkeypatch):
    """That is what the clip costs: of 21 tokens with a KL of some 0.005 about a half."""
    looked = []
    second_sweep = triton_backend.second_sweep

    def counted(problem, selection, *arguments, **options):
        looked.append(int(selection.count))
        return second_sweep(problem, selection, *arguments, **options)

    monkeypatch.setattr(triton_backend, "second_sweep", counted)
    case = make_case(21, RAGGED_HIDDEN, 140, seed=1, closeness=0.03)
    objective = Objective(divergence, entry_clip=0.05)
    clipped = int(clipped_rows(case, objective).sum())
    check(case, objective, advantage_mask=AdvantageMask(0.0))
    assert 0 < clipped <= looked[0] < 21
    looked.clear()
    check(case, replace(objective, entry_clip=1e3), advantage_mask=AdvantageMask(0.0))
    assert looked == [0]
