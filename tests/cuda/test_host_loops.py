"""The host loops of the native backend on a GPU: numbers on the emulated one, devices and waiting
on tensors without values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from exactness import assert_no_worse_than_torch
from kernel_cases import check_against_torch, make_case, materialised_losses

from selfdistill_kernels import AdvantageMask, Objective, distillation_from_logits
from selfdistill_kernels import fused_linear_distillation as fused
from selfdistill_kernels.advantage import Gate
from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.native import NativeBackend, rows
from selfdistill_kernels.backends.native.gemm import Float32Head, TensorCoreHead, WideningHead
from selfdistill_kernels.backends.native.rows import RowKernels
from selfdistill_kernels.logits import LogitTransform


def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host loops as for tensors on a GPU."""
    on_cpu = RowKernels.__init__

    def init(self, *args) -> None:
        on_cpu(self, *args)
        self.asynchronous = True

    monkeypatch.setattr(RowKernels, "__init__", init)


@pytest.fixture
def on_gpu(emulated, monkeypatch) -> None:
    """The native backend, as if its CPU tensors lay on a GPU."""
    as_on_gpu(monkeypatch)
    monkeypatch.setattr(torch.ops, "selfdistill", emulated)


OBJECTIVES = [
    "forward_kl",
    Objective("jsd", 0.3, policy_gradient=0.5, entropy=0.1),
    Objective("reverse_kl", divergence_clip=0.4),
    Objective("forward_kl", entry_clip=0.05, cross_entropy=0.3),
    Objective("jsd", 0.3, entry_clip=0.01),
]


@pytest.mark.parametrize(
    "objective",
    OBJECTIVES,
    ids=["forward_kl", "mixed", "clipped", "clipped entries", "clipped entries of the jsd"],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"advantage_mask": AdvantageMask(0.3)},
        {"reduction": "none"},
        {"workspace": 4 * 2 * 101 * 11},
        {"workspace": 4 * 2 * 64},
    ],
    ids=["dense", "masked", "none", "tiles", "slabs"],
)
@pytest.mark.parametrize("transform", [{}, {"softcap": 5.0, "temperature": 0.8}], ids=str)
def test_loss_and_gradients(on_gpu, objective, options, transform):
    case64 = make_case(tokens=40, bias=True, **transform)
    objective = Objective(objective) if isinstance(objective, str) else objective
    mask = torch.arange(40) != 5
    token_weight = torch.linspace(0.5, 1.5, 40)
    token_weight[3] = 0.0
    weight = token_weight * mask
    if "advantage_mask" in options:
        advantage = materialised_losses(case64, objective)[2]["advantage"]
        weight = weight * (advantage.abs() > 0.3)

    def plain(case):
        loss, divergence, _ = materialised_losses(case, objective)
        if objective.divergence_clip is not None:
            loss = loss - divergence + divergence.clamp(max=objective.divergence_clip)
        total = (loss * weight).sum()
        if options.get("reduction") != "none":
            total = total / mask.sum()
        return {"loss": total, "divergence": divergence * mask}, total

    def ours(case):
        made = case.call(
            fused, objective=objective, mask=mask, token_weight=token_weight, backend="native",
            **options,
        )  # fmt: skip
        assert torch.equal(made.active, weight != 0)
        return {"loss": made.loss.sum(), "divergence": made.divergence}, made.loss.sum()

    # Of 40 terms that differ in sign, each of order 1.
    size = 40.0 if options.get("reduction") == "none" else 1.0
    check_against_torch(case64, plain, ours, loss_size=size)


def test_logits(on_gpu):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 9, 777, generator=generator)
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        leaf = student.to(dtype, copy=True).requires_grad_()
        s, t = torch.log_softmax(leaf, -1), torch.log_softmax(teacher.to(dtype), -1)
        (gradients[dtype],) = torch.autograd.grad((t.exp() * (t - s)).sum(-1).mean(), leaf)
    leaf = student.clone().requires_grad_()
    distillation_from_logits(leaf, teacher, backend="native").loss.backward()
    assert_no_worse_than_torch(
        "d logits", leaf.grad, gradients[torch.float32], gradients[torch.float64]
    )


