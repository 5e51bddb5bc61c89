"""The loss between two heads is that of their materialised logits, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_models import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selfdistill_kernels import (
    AdvantageMask,
    DistillationOutput,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
)
from selfdistill_kernels.integrations import Head, HeadValues, LowRank, fused_head_distillation

VOCABULARY, HIDDEN, RANK = 97, 16, 3
GENERATOR = torch.Generator().manual_seed(11)


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR).requires_grad_(grad)


# Small, or the mass outside of the top k would be lost in the rounding of one minus the rest.
STUDENT, TEACHER = 0.3 * randn(2, 7, HIDDEN), 0.3 * randn(2, 7, HIDDEN)
TARGETS = torch.randint(0, VOCABULARY, (2, 7), generator=GENERATOR)
MASK = torch.ones(2, 7, dtype=torch.bool)
MASK[0, 5:] = False
WEIGHTS = randn(2, 7).abs()
OLD = randn(2, 7) - 4.0


def head(*, frozen: bool = True, **options: Any) -> HeadValues:
    low_rank = LowRank(randn(RANK, HIDDEN, grad=True), randn(VOCABULARY, RANK, grad=True), 0.5)
    weight, bias = randn(VOCABULARY, HIDDEN, grad=not frozen), randn(VOCABULARY, grad=not frozen)
    return HeadValues(weight, bias, **{"low_rank": (low_rank,), **options})


def run(
    loss: Any, student: HeadValues, teacher: HeadValues, options: dict[str, Any]
) -> tuple[DistillationOutput, dict[str, Tensor]]:
    """The output of a loss and the gradients of three times the loss."""
    hidden = STUDENT.clone()
    hidden[~MASK] = torch.nan
    hidden.requires_grad_()
    leaves = {"hidden": hidden, "weight": student.weight, "bias": student.bias}
    for index, part in enumerate(student.low_rank):
        leaves |= {f"a{index}": part.a, f"b{index}": part.b}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    output = loss(hidden, TEACHER, student, teacher, TARGETS, mask=MASK, **options)
    found = torch.autograd.grad(3.0 * output.loss, list(leaves.values()))
    return output, dict(zip(leaves, found, strict=True))


def materialised(
    hidden: Tensor, teacher_hidden: Tensor, student: HeadValues, teacher: HeadValues,
    targets: Tensor, *, mask: Tensor, **options: Any,
) -> DistillationOutput:  # fmt: skip
    hidden = torch.where(mask[..., None], hidden, torch.zeros_like(hidden))
    with torch.no_grad():
        teacher_logits = teacher.logits(teacher_hidden)
    return distillation_from_logits(
        student.logits(hidden), teacher_logits, targets, mask=mask, backend="reference", **options
    )


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "reverse_kl", "temperature": 0.7, "reduction": "sum"},
        {"objective": "jsd", "reduction": "sequence_mean", "token_weight": WEIGHTS},
        {"objective": Objective("forward_kl", top_k=5), "normalizer": 11},
        {"objective": Objective("reverse_kl", importance_clip=1.5), "old_logprobs": OLD},
        {"objective": "policy_gradient", "advantage_mask": AdvantageMask(threshold=0.5)},
        {"reduction": "sequence_mean", "normalizer": torch.tensor(5.0)},
    ],
    ids=str,
)
@pytest.mark.parametrize("workspace", ["auto", 3 * 4 * VOCABULARY * 4])
def test_lora_on_the_head(
    frozen: bool, options: dict[str, Any], workspace: str | int, backend: str
) -> None:
    student, teacher = head(frozen=frozen), head()
    ours, found = run(
        fused_head_distillation, student, teacher,
        {**options, "workspace": workspace, "backend": backend},
    )  # fmt: skip
    theirs, expected = run(materialised, student, teacher, options)
    assert_close(found, expected)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.advantage, theirs.advantage, atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.active, theirs.active)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({"logit_scale": 0.5}, {"logit_scale": 2.0}),
        ({"softcap": 5.0, "logit_scale": 0.5}, {"softcap": 5.0}),
        ({"softcap": 5.0}, {"softcap": None}),
    ],
    ids=str,
)
def test_each_model_has_its_own_scale_and_cap(student: dict, teacher: dict, backend: str) -> None:
    heads = head(frozen=False, low_rank=(), **student), head(low_rank=(), **teacher)
    ours, found = run(fused_head_distillation, *heads, {"backend": backend})
    theirs, expected = run(materialised, *heads, {})
    assert_close(found, expected)
    torch.testing.assert_close(ours.loss, theirs.loss)


def test_steps_reach_the_kernels(backend: str) -> None:
    steps = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [0, 0, 1, 1, 1, 2, 2]])
    options = {"advantage_mask": AdvantageMask(sign="positive", per_step=True), "step_ids": steps}
    heads = head(frozen=False, low_rank=()), head(low_rank=())
    ours, found = run(fused_head_distillation, *heads, {**options, "backend": backend})
    theirs, expected = run(materialised, *heads, options)
    assert torch.equal(ours.active, theirs.active)
    assert_close(found, expected)


@pytest.mark.parametrize("change", ["bias", "no bias", "scale"])
def test_models_that_share_the_weight_alone(change: str, backend: str) -> None:
    """The kernels take a shared head for a shared bias."""
    student = head(frozen=False, low_rank=())
    teacher = {
        "bias": HeadValues(student.weight, randn(VOCABULARY)),
        "no bias": HeadValues(student.weight),
        "scale": HeadValues(student.weight, student.bias, logit_scale=2.0),
    }[change]
    ours, found = run(fused_head_distillation, student, teacher, {"backend": backend})
    theirs, expected = run(materialised, student, teacher, {})
    assert_close(found, expected)
    torch.testing.assert_close(ours.loss, theirs.loss)


@pytest.mark.parametrize("name", ["mask", "token_weight", "old_logprobs"])
def test_tensors_of_another_shape_are_refused_and_not_broadcast(name: str) -> None:
    values = {"mask": MASK, "token_weight": WEIGHTS, "old_logprobs": OLD}
    with pytest.raises(ValueError, match=rf"{name}.*expected shape \(2, 7\)"):
        fused_head_distillation(
            STUDENT, TEACHER, head(), head(), TARGETS, **{name: values[name][:, :1]}
        )


def test_each_model_has_its_own_dtype(backend: str) -> None:
    student, teacher = head(low_rank=(), frozen=False), head(low_rank=())
    half = HeadValues(teacher.weight.bfloat16(), teacher.bias.bfloat16())
    hidden = STUDENT.clone().requires_grad_()
    loss = fused_head_distillation(
        hidden, TEACHER.bfloat16(), student, half, mask=MASK, backend=backend
    ).loss
    expected = distillation_from_logits(
        student.logits(hidden), half.logits(TEACHER.bfloat16()).float(), mask=MASK
    ).loss
    torch.testing.assert_close(loss, expected)
    (found,), (wanted,) = (torch.autograd.grad(one, [hidden]) for one in (loss, expected))
    assert_close({"hidden": found}, {"hidden": wanted})


def test_autocast_casts_the_products_with_adapters(backend: str) -> None:
    student, teacher = head(), head()
    with torch.autocast("cpu", torch.bfloat16):
        ours, found = run(fused_head_distillation, student, teacher, {"backend": backend})
        _, expected = run(materialised, student, teacher, {})
    exact, _ = run(materialised, student, teacher, {})
    assert_close(found, expected, 2e-2)
    assert ours.loss != exact.loss
    assert ours.loss.item() == pytest.approx(exact.loss.item(), rel=2e-2)


def test_no_tokens_at_all(backend: str) -> None:
    student = head()
    hidden = STUDENT[:0].clone().requires_grad_()
    output = fused_head_distillation(hidden, TEACHER[:0], student, backend=backend)
    output.loss.backward()
    assert output.loss == 0
    assert hidden.grad.shape == hidden.shape
    assert not student.low_rank[0].a.grad.any()


def test_plain_heads_take_the_fused_kernel() -> None:
    student = head(low_rank=(), frozen=False)
    ours, found = run(fused_head_distillation, student, student, {})
    hidden = STUDENT.clone().requires_grad_()
    fused = fused_linear_distillation(
        hidden, TEACHER, student.weight, TARGETS, bias=student.bias, mask=MASK
    )
    assert torch.equal(ours.loss, fused.loss)
    (expected,) = torch.autograd.grad(3.0 * fused.loss, [hidden])
    assert torch.equal(found["hidden"], expected)


def test_head_is_read_when_it_is_used() -> None:
    layer = nn.Linear(HIDDEN, VOCABULARY)
    kept = Head(layer)
    before = fused_head_distillation(STUDENT, TEACHER, kept).loss
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert fused_head_distillation(STUDENT, TEACHER, kept).loss != before


class Largest(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_neither_the_effective_weight_nor_all_logits_are_made() -> None:
    hidden, tokens = 64, 512
    student = HeadValues(
        randn(VOCABULARY, hidden),
        low_rank=(
            LowRank(randn(RANK, hidden, grad=True), randn(VOCABULARY, RANK, grad=True), 1.0),
        ),
    )
    rows = 8
    inputs = randn(tokens, 1, grad=True).expand(tokens, hidden), randn(1, 1).expand(tokens, hidden)
    with Largest() as largest:
        output = fused_head_distillation(
            *inputs, student, workspace=3 * 4 * rows * VOCABULARY, backend="reference"
        )
        output.loss.backward()
    assert largest.elements == tokens * hidden < tokens * VOCABULARY
    assert student.weight.grad is None


def test_what_chunks_cannot_do_is_refused() -> None:
    student = head()
    with pytest.raises(ValueError, match="reduction: 'none' is not supported with LoRA"):
        fused_head_distillation(STUDENT, TEACHER, student, reduction="none")
    with pytest.raises(ValueError, match="advantage_mask: top_fraction and per_step compare"):
        fused_head_distillation(
            STUDENT, TEACHER, student, targets=TARGETS,
            advantage_mask=AdvantageMask(top_fraction=0.5),
        )  # fmt: skip

    with pytest.raises(ValueError, match="step_ids: only used by advantage_mask"):
        fused_head_distillation(STUDENT, TEACHER, student, step_ids=TARGETS)


def test_hidden_states_of_a_decoder_that_puts_time_first() -> None:
    """Dense, with strides that a gradient in their likeness would have, too."""
    student, teacher = head(), head()
    found = []
    for states in (STUDENT, STUDENT.transpose(0, 1).contiguous().transpose(0, 1)):
        leaf = states.detach().requires_grad_()
        loss = fused_head_distillation(leaf, TEACHER, student, teacher, mask=MASK).loss
        found += torch.autograd.grad(loss, leaf)
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0])


def test_second_derivatives_are_refused() -> None:
    student = head()
    hidden = STUDENT.clone().requires_grad_()
    loss = fused_head_distillation(hidden, TEACHER, student).loss
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_no_grad_makes_no_graph() -> None:
    with torch.no_grad():
        assert not fused_head_distillation(STUDENT, TEACHER, head()).loss.requires_grad
