"""Losses whose upstream gradient is unknown in the forward pass make no logits a second time."""

from __future__ import annotations

import gc

import pytest
import torch
from kernel_cases import Case, make_case
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from selfdistill_kernels import (
    AdvantageMask,
    Objective,
    fused_linear_distillation,
    fused_linear_logprobs,
    release_workspace,
)
from selfdistill_kernels.backends.native import memory
from selfdistill_kernels.backends.native.gemm import head_for
from selfdistill_kernels.backends.native.plan import copied_bytes

TOKENS, HIDDEN, VOCABULARY = 24, 16, 301
MASK = torch.arange(TOKENS) % 5 != 0
STEPS = torch.arange(TOKENS)[None] // 6
UPSTREAM = torch.linspace(-1, 2, TOKENS)
# Rows of both models fit beside what their products take, but not all of them.
FEW_ROWS = 9 * (2 * 4 * VOCABULARY + copied_bytes(HIDDEN, 2))
LOSSES = {
    "per token": {"reduction": "none"},
    "jsd per token": {"reduction": "none", "objective": "jsd"},
    "per token, a mask": {"reduction": "none", "advantage_mask": AdvantageMask(0.2)},
    "top_fraction": {"advantage_mask": AdvantageMask(top_fraction=0.3)},
    "per_step": {"advantage_mask": AdvantageMask(top_fraction=0.3, per_step=True)},
    "top_k": {"objective": Objective(top_k=7)},
    "top_k of the teacher": {"objective": Objective("jsd", top_k=7, top_k_of="teacher")},
    "terms": {
        "reduction": "none",
        "objective": Objective("skew_kl", 0.3, policy_gradient=1.0, entropy=-0.1),
    },
}


