"""Every backend gives the loop's numbers and the padded step's, values and gradients.

flash and flex need a GPU. Here flash runs on a plain torch version of its kernel, and flex in
FlexAttention's eager mode, which has a backward pass on the CPU once its device check is lifted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import (
    assert_step_is_exact,
    forward_kl,
    gradients,
    make_step,
    padded_two_pass,
)
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel
from varlen import flash_attn_varlen_func

from selfdistill.model.attention import Choice, PrefixTree
from selfdistill.model.attention import model as attention_model
from selfdistill.model.attention.backend import BackendName, build_backend
from selfdistill.model.attention.flex import FlexAttention
from selfdistill.model.layout import PackedRow, PromptGroup, pack_groups
from selfdistill.model.scoring import score

ModelFactory = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let flash and flex run on the CPU; returns the kernels called, in order."""
    names: list[str] = []

    def varlen(*args: torch.Tensor, **options: object) -> torch.Tensor:
        names.append("flash")
        return flash_attn_varlen_func(*args, **options)

    def flex(*args: torch.Tensor, **options: object) -> torch.Tensor:
        names.append("flex")
        return flex_attention.flex_attention(*args, **options)

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr("selfdistill.model.attention.flex.flex_attention", flex)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    # Without tracing, which would take longer than everything else here.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    return names


@pytest.fixture
def rows(ragged_groups: list[PromptGroup]) -> dict[str, PackedRow]:
    """A student's row, one that borrows and one that does not; the last group shares nothing."""
    groups = [*ragged_groups, PromptGroup([4, 5], [[1, 5, 7], [2, 5, 6, 6]], [[9], [12, 13, 3]])]
    borrowing = pack_groups(groups, share_student_prefix=True)
    alone = pack_groups(groups, share_student_prefix=False)
    return {"student": borrowing.student, "borrowing": borrowing.teacher, "alone": alone.teacher}


def attend(
    backend: BackendName,
    row: PackedRow,
    *,
    window: int | None = None,
    kv_heads: int = 2,
    value_width: int = 16,
    scaling: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Output of one layer of 4 heads on random states, and the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)

    def states(heads: int, length: int, width: int) -> torch.Tensor:
        drawn = torch.randn(1, heads, length, width, generator=generator)
        return drawn.to(dtype).requires_grad_()

    length = row.input_ids.shape[1]
    keys = len(row.borrowed_index) + length
    inputs = [
        states(4, length, 16),
        states(kv_heads, keys, 16),
        states(kv_heads, keys, value_width),
    ]
    out = build_backend(backend, row, CPU).attend(*inputs, scaling=scaling, sliding_window=window)
    assert out.shape == (1, length, 4, value_width)
    loss = (out * torch.randn(out.shape, generator=generator)).sum()
    found = (out.detach(), *torch.autograd.grad(loss, inputs))
    return dict(zip(("out", "dq", "dk", "dv"), found, strict=True))


def assert_as_exact_as_the_loop(backend: BackendName, row: PackedRow, **options: Any) -> None:
    """The loop is torch's own attention, prefix by prefix."""
    exact = attend("loop", row, dtype=torch.float64, **options)
    torchs = attend("loop", row, **options)
    for name, got in attend(backend, row, **options).items():
        assert_no_worse_than_torch(name, got, torchs[name], exact[name])


@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("window", [None, 2, 5, 1000])
@pytest.mark.parametrize("role", ["student", "borrowing", "alone"])
def test_backends_agree_with_the_loop(
    calls: list[str], rows: dict[str, PackedRow], role: str, window: int | None, backend: str
) -> None:
    assert_as_exact_as_the_loop(backend, rows[role], window=window)
    assert calls == [backend]