@pytest.fixture(scope="module")
def shapes_of_operators() -> Iterator[None]:
    """What the row kernels return, without values."""
    with torch.library._scoped_library("selfdistill", "IMPL") as library:
        for name in ("row_visit_", "row_statistics_", "row_mixture_", "row_gradient_"):
            torch.library.register_fake(f"selfdistill::{name}", lambda *_: None, lib=library)
        torch.library.register_fake(
            "selfdistill::row_finish",
            lambda state, *_: state.new_empty((state.shape[0], 10), dtype=torch.float32),
            lib=library,
        )
        yield


def inputs_without_values(dtype: torch.dtype, logits: bool) -> LinearInputs:
    width = 1000 if logits else 64

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return LinearInputs(
        new(300, width), new(300, width), None if logits else new(1000, 64), None, None, None,
        torch.empty(300, dtype=torch.int64, device="meta"), None, LogitTransform(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("workspace", [0, 4 << 20, 1 << 17], ids=["auto", "tiles", "slabs"])
def test_everything_stays_on_the_device_and_nothing_waits(
    shapes_of_operators, monkeypatch, dtype, logits, workspace
):
    """On tensors without values: one of another device, or a value that is waited for, raises."""
    heads = {torch.float32: Float32Head, torch.bfloat16: TensorCoreHead}

    def head_on_gpu(weight: torch.Tensor, widened: int) -> object:
        return heads[dtype](weight) if dtype in heads else WideningHead(weight, widened)

    if not logits:
        monkeypatch.setattr(rows, "head_for", head_on_gpu)
    as_on_gpu(monkeypatch)
    inputs = inputs_without_values(dtype, logits)
    needs = Needs(True, not logits, False)
    loss_weight = torch.empty(300, device="meta")
    objective = Objective("jsd", 0.3)
    backend = NativeBackend()
    assert backend.statistics(inputs, objective, workspace).device.type == "meta"
    if workspace == 1 << 17 and needs.weight:
        with pytest.raises((NotImplementedError, RuntimeError)):  # it counts the active tokens
            backend.visit(inputs, objective, None, loss_weight, None, needs, workspace)
        return
    statistics, active, gradients = backend.visit(
        inputs, objective, None, loss_weight, None, needs, workspace
    )
    made = [statistics, active, *(g for g in gradients if g is not None)]
    assert all(tensor.device.type == "meta" for tensor in made)
    assert gradients.hidden is not None
    assert gradients.hidden.dtype == dtype
    with pytest.raises((NotImplementedError, RuntimeError)):  # so does a gate, in every tile
        backend.visit(inputs, objective, Gate(0, 0.1), loss_weight, None, needs, workspace)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [False, True])
def test_products_of_a_tensor_core_head(monkeypatch, add, dtype):
    """torch has them for GPUs only: what is asked of it, computed in float32 here."""
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out_dtype=torch.bfloat16, out=None):
        assert a.dtype == b.dtype == torch.bfloat16
        assert out is None or out.dtype == out_dtype
        made = mm(a.float(), b.float()).to(out_dtype)
        return made if out is None else out.copy_(made)

    def wide_addmm(c, a, b, *, out_dtype, out=None):
        assert out_dtype == c.dtype == torch.float32
        return addmm(c, a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    hidden, weight, gradient = (torch.randn(s).bfloat16() for s in ((5, 8), (30, 8), (5, 20)))
    head, part = TensorCoreHead(weight), weight[10:30].float()
    found = torch.empty(5, 20)
    head.logits(hidden, 10, 30, out=found)
    # Sums of 20 products or fewer, rounded once: the default tolerances of assert_close are ten
    # roundings of either dtype.
    torch.testing.assert_close(found, mm(hidden.float(), part.T))
    made = head.hidden_gradient(gradient, 10, 30)
    torch.testing.assert_close(made, mm(gradient.float(), part))
    before = torch.randn(20, 8) if add else None
    expected = mm(gradient.float().T, hidden.float()) + (0.0 if before is None else before)
    found = torch.full((20, 8), float("nan"), dtype=dtype)
    head.weight_gradient(gradient, hidden, out=found, add=before)
    torch.testing.assert_close(found, expected.to(dtype))
