"""Bad input is refused early: the message names the argument, what came and what was expected."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)
from selfdistill_kernels.backends.native.plan import copied_bytes

N, H, V = 6, 8, 31


def arguments(**changes):
    case = make_case(N, H, V).cast(torch.float32)
    given = {
        "student_hidden": case.student_hidden,
        "teacher_hidden": case.teacher_hidden,
        "weight": case.weight,
        "targets": case.targets,
    }
    return {**given, **changes}


BAD = {
    "student is a list": ({"student_hidden": [1.0]}, TypeError, "student_hidden: .*list"),
    "integer student": (
        {"student_hidden": torch.ones(N, H, dtype=torch.int64)},
        TypeError,
        "student_hidden: .*int64",
    ),
    "scalar student": ({"student_hidden": torch.tensor(1.0)}, ValueError, "student_hidden"),
    "hidden size": (
        {"student_hidden": torch.ones(N, H + 1)},
        ValueError,
        "student_hidden: hidden size 9 .*expected .*8",
    ),
    "weight of three dimensions": (
        {"weight": torch.ones(1, V, H)},
        ValueError,
        r"weight: .*\[V, H\]",
    ),
    "empty head": ({"weight": torch.ones(0, H)}, ValueError, "weight: .*empty"),
    "dtype of the head": ({"weight": torch.ones(V, H).bfloat16()}, TypeError, "weight: .*bfloat16"),
    "device of the head": (
        {"weight": torch.ones(V, H, device="meta")},
        ValueError,
        "weight: expected device cpu .*got meta",
    ),
    "teacher's leading shape": (
        {"teacher_hidden": torch.ones(N + 1, H)},
        ValueError,
        r"teacher_hidden: expected shape \(6, 8\).*got \(7, 8\)",
    ),
    "teacher's size with a shared head": (
        {"teacher_hidden": torch.ones(N, H + 2)},
        ValueError,
        "teacher_hidden: hidden size 10 .*shares `weight`",
    ),
    "teacher's vocabulary": (
        {"teacher_weight": torch.ones(V + 1, H)},
        ValueError,
        "teacher_weight: .*31 rows",
    ),
    "teacher's dtype": (
        {"teacher_hidden": torch.ones(N, H).double(), "teacher_weight": torch.ones(V, H).double()},
        TypeError,
        "teacher_hidden: expected torch.float32",
    ),
    "bias shape": ({"bias": torch.ones(V + 1)}, ValueError, r"bias: expected shape \(31,\)"),
    "teacher bias shape": ({"teacher_bias": torch.ones(2)}, ValueError, "teacher_bias: expected"),
    "targets shape": (
        {"targets": torch.zeros(N + 1, dtype=torch.int64)},
        ValueError,
        r"targets: expected shape \(6,\)",
    ),
    "float targets": ({"targets": torch.zeros(N)}, TypeError, "targets: .*int.*float32"),
    "target too large": (
        {"targets": torch.full((N,), V)},
        ValueError,
        r"targets: token id 31 .*\[0, 31\)",
    ),
    "negative target": ({"targets": torch.full((N,), -3)}, ValueError, "targets: token id -3"),
    "float mask": ({"mask": torch.ones(N)}, TypeError, "mask: .*bool or integer.*float32"),
    "mask shape": ({"mask": torch.ones(N, 1, dtype=torch.bool)}, ValueError, "mask: expected"),
    "token_weight shape": ({"token_weight": torch.ones(2)}, ValueError, "token_weight: expected"),
    "integer token_weight": (
        {"token_weight": torch.ones(N, dtype=torch.int64)},
        TypeError,
        "token_weight: .*float",
    ),
    "unknown objective": ({"objective": "kl"}, ValueError, "objective: .*'kl'.*forward_kl"),
    "objective of another type": ({"objective": 3}, TypeError, "objective: .*int"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be > 0, got 0.0"),
    "nan temperature": ({"temperature": float("nan")}, ValueError, "temperature"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be > 0"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: .*'avg'.*sequence_mean"),
    "sequence_mean of a flat batch": ({"reduction": "sequence_mean"}, ValueError, "sequence_mean"),
    "normalizer of nothing": ({"normalizer": 0}, ValueError, "normalizer: .*> 0, got 0"),
    "normalizer of many": ({"normalizer": torch.ones(2)}, ValueError, "normalizer: .*one number"),
    "normalizer of another type": ({"normalizer": "n"}, TypeError, "normalizer: .*'n'"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend: .*'cuda'.*native"),
    "workspace name": ({"workspace": "big"}, TypeError, "workspace: .*'big'"),
    "workspace of nothing": ({"workspace": 0}, ValueError, "workspace: .*0"),
    "policy gradient without targets": (
        {"targets": None, "objective": "policy_gradient"},
        ValueError,
        "targets: policy_gradient",
    ),
    "importance clip without old log-probs": (
        {"objective": Objective(importance_clip=2.0)},
        ValueError,
        "old_logprobs: missing",
    ),
    "old log-probs that nothing uses": (
        {"old_logprobs": torch.zeros(N)},
        ValueError,
        "old_logprobs: given",
    ),
    "per-step mask without steps": (
        {"advantage_mask": AdvantageMask(per_step=True)},
        ValueError,
        "step_ids: missing",
    ),
    "advantage mask without targets": (
        {"targets": None, "advantage_mask": AdvantageMask(0.1)},
        ValueError,
        "targets: advantage_mask",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_distillation_refuses(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=message):
        fused_linear_distillation(**arguments(**changes))


def test_native_refuses_a_workspace_without_room_for_a_tile():
    # Two rows of 16 logits, and copies of a token's hidden states.
    least = 8 * 16 + copied_bytes(H, 2)
    with pytest.raises(ValueError, match=rf"workspace: 100 bytes .*at least {least} bytes"):
        fused_linear_distillation(**arguments(workspace=100, backend="native"))


def test_native_refuses_other_dtypes():
    double = {k: v.double() for k, v in arguments().items() if k != "targets"}
    with pytest.raises(ValueError, match=r"backend: 'native' takes .*got torch.float64"):
        fused_linear_distillation(**double, backend="native")


def test_objective_refuses():
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
        Objective("jsd", beta=1.5)
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        Objective("kl")
    with pytest.raises(ValueError, match="divergence_clip must be > 0"):
        Objective(divergence_clip=0.0)
    with pytest.raises(ValueError, match='"none" needs'):
        Objective("none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold must be >= 0"),
        ({"threshold": float("nan")}, "threshold must be >= 0"),
        ({"sign": "up"}, "unknown sign 'up'"),
        ({"top_fraction": 0.0}, r"top_fraction must lie in \(0, 1\]"),
        ({"top_fraction": 1.5}, r"top_fraction must lie in \(0, 1\]"),
    ],
)
def test_advantage_mask_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AdvantageMask(**options)


def test_module_refuses_when_it_is_made():
    with pytest.raises(ValueError, match="temperature"):
        FusedLinearDistillationLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="reduction"):
        FusedLinearDistillationLoss(reduction="avg")
    with pytest.raises(ValueError, match="backend: unknown name 'cuda'"):
        FusedLinearDistillationLoss(backend="cuda")


def test_logprobs_refuse():
    case = make_case(N, H, V).cast(torch.float32)
    with pytest.raises(TypeError, match=r"targets: expected a torch\.Tensor, got NoneType"):
        fused_linear_logprobs(case.student_hidden, case.weight, None)
    with pytest.raises(ValueError, match="hidden: hidden size"):
        fused_linear_logprobs(case.student_hidden[:, :3], case.weight, case.targets)


def test_logits_refuse():
    with pytest.raises(ValueError, match=r"teacher_logits: expected shape \(2, 3\)"):
        distillation_from_logits(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(TypeError, match="teacher_logits: expected dtype"):
        distillation_from_logits(torch.ones(2, 3), torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=r"targets: policy_gradient.*student_logits"):
        distillation_from_logits(torch.ones(2, 3), torch.ones(2, 3), objective="policy_gradient")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integers_serve_as_masks(dtype):
    """transformers and TRL keep attention_mask and completion_mask as 0 and 1."""
    mask = torch.arange(N) % 3 != 0
    student, teacher = torch.randn(N, H), torch.randn(N, H)
    student[~mask] = torch.nan
    weight, targets = torch.randn(V, H), torch.randint(0, V, (N,))
    for function, inputs in (
        (fused_linear_distillation, (student, teacher, weight, targets)),
        (fused_linear_logprobs, (student, weight, targets)),
        (distillation_from_logits, (student, teacher, targets % H)),
    ):
        expected, found = (function(*inputs, mask=one) for one in (mask, mask.to(dtype)))
        names = ("loss", "active") if hasattr(found, "loss") else ("logprobs", "entropy")
        for name in names:
            assert torch.equal(getattr(found, name), getattr(expected, name))