@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize(
    "options", [{"kv_heads": 4}, {"kv_heads": 1}, {"value_width": 8}, {"scaling": 0.7}], ids=str
)
def test_heads_widths_and_scales(
    calls: list[str], rows: dict[str, PackedRow], options: dict[str, float], backend: str
) -> None:
    assert_as_exact_as_the_loop(backend, rows["borrowing"], **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3", "mistral", "qwen3_moe", "gpt_neox"])
def test_every_family_equals_a_padded_two_pass_step(
    tiny_model: ModelFactory,
    ragged_groups: list[PromptGroup],
    monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
    family: str,
    teacher: str,
    backend: str,
) -> None:
    choose(monkeypatch, backend)
    student, strategy, reference = make_step(tiny_model, family, teacher)
    if family == "llama":
        student.gradient_checkpointing_enable({"use_reentrant": False})
    assert_step_is_exact(student, strategy, reference, ragged_groups)
    assert set(calls) == {backend}


@pytest.mark.parametrize("backend", ["loop", "flash", "flex"])
def test_autocast_with_float32_weights(
    tiny_model: ModelFactory,
    ragged_groups: list[PromptGroup],
    monkeypatch: pytest.MonkeyPatch,
    calls: list[str],
    backend: str,
) -> None:
    """Rotary embeddings leave float32 queries and keys, which flash and flex would refuse."""
    seen = choose(monkeypatch, backend)
    student, strategy, reference = make_step(tiny_model, "llama", "live")
    exact = padded_two_pass(*reference, ragged_groups)
    forward_kl(reference[0], *exact).backward()
    expected = gradients(reference[0])
    usual_student, _, usual_reference = make_step(tiny_model, "llama", "live")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = score(student, strategy, ragged_groups)
        forward_kl(student, scored.student_hidden, scored.teacher_hidden).backward()
        usual = padded_two_pass(usual_student, usual_reference[0], ragged_groups)
        forward_kl(usual_student, *usual).backward()
    assert all(dtype == torch.bfloat16 for dtype in seen)

    def error(model: PreTrainedModel) -> float:
        found = gradients(model)
        return sum(
            ((found[name] - expected[name]).norm() / expected[name].norm()).item()
            for name in expected
        )

    assert error(student) < 1.5 * error(usual_student)


def choose(monkeypatch: pytest.MonkeyPatch, backend: str) -> list[torch.dtype]:
    """Make every row choose this backend; returns the dtypes that were asked about."""
    dtypes: list[torch.dtype] = []

    def chosen(requested: str, *, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
        dtypes.append(dtype)
        return Choice(backend, "a test")

    monkeypatch.setattr(attention_model, "choose_backend", chosen)
    return dtypes


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("role", ["student", "borrowing", "alone"])
def test_the_mask_is_what_each_segment_may_see(
    rows: dict[str, PackedRow], role: str, window: int | None
) -> None:
    row = rows[role]
    num_borrowed, length = len(row.borrowed_index), row.input_ids.shape[1]
    expected = torch.zeros(length, num_borrowed + length, dtype=torch.bool)
    for segment in row.segments:
        keys = segment.key_index(num_borrowed)
        first = segment.num_keys - len(segment.own)
        for i, query in enumerate(segment.own):
            start = 0 if window is None else max(0, first + i + 1 - window)
            expected[query, keys[start : first + i + 1]] = True
    attention = FlexAttention(row, CPU)
    zero, queries = torch.tensor(0), torch.arange(length)[:, None]
    keys = torch.arange(num_borrowed + length)[None]
    mask = attention.mask_mod(window)(zero, zero, queries, keys)
    assert torch.equal(mask, expected)
    assert attention.block_mask(window) is attention.block_mask(window)  # once for all layers
    assert attention.block_mask(window) is not attention.block_mask(3)


def test_segments_follow_the_row(rows: dict[str, PackedRow]) -> None:
    """flash hands the queries over as they are."""
    for row in rows.values():
        own = [i for segment in row.segments for i in segment.own]
        assert own == list(range(row.input_ids.shape[1]))


def test_flash_gathers_each_prefix_for_each_branch(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = PromptGroup([1, 2, 3, 9], [[1, 2, 3, 5, 6, 9], [1, 2, 3, 5, 7, 9]], [[20, 21], [30]])
    row = pack_groups([group], share_student_prefix=True).teacher
    given: dict[str, object] = {}

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        given.update(options, keys=k[:, 0, 0].tolist())
        return flash_attn_varlen_func(q, k, v, **options)

    sys.modules["flash_attn"].flash_attn_varlen_func = spy
    tree = PrefixTree(row, device=CPU, backend="flash", borrow=_Numbered(3))
    key = torch.arange(100.0, 100 + row.input_ids.shape[1])[None, None, :, None].expand(1, 1, -1, 8)
    tree.attend(0, key, key, key, scaling=None, sliding_window=4)
    # Borrowed 0 1 2, trunk 5, then each branch with all of them before its own.
    assert given["keys"] == [0, 1, 2, 100, 0, 1, 2, 100, 101, 102, 103, 0, 1, 2, 100, 104, 105]
    assert given["cu_seqlens_q"].tolist() == [0, 1, 4, 6]
    assert given["cu_seqlens_k"].tolist() == [0, 4, 11, 17]
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (3, 7)
    assert (given["causal"], given["window_size"]) == (True, (3, 0))
    assert given["deterministic"] is False
    torch.use_deterministic_algorithms(True)
    try:
        tree.attend(0, key, key, key, scaling=None, sliding_window=None)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (given["deterministic"], given["window_size"]) == (True, (-1, -1))


class _Numbered:
    """A stash whose keys are their own numbers."""

    def __init__(self, count: int) -> None:
        self.states = torch.arange(float(count))[None, None, :, None].expand(1, 1, -1, 8)

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states, self.states
