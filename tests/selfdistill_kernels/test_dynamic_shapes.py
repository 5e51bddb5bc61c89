"""Another number of tokens: no graph of its own under torch.compile, one exported program."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import mark_dynamic
from torch._dynamo.utils import counters
from torch.export import Dim, export, load, save

from selfdistill_kernels import (
    AdvantageMask,
    FusedLinearDistillationLoss,
    Objective,
    distillation_from_logits,
    fused_linear_distillation,
    fused_linear_logprobs,
)

HIDDEN, VOCABULARY = 8, 31
GENERATOR = torch.Generator().manual_seed(3)
WEIGHT = torch.randn(VOCABULARY, HIDDEN, generator=GENERATOR).requires_grad_()
TEACHER_WEIGHT = torch.randn(VOCABULARY, HIDDEN, generator=GENERATOR)
# Sequences and time: both differ, so N does, too.
SHAPES = ((2, 8), (3, 13), (3, 7), (2, 5), (5, 9))

Step = Callable[..., Tensor]


def batch(sequences: int, time: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student's and teacher's hidden states, targets and step ids."""
    student, teacher = torch.randn(2, sequences, time, HIDDEN, generator=GENERATOR)
    targets = torch.randint(0, VOCABULARY, (sequences, time), generator=GENERATOR)
    return student, teacher, targets, targets % 3


def distillation(**options: object) -> Step:
    def step(student: Tensor, teacher: Tensor, targets: Tensor, step_ids: Tensor) -> Tensor:
        mask = options.get("advantage_mask")
        per_step = isinstance(mask, AdvantageMask) and mask.per_step
        return fused_linear_distillation(
            student, teacher, WEIGHT, targets, teacher_weight=TEACHER_WEIGHT,
            step_ids=step_ids if per_step else None, **options,
        ).loss  # fmt: skip

    return step


def logprobs(student: Tensor, teacher: Tensor, targets: Tensor, step_ids: Tensor) -> Tensor:
    return fused_linear_logprobs(student, WEIGHT, targets).logprobs


def from_logits(student: Tensor, teacher: Tensor, targets: Tensor, step_ids: Tensor) -> Tensor:
    return distillation_from_logits(student @ WEIGHT.T, teacher @ WEIGHT.T, targets).loss


LOSSES: dict[str, Step] = {
    "mean": distillation(backend="native"),
    "mean, reference": distillation(backend="reference"),
    "none": distillation(reduction="none"),
    "sequence mean": distillation(reduction="sequence_mean"),
    "jsd": distillation(objective="jsd"),
    "top-k": distillation(objective=Objective("forward_kl", top_k=4)),
    "threshold": distillation(advantage_mask=AdvantageMask(threshold=0.1)),
    "fraction of a step": distillation(
        advantage_mask=AdvantageMask(top_fraction=0.5, per_step=True)
    ),
    "logprobs": logprobs,
    "logits": from_logits,
}


def graphs_of(step: Step, *, compiler: str, marked: bool) -> list[int]:
    """Run a compiled step on every shape, compare with the eager one; return its new graphs."""
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    counts = []
    for shape in SHAPES:
        tensors = batch(*shape)
        for tensor in tensors if marked else ():
            mark_dynamic(tensor, 0)
            mark_dynamic(tensor, 1)
        before = counters["stats"]["unique_graphs"]
        loss, expected = compiled(*tensors), step(*tensors)
        counts.append(counters["stats"]["unique_graphs"] - before)
        # Inductor adds what lies around the operator in an order of its own.
        torch.testing.assert_close(loss, expected)
        upstream = torch.ones_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, WEIGHT, upstream),
            torch.autograd.grad(expected, WEIGHT, upstream),
        )
    return counts


@pytest.mark.parametrize("name", LOSSES)
def test_a_changed_number_of_tokens_compiles_nothing_again(name: str) -> None:
    # By itself torch.compile takes a size for a constant until it has seen another one.
    counts = [1, 1, 0, 0, 0]
    assert graphs_of(LOSSES[name], compiler="aot_eager", marked=False) == counts


@pytest.mark.parametrize("name", ["mean", "logprobs"])
def test_a_number_that_is_marked_as_dynamic_compiles_once(name: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("inductor compiles C++ for the CPU; install g++ or clang++")
    assert graphs_of(LOSSES[name], compiler="inductor", marked=True) == [1, 0, 0, 0, 0]


class WithHead(nn.Module):
    """A loss with the head that is trained."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.weight = nn.Parameter(WEIGHT.detach().clone())

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> object:
        return self.loss(student, teacher, self.weight, targets)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_targets", [True, False])
def test_an_exported_program_is_the_loss(
    reduction: str, with_targets: bool, strict: bool, backend: str
) -> None:
    module = WithHead(FusedLinearDistillationLoss(reduction=reduction, backend=backend))
    arguments = 3 if with_targets else 2
    sizes = {0: Dim("sequences", min=2), 1: Dim("time", min=2)}
    program = export(
        module, batch(*SHAPES[0])[:arguments], dynamic_shapes=(sizes,) * arguments, strict=strict
    )
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    for exported in (program.module(), load(file).module()):
        tensors = batch(*SHAPES[1])[:arguments]
        output, expected = exported(*tensors), module(*tensors)
        assert type(output) is type(expected)
        torch.testing.assert_close(vars(output), vars(expected), rtol=0, atol=0)
        (weight,) = exported.parameters()
        assert torch.equal(
            *(
                torch.autograd.grad(result.loss.sum(), parameter)[0]
                for result, parameter in ((output, weight), (expected, module.weight))
            )
        )


def test_exported_logprobs(backend: str) -> None:
    class Logprobs(nn.Module):
        def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            return fused_linear_logprobs(hidden, weight, targets, backend=backend)

    first, second = (
        (student, WEIGHT, targets)
        for student, _, targets, _ in (batch(*SHAPES[0]), batch(*SHAPES[1]))
    )
    sizes = {0: Dim("sequences", min=2), 1: Dim("time", min=2)}
    program = export(Logprobs(), first, dynamic_shapes=(sizes, None, sizes))
    for got, expected in zip(program.module()(*second), Logprobs()(*second), strict=True):
        assert torch.equal(got, expected)


def test_maps_over_a_result_find_its_tensors() -> None:
    student, teacher, targets, _ = batch(3, 7)
    stacked = torch.func.vmap(
        lambda *tensors: fused_linear_distillation(tensors[0], tensors[1], WEIGHT, tensors[2])
    )(student, teacher, targets)
    for place in range(3):
        alone = fused_linear_distillation(student[place], teacher[place], WEIGHT, targets[place])
        torch.testing.assert_close(stacked.loss[place], alone.loss)
        torch.testing.assert_close(stacked.entropy[place], alone.entropy)
