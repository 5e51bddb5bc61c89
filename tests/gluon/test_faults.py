"""Faults planted in the specialised sweep, and what the emulator says of them."""

from __future__ import annotations

import pytest
import torch
from gluon_emulator import Deadlock, Fault, Race
from kernel_cases import make_case
from specialised_cases import CLUSTERS, emulated_sweep, hopper, needs_clusters, needs_gluon

from selfdistill_kernels import Objective
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.triton.columns import STUDENT_MAX, STUDENT_SUM
from selfdistill_kernels.backends.triton.problem import Problem, Selection
from selfdistill_kernels.logits import LogitTransform

pytestmark = needs_gluon
CASE = make_case(66, 192, 200, seed=2)
CASE.weight /= 16  # so that every entry counts
FULL = "mbarrier.wait(full.index(stage), step // STAGES & 1)"
UNREAD = "mbarrier.wait(unread.index(stage), phase)"


def sweep(cluster: int = 1, **options: object) -> torch.Tensor:
    """The student's log-sum-exp of each row, by one cluster: six steps through a ring of four."""
    case = CASE.cast(torch.bfloat16)
    inputs = LinearInputs(
        case.student_hidden, case.teacher_hidden, case.weight, None, None, None, case.targets,
        None, LogitTransform(),
    )  # fmt: skip
    problem = Problem(inputs, Objective("forward_kl"), hopper(cluster))
    selection = Selection.of(torch.ones(66, dtype=torch.bool))
    student, teacher = case.student_hidden, case.teacher_hidden
    partial = emulated_sweep(problem, selection, student, teacher, cluster=cluster, **options)
    parts = partial[:, STUDENT_MAX.value] + partial[:, STUDENT_SUM.value].log()
    return parts.logsumexp(0)


def exact() -> torch.Tensor:
    return (CASE.student_hidden @ CASE.weight.T).logsumexp(1).float()


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("seed", range(4))
def test_no_order_shows_a_fault(cluster, seed):
    torch.testing.assert_close(sweep(cluster, seed=seed), exact())


FAULTS = {
    "a consumer does not wait for the copies": (1, "_scores", FULL, "pass", Race),
    "a consumer waits for the wrong phase": (1, "_scores", FULL, FULL[:-1] + " ^ 1)", Fault),
    "the producer waits for the wrong phase": (
        1, "produce", "phase = (step // STAGES & 1) ^ 1", "phase = step // STAGES & 1", Deadlock,
    ),
    "the producer does not wait for the consumers": (
        1, "produce", "mbarrier.wait(empty.index(stage), phase)", "pass", Race,
    ),
    "a consumer does not say that it is done": (
        1, "_release", "mbarrier.arrive(empty.index(stage), pred=reading)", "pass", Deadlock,
    ),
    "a consumer says so before its products are done": (
        1, "_scores", "warpgroup_mma_wait(2,", "warpgroup_mma_wait(4,", Race,
    ),
    "a consumer sums before its products are done": (
        1, "_scores", "warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,", Fault,
    ),
    "the producer expects too few bytes": (
        1, "produce", "mbarrier.expect(ready, STEP_BYTES)",
        "mbarrier.expect(ready, STEP_BYTES // 2)", Fault,
    ),
    "the consumers share a buffer": (
        1, "produce", "stage * CONSUMERS + consumer", "stage * CONSUMERS", Race,
    ),
    "a head tile goes to a program that still reads": (2, "produce", UNREAD, "pass", Race),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=needs_clusters) if cluster > 1 else name
        for name, (cluster, *_) in FAULTS.items()
    ],
)
def test_a_fault_is_caught(fault):
    """In at least one of a few orders, and a deadlock in each."""
    cluster, function, old, new, error = FAULTS[fault]
    caught = []
    for seed in range(4):
        try:
            sweep(cluster, seed=seed, edits={function: (old, new)})
        except Fault as found:
            caught.append(found)
    assert any(isinstance(found, error) for found in caught), caught
    assert error is not Deadlock or len(caught) == 4


def test_an_unmasked_tail_is_caught():
    """The vocabulary ends within a tile, and the kernel is told that it does not."""
    with pytest.raises(AssertionError, match="Mismatched"):
        torch.testing.assert_close(sweep(told={"MASKED": False}), exact())


def test_a_fault_that_is_not_planted_is_no_fault():
    with pytest.raises(ValueError, match="does not read 'no such text' once"):
        sweep(edits={"produce": ("no such text", "pass")})
