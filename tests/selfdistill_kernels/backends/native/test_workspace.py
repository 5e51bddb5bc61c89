"""One workspace is kept between calls, whoever calls, and given back on request."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import fused_linear_distillation, release_workspace
from selfdistill_kernels.backends.native import memory


@pytest.fixture(autouse=True)
def none_kept():
    release_workspace()
    yield
    release_workspace()


def call(tokens: int = 20) -> torch.Tensor:
    case = make_case(tokens).cast(torch.float32)
    case.leaves()
    out = case.call(fused_linear_distillation, objective="reverse_kl", backend="native")
    return torch.autograd.grad(out.loss, case.weight)[0]


def test_the_next_call_takes_the_same_memory():
    expected = call()
    (kept,) = memory._kept
    kept.fill_(torch.nan)  # nothing may depend on what a call left there
    assert torch.equal(call(), expected)
    call(3)  # a smaller one takes it, too
    assert memory._kept[0] is kept
    call(40)
    (larger,) = memory._kept
    assert larger.numel() > kept.numel()
    release_workspace()
    assert memory._kept == []


def test_threads_do_not_share_it():
    expected = call()
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.extend(call() for _ in range(20))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(made, expected) for made in results)
    assert len(memory._kept) == 1


def fail_with_workspace() -> None:
    with memory.workspace(8, torch.device("cpu")):
        assert memory._kept == []
        raise RuntimeError("stop")


def test_an_error_gives_it_back():
    call()
    (kept,) = memory._kept
    with pytest.raises(RuntimeError, match="stop"):
        fail_with_workspace()
    assert memory._kept[0] is kept


def test_made_in_inference_mode_and_used_in_training():
    with torch.inference_mode():
        case = make_case().cast(torch.float32)
        case.call(fused_linear_distillation, backend="native")
    call(7)