@pytest.fixture(autouse=True)
def nothing_is_held():
    release_workspace()
    yield
    gc.collect()
    assert not memory._leases.locked()
    release_workspace()


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of each product that made logits."""
    made: list[tuple[int, int]] = []
    kind = type(head_for(torch.empty(1, 1), 0))
    logits = kind.logits

    def counted(self: object, hidden: Tensor, start: int, stop: int, *, out: Tensor) -> None:
        made.append((hidden.shape[0], stop - start))
        logits(self, hidden, start, stop, out=out)

    monkeypatch.setattr(kind, "logits", counted)
    return made


def case_of(**options: object) -> Case:
    """With a transform, so that raw scores and logits differ."""
    case = make_case(TOKENS, HIDDEN, VOCABULARY, bias=True, temperature=1.5, softcap=9.0)
    case = case.cast(torch.float32)
    case.options["mask"] = MASK
    case.options.update(options)
    case.leaves()
    return case


def loss_of(case: Case, loss: dict[str, object], backend: str = "native", **more: object) -> Tensor:
    options = {**loss, **more, "backend": backend}
    mask = loss.get("advantage_mask")
    if mask is not None and mask.per_step:
        leading = {name: getattr(case, name)[None] for name in ("student_hidden", "teacher_hidden")}
        out = fused_linear_distillation(
            *leading.values(), case.weight, case.targets[None], bias=case.bias, step_ids=STEPS,
            **{**case.options, "mask": MASK[None]}, **options,
        )  # fmt: skip
    else:
        out = case.call(fused_linear_distillation, **options)
    return out.loss if out.loss.dim() == 0 else (out.loss * UPSTREAM).sum()


def gradients(loss: Tensor, case: Case, **options: bool) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [case.student_hidden, case.weight, case.bias], **options)


def rows_of(products: list[tuple[int, int]]) -> float:
    """Logits that were made, in rows of the vocabulary."""
    return sum(rows * columns for rows, columns in products) / VOCABULARY


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_are_made_once(loss, products):
    case = case_of()
    made = gradients(loss_of(case, LOSSES[loss]), case)
    assert rows_of(products) == 2 * MASK.sum()
    exact = gradients(loss_of(case, LOSSES[loss], "reference"), case)
    for ours, reference in zip(made, exact, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5 * reference.abs().max())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_backward_pass_makes_them_again(loss, products):
    """The first one turned the scores into a gradient."""
    case = case_of()
    value = loss_of(case, LOSSES[loss])
    first = gradients(value, case, retain_graph=True)
    forward = len(products)
    second = gradients(value, case)
    assert len(products) > forward
    for before, after in zip(first, second, strict=True):
        torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5 * before.abs().max())


def test_one_call_holds_a_workspace(products):
    """However many calls wait for their backward pass."""
    case = case_of()
    first, second = (loss_of(case, LOSSES["per token"]) for _ in range(2))
    forward = rows_of(products)
    of_second = gradients(second, case)
    assert rows_of(products) > forward
    again = rows_of(products)
    of_first = gradients(first, case)
    assert rows_of(products) == again
    for a, b in zip(of_first, of_second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max())


def test_memory_comes_back():
    """After the backward pass, though the loss lives on, and with a loss that is dropped."""
    case = case_of()
    loss = loss_of(case, LOSSES["per token"])
    assert memory._leases.locked()
    assert memory._kept == []
    gradients(loss, case)
    assert not memory._leases.locked()
    (space,) = memory._kept
    loss = loss_of(case, LOSSES["per token"])
    assert memory._kept == []
    del loss
    assert not memory._leases.locked()
    assert memory._kept[0] is space


def test_nothing_holds_it_after_the_backward_pass():
    """Not even a loss that lives on: `release_workspace` frees it."""
    case = case_of()
    loss = loss_of(case, LOSSES["per token"])
    (waiting,) = memory_of(loss)
    alive = StorageWeakRef(waiting.untyped_storage())
    del waiting
    gradients(loss, case)
    release_workspace()
    gc.collect()
    assert alive.expired()


def memory_of(loss: Tensor) -> list[Tensor]:
    """The workspaces that nodes of its graph hold."""
    found, nodes = [], [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        kept = getattr(node, "kept", None)
        found += [] if kept is None else kept._lease._spaces
        nodes += [following for following, _ in node.next_functions if following is not None]
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_checkpointing(loss, products):
    """Which saves nothing while something else is kept, and looks at saved tensors once."""
    case = case_of()
    expected = gradients(loss_of(case, LOSSES[loss]), case)

    def within(*_: Tensor) -> Tensor:
        found = loss_of(case, LOSSES[loss])
        assert not memory._leases.locked()
        return found

    value = checkpoint(within, case.student_hidden, case.weight, use_reentrant=False)
    for ours, before in zip(gradients(value, case), expected, strict=True):
        torch.testing.assert_close(ours, before, rtol=1e-4, atol=1e-5 * before.abs().max())


def test_whether_the_workspace_is_enough_does_not_depend_on_who_holds_it():
    """dH of all rows in float32 does not fit, though the few tokens that exist do."""
    narrow = case_of().cast(torch.bfloat16)
    narrow.options["mask"] = torch.arange(TOKENS) == 3
    narrow.leaves()
    few = 8 * VOCABULARY + copied_bytes(HIDDEN, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"workspace: {few} bytes cannot hold one tile"):
            loss_of(narrow, LOSSES["per token"], workspace=few)


def test_an_error_gives_it_back(monkeypatch):
    case = case_of()
    monkeypatch.setattr(
        "selfdistill_kernels.backends.native.rows.RowKernels.statistics",
        lambda *_: (_ for _ in ()).throw(RuntimeError("stop")),
    )
    with pytest.raises(RuntimeError, match="stop"):
        loss_of(case, LOSSES["per token"])


def test_nothing_waits_where_no_gradient_is_wanted():
    case = case_of()
    with torch.no_grad():
        loss_of(case, LOSSES["per token"])
    assert not memory._leases.locked()


def frozen(case: Case) -> Case:
    case.weight.requires_grad_(False)
    case.bias.requires_grad_(False)
    return case


@pytest.mark.parametrize("loss", ["per token", "jsd per token", "per token, a mask"])
def test_one_term_with_a_frozen_head_needs_no_tile_for_all(loss, products):
    """dH for a weight of 1 is multiplied in the backward pass, as often as one likes."""
    case = frozen(case_of())
    value = loss_of(case, LOSSES[loss], workspace=FEW_ROWS)
    made = [torch.autograd.grad(value, case.student_hidden, retain_graph=True)[0] for _ in "ab"]
    assert rows_of(products) == 2 * MASK.sum()
    assert len(products) > 1
    (exact,) = torch.autograd.grad(loss_of(case, LOSSES[loss], "reference"), case.student_hidden)
    for ours in made:
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5 * exact.abs().max())
        assert not ours[~MASK].any()


@pytest.mark.parametrize("loss", ["terms", "top_fraction", "top_k"])
def test_else_a_small_workspace_makes_them_again(loss, products):
    case = frozen(case_of())
    value = loss_of(case, LOSSES[loss], workspace=FEW_ROWS)
    forward = rows_of(products)
    (made,) = torch.autograd.grad(value, case.student_hidden)
    assert rows_of(products) > forward
    (exact,) = torch.autograd.grad(loss_of(case, LOSSES[loss], "reference"), case.student_hidden)
    torch.testing.assert_close(made, exact, rtol=1e-4, atol=1e-5 * exact.abs().max())


def logprobs(case: Case, entropy: str, workspace: str | int, backend: str = "native") -> Tensor:
    out = fused_linear_logprobs(
        case.student_hidden, case.weight, case.targets, bias=case.bias, entropy=entropy,
        workspace=workspace, backend=backend, **case.options,
    )  # fmt: skip
    assert out.entropy.requires_grad == (entropy == "differentiable")
    found = (out.logprobs * UPSTREAM).sum()
    return found + out.entropy.sum() if entropy == "differentiable" else found


@pytest.mark.parametrize(
    ("entropy", "workspace", "once"),
    [
        ("differentiable", "auto", True),
        ("detached", "auto", True),
        ("differentiable", FEW_ROWS, False),
        ("detached", FEW_ROWS, True),
    ],
)
def test_logprobs(entropy, workspace, once, products):
    case = frozen(case_of())
    (made,) = torch.autograd.grad(logprobs(case, entropy, workspace), case.student_hidden)
    assert (rows_of(products) == MASK.sum()) == once
    (exact,) = torch.autograd.grad(
        logprobs(case, entropy, workspace, "reference"), case.student_hidden
    )
    torch.testing.assert_close(made, exact, rtol=1e-4, atol=1e-5 * exact.abs().max())


def test_another_kind_of_entropy_is_refused():
    case = case_of()
    with pytest.raises(ValueError, match="entropy: expected 'differentiable' or 'detached'"):
        logprobs(case, "none", "auto")


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16(loss):
    """No worse than a gradient that is rounded once more."""
    case = case_of()
    narrow = case.cast(torch.bfloat16)
    narrow.leaves()
    made = gradients(loss_of(narrow, LOSSES[loss]), narrow)
    exact = gradients(loss_of(case, LOSSES[loss], "reference"), case)
    for ours, reference in zip(made, exact, strict=True):
        assert (ours - reference).abs().max() <= 2 * 2**-8 * reference.abs().max()
