from __future__ import annotations

import pytest
import torch

from benchmarks.problems import OBJECTIVES, Shape, make_problem
from selfdistill_kernels import fused_linear_distillation


def test_shape_reads_what_it_prints():
    assert Shape.parse("512/576/49152") == Shape(512, 576, 49152)
    assert str(Shape(512, 576, 49152)) == "512/576/49152"


@pytest.mark.parametrize("text", ["512/576", "512/576/0", "a/b/c", "512/576/49152/1", "-1/2/3"])
def test_shape_refuses(text):
    with pytest.raises(ValueError, match="shape: expected N/H/V"):
        Shape.parse(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rho", [0.5, 0.2, 0.05])
def test_advantage_mask_keeps_the_prescribed_share(rho, dtype):
    problem = make_problem(Shape(200, 16, 151), dtype)
    out = fused_linear_distillation(
        problem.student_hidden,
        problem.teacher_hidden,
        problem.weight,
        problem.targets,
        advantage_mask=problem.advantage_mask(rho),
    )
    assert int(out.active.sum()) == round(200 * rho)
    assert torch.equal(out.active, problem.active(rho))


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.5])
def test_advantage_mask_refuses(rho):
    with pytest.raises(ValueError, match="rho: expected a share"):
        make_problem(Shape(4, 8, 16), torch.float32).advantage_mask(rho)


def test_problem_looks_like_self_distillation():
    """Close models, some tokens near certain and some not; the same numbers from the same seed."""
    problem = make_problem(Shape(256, 64, 4096), torch.float32)
    again = make_problem(Shape(256, 64, 4096), torch.float32)
    other = make_problem(Shape(256, 64, 4096), torch.float32, seed=1)
    assert torch.equal(problem.student_hidden, again.student_hidden)
    assert not torch.equal(problem.student_hidden, other.student_hidden)
    student, teacher = (
        torch.log_softmax(hidden.detach() @ problem.weight.detach().T, -1)
        for hidden in (problem.student_hidden, problem.teacher_hidden)
    )
    entropy = -(student.exp() * student).sum(-1)
    assert entropy.min() < 0.5
    assert entropy.max() > 3.0
    divergence = (student.exp() * (student - teacher)).sum(-1)
    assert 0.01 < divergence.mean() < 1.0


def test_problem_refuses_an_objective_that_peers_lack():
    with pytest.raises(ValueError, match=f"objective: expected one of {', '.join(OBJECTIVES)}"):
        make_problem(Shape(4, 8, 16), torch.float32, objective="skew_kl")
