from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import gradients, in_float64
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
)

from selfdistill.model.attention import (
    IMPLEMENTATION,
    PrefixStash,
    PrefixTree,
    enable_prefix_sharing,
    loop,
    run_packed_row,
)
from selfdistill.model.attention import model as attention_model
from selfdistill.model.layout import PromptGroup, pack_groups

ModelFactory = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(("call_cost", "max_pairs"), [(0, 1), (10**9, 10**9), (200, 2000)])
def test_batching_never_changes_the_result(
    tiny_model: ModelFactory,
    ragged_groups: list[PromptGroup],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    call_cost: int,
    max_pairs: int,
) -> None:
    model = tiny_model(family)
    models = model, in_float64(model)
    row = pack_groups(ragged_groups, share_student_prefix=False).teacher

    def run(model: PreTrainedModel) -> dict[str, torch.Tensor]:
        enable_prefix_sharing(model)
        model.zero_grad()
        hidden = run_packed_row(model, row)
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        return {"hidden states": hidden.detach(), **gradients(model)}

    usual, exact = map(run, models)
    monkeypatch.setattr(loop, "_CALL_COST_PAIRS", call_cost)
    monkeypatch.setattr(loop, "_SLICED_KEY_PAIRS", call_cost)
    monkeypatch.setattr(loop, "_MAX_BATCH_PAIRS", max_pairs)
    # Both compute with torch's attention, in other batches; neither is more exact.
    assert_no_worse_than_torch("another batching", run(model), usual, exact)


def test_batches_follow_the_cost() -> None:
    def num_batches(*lengths: int) -> int:
        group = PromptGroup([1] * 20, [[1] * 20] * len(lengths), [[2] * n for n in lengths])
        row = pack_groups([group], share_student_prefix=False).student
        return len(PrefixTree(row, device=torch.device("cpu"))._backend._batches)

    assert num_batches(*[30] * 16) == 2  # the prompt, and all branches at once
    assert num_batches(30, 28, 31, 5) == 2  # a little padding is cheaper than a call
    assert num_batches(1000, 400, 100) == 4  # much padding is not
    assert num_batches(*[1500] * 2) == 3  # large ones gain nothing together


@torch.no_grad()
def test_generation_is_unchanged(tiny_model: ModelFactory) -> None:
    model = tiny_model("gemma3").eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # left padding
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
    enable_prefix_sharing(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    assert torch.equal(model(ids, attention_mask=mask).logits, expected[0])
    assert torch.equal(model.generate(ids, **options), expected[1])


def test_a_checkpoint_does_not_remember_the_attention(
    tiny_model: ModelFactory, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    enable_prefix_sharing(model)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_another_attention_is_never_silently_used(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    row = pack_groups(ragged_groups, share_student_prefix=False).student
    with pytest.raises(ValueError, match="call enable_prefix_sharing"):
        run_packed_row(model, row)
    # Were the check passed by, the result would be NaN and not a wrong number.
    monkeypatch.setattr(attention_model, "IMPLEMENTATION", "sdpa")
    assert run_packed_row(model, row).isnan().all()


def test_a_borrowing_row_needs_its_stash(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    model = tiny_model("llama")
    enable_prefix_sharing(model)
    row = pack_groups(ragged_groups, share_student_prefix=True).teacher
    with pytest.raises(ValueError, match="borrows 13 prefix tokens but no stash"):
        run_packed_row(model, row)


def test_stash_copies_detached_and_closes() -> None:
    stash = PrefixStash(torch.tensor([0, 2]))
    key = torch.randn(1, 2, 4, 8, requires_grad=True)
    stash.capture(0, key, key + 1)
    stash.close()
    stash.capture(0, key + 5, key + 5)
    stash.capture(1, key, key)
    stored_key, stored_value = stash[0]
    assert torch.equal(stored_key, key[:, :, [0, 2]])
    assert torch.equal(stored_value, key[:, :, [0, 2]] + 1)
    assert not stored_key.requires_grad
    assert stored_key.untyped_storage().nbytes() == stored_key.nbytes  # no view of the whole row
    assert len(stash) == 1
    stash.free()
    assert len(stash) == 0
