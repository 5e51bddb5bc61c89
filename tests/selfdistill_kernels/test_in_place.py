"""distillation_from_logits(in_place=True): the same numbers, in the logits' own memory."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DIVERGENCES, make_case

from selfdistill_kernels import AdvantageMask, Objective, distillation_from_logits


def logits_of(dtype=torch.float32, tokens=20, **shape):
    """A head's parameter, student logits that depend on it, teacher logits and targets."""
    case = make_case(tokens, **shape).cast(torch.float32)
    weight = case.weight.to(dtype).requires_grad_()
    student = case.student_hidden.to(dtype) @ weight.T
    return weight, student, (case.teacher_hidden @ case.weight.T).to(dtype), case.targets


MASKS = {
    "dense": {},
    "masked": {"mask": torch.arange(20) % 3 != 0},
    "advantage": {"advantage_mask": AdvantageMask(threshold=0.5)},
    "clipped": {"objective": Objective("reverse_kl", divergence_clip=0.3)},
    "small workspace": {"workspace": 8 * 101 * 6, "advantage_mask": AdvantageMask(threshold=0.5)},
    "transformed": {"temperature": 0.7, "softcap": 8.0},
}


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_same_bits_as_a_new_tensor(options, dtype, factor, backend):
    results = []
    for in_place in (False, True):
        weight, student, teacher, targets = logits_of(dtype)
        memory = student.data_ptr()
        out = distillation_from_logits(
            student, teacher, targets, in_place=in_place, backend=backend, **options
        )
        (slope,) = torch.autograd.grad(out.loss * factor, student, retain_graph=not in_place)
        if in_place:
            assert slope.data_ptr() == memory
        else:
            (expected,) = torch.autograd.grad(out.loss * factor, weight)
            assert expected.abs().sum() > 0
        results.append((out.loss, out.divergence, out.active, slope))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_head_gets_its_gradient(divergence, backend):
    gradients = []
    for in_place in (False, True):
        weight, student, teacher, targets = logits_of()
        distillation_from_logits(
            student, teacher, targets, objective=divergence, in_place=in_place, backend=backend
        ).loss.backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_without_a_gradient_nothing_is_overwritten(backend):
    _, student, teacher, targets = logits_of()
    student = student.detach()
    before = student.clone()
    distillation_from_logits(student, teacher, targets, in_place=True, backend=backend)
    assert torch.equal(student, before)


def test_others_who_saved_the_logits_hear_of_it():
    _, student, teacher, targets = logits_of()
    other = (student * student).sum()  # saves the logits
    out = distillation_from_logits(student, teacher, targets, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + out.loss).backward()


def test_second_backward_is_refused():
    weight, student, teacher, targets = logits_of()
    out = distillation_from_logits(student, teacher, targets, in_place=True)
    torch.autograd.grad(out.loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="in_place: backward ran twice"):
        torch.autograd.grad(out.loss, weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "one visit"),
        ({"objective": Objective(top_k=3)}, "one visit"),
        ({"advantage_mask": AdvantageMask(top_fraction=0.5)}, "one visit"),
    ],
)
def test_losses_that_need_two_visits_are_refused(change, message):
    _, student, teacher, targets = logits_of()
    with pytest.raises(ValueError, match=message):
        distillation_from_logits(student, teacher, targets, in_place=True, **change)


def test_tensors_that_cannot_be_overwritten_are_refused():
    _, student, teacher, targets = logits_of()
    with pytest.raises(ValueError, match="is a leaf"):
        distillation_from_logits(student.detach().requires_grad_(), teacher, targets, in_place=True)
    with pytest.raises(ValueError, match="contiguous"):
        distillation_from_logits(student.mT.contiguous().mT, teacher, targets, in_place=True)
    with pytest.raises(ValueError, match="share their memory"):
        distillation_from_logits(student, student.detach(), targets, in_place=True)


def test_no_tokens_at_all(backend):
    student = torch.zeros(0, 5).requires_grad_()
    loss = distillation_from_logits(
        student * 1.0, torch.zeros(0, 5), in_place=True, backend=backend
    ).loss
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 5)
