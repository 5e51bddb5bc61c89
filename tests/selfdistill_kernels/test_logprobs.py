"""fused_linear_logprobs: which tokens exist, and what its workspace may not change.

Values and gradients against plain torch are in test_loss.py, the memory in backends/native.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case
from torch import Tensor

from selfdistill_kernels import fused_linear_logprobs

TOKENS, VOCABULARY = 12, 301
KEPT = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.bool)


def results(
    hidden: Tensor, weight: Tensor, targets: Tensor, kept: Tensor, **options: object
) -> dict[str, Tensor]:
    """Both results and the gradients of a loss that weighs every kept token differently."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    out = fused_linear_logprobs(hidden, weight, targets, **options)
    loss = ((out.logprobs - 0.3 * out.entropy) * torch.linspace(1, 2, TOKENS))[kept].sum()
    made = torch.autograd.grad(loss, [hidden, weight])
    return {
        "logprobs": out.logprobs, "entropy": out.entropy, "hidden": made[0], "weight": made[1],
    }  # fmt: skip


@pytest.mark.parametrize("by", ["mask", "ignore_index", "another ignore_index", "both"])
def test_tokens_that_do_not_exist(by, backend):
    """They are 0, have no gradient, are not even read, and leave the others as they are."""
    case = make_case(TOKENS, 24, VOCABULARY).cast(torch.float32)
    all_tokens = results(case.student_hidden, case.weight, case.targets, KEPT, backend=backend)
    hidden, targets = case.student_hidden.clone(), case.targets.clone()
    hidden[~KEPT] = float("nan")
    options: dict[str, object] = {}
    if by in ("mask", "both"):
        options["mask"] = KEPT.clone()
    if by == "ignore_index":
        targets[~KEPT] = -100
    elif by == "another ignore_index":
        options["ignore_index"] = VOCABULARY + 7
        targets[~KEPT] = VOCABULARY + 7
    elif by == "both":
        options["mask"][2] = True
        targets[2] = -100
    made = results(hidden, case.weight, targets, KEPT, backend=backend, **options)
    for name in ("logprobs", "entropy", "hidden"):
        assert torch.equal(made[name][~KEPT], torch.zeros_like(made[name][~KEPT])), name
        torch.testing.assert_close(made[name][KEPT], all_tokens[name][KEPT], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made["weight"], all_tokens["weight"], rtol=1e-5, atol=1e-6)


def test_without_an_ignored_target_the_index_has_no_meaning(backend):
    """A target of -100 is a mistake once another number means "no token"."""
    case = make_case(TOKENS, 24, VOCABULARY).cast(torch.float32)
    case.targets[3] = -100
    with pytest.raises(ValueError, match="targets: token id -100 lies outside the vocabulary"):
        fused_linear_logprobs(
            case.student_hidden, case.weight, case.targets, ignore_index=-1, backend=backend
        )


@pytest.mark.parametrize("workspace", [1_400, 8_000])
def test_the_workspace_changes_no_value(workspace):
    """1,400 bytes hold a slab of the vocabulary, 8,000 five rows of it, and "auto" all."""
    case = make_case(TOKENS, 24, VOCABULARY).cast(torch.float32)
    given = (case.student_hidden, case.weight, case.targets, KEPT)
    expected = results(*given, backend="native")
    made = results(*given, workspace=workspace, backend="native")
    for name, value in made.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_too_small_a_workspace_names_the_least():
    case = make_case(TOKENS, 24, VOCABULARY).cast(torch.float32)
    given = (case.student_hidden, case.weight, case.targets)
    with pytest.raises(ValueError, match=r"workspace: 100 bytes cannot hold .* at least (\d+)"):
        fused_linear_logprobs(*given, workspace=100, backend="native")
    with pytest.raises(TypeError, match="workspace: expected 'auto' or a number of bytes"):
        fused_linear_logprobs(*given, workspace=1.5, backend="native")
