"""The prefix-shared step equals a padded two-pass step, in values and in every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from exactness import assert_no_worse_than_torch, relative_error
from padded_step import (
    assert_step_is_exact,
    forward_kl,
    gradients,
    in_float64,
    make_step,
    padded_results,
    padded_two_pass,
    step_results,
)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from selfdistill.model import scoring
from selfdistill.model.attention import PrefixStash, loop
from selfdistill.model.layout import PromptGroup
from selfdistill.model.randomness import RandomModelError
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher, LiveTeacher, Teacher

ModelFactory = Callable[..., PreTrainedModel]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:None of the inputs")
@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_gradients_equal_a_padded_two_pass_step(
    tiny_model: ModelFactory,
    ragged_groups: list[PromptGroup],
    family: str,
    teacher: str,
    checkpointing: str,
) -> None:
    student, strategy, reference = make_step(tiny_model, family, teacher)
    if checkpointing != "off":
        student.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    assert_step_is_exact(student, strategy, reference, ragged_groups)


@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_sliding_windows_are_exact(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], family: str, teacher: str
) -> None:
    student, strategy, reference = make_step(tiny_model, family, teacher)
    assert_step_is_exact(student, strategy, reference, ragged_groups)


@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_neox"])
def test_mixtures_of_experts_and_partial_rotary_embeddings_are_exact(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], family: str, teacher: str
) -> None:
    student, strategy, reference = make_step(tiny_model, family, teacher)
    assert_step_is_exact(student, strategy, reference, ragged_groups)


@pytest.mark.parametrize("teacher", ["live", "base"])
@pytest.mark.parametrize(
    "group",
    [
        PromptGroup([1, 5, 6], [[1, 5, 7, 8, 6]], [[9, 10, 11]]),
        PromptGroup([1, 5, 6], [[1, 5, 7, 8, 6]] * 3, [[9, 10, 11], [12], [13, 14]]),
        PromptGroup([4, 5, 6], [[1, 5, 7], [2, 5, 6, 6]], [[9, 10], [12, 13, 3]]),
        PromptGroup([1, 5], [[2, 5]], [[9]]),
    ],
    ids=["one rollout", "one context for all", "nothing in common", "one token to predict"],
)
def test_other_shapes_of_a_group_are_exact(
    tiny_model: ModelFactory, group: PromptGroup, teacher: str
) -> None:
    student, strategy, reference = make_step(tiny_model, "llama", teacher)
    assert_step_is_exact(student, strategy, reference, [group])


@pytest.mark.parametrize("teacher", ["live", "base"])
def test_adapters_are_exact(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], teacher: str
) -> None:
    def adapted() -> PeftModel:
        torch.manual_seed(3)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(tiny_model("qwen3"), config)

    student, reference = adapted(), adapted()
    expected_teacher = reference if teacher == "live" else tiny_model("qwen3")
    strategy: Teacher = LiveTeacher() if teacher == "live" else BaseTeacher()
    assert_step_is_exact(student, strategy, (reference, expected_teacher), ragged_groups)
    assert all("lora" in name for name in gradients(student))


def test_a_detached_prefix_fails(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    gather = loop._Batch._gather

    def detach_what_comes_before(
        batch: loop._Batch, states: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        gathered = gather(batch, states, index)
        before = gathered.shape[2] - batch.query_position.shape[1]  # the prefix keys of a branch
        return torch.cat([gathered[:, :, :before].detach(), gathered[:, :, before:]], dim=2)

    monkeypatch.setattr(loop._Batch, "_gather", detach_what_comes_before)
    student, strategy, reference = make_step(tiny_model, "llama", "live")
    torchs, exact = padded_results(reference, ragged_groups)
    scored = score(student, strategy, ragged_groups)
    hidden, found = step_results(student, scored.student_hidden, scored.teacher_hidden)
    # Nobody sees it in the log-probs.
    assert_no_worse_than_torch("hidden states", hidden, torchs[0], exact[0])
    assert max(relative_error(found[name], exact[1][name]) for name in found) > 0.05


def test_borrowing_with_other_weights_would_be_wrong(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student, _, reference = make_step(tiny_model, "llama", "base")

    class Liar(BaseTeacher):
        has_student_weights = True

    wrong = Liar(reference[1])
    _, expected = padded_two_pass(*reference, ragged_groups)
    hidden = score(student, wrong, ragged_groups).teacher_hidden
    assert (hidden - expected).abs().max() > 0.1 * expected.abs().max()


def test_sharing_is_a_saving_and_nothing_else(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    class ReadsItself(LiveTeacher):
        has_student_weights = False

    student = tiny_model("qwen3")
    shared = score(student, LiveTeacher(), ragged_groups)
    alone = score(student, ReadsItself(), ragged_groups)
    torchs, exact = (
        padded_two_pass(model, model, ragged_groups)[1] for model in (student, in_float64(student))
    )
    for scored in (shared, alone):
        assert_no_worse_than_torch("hidden states", scored.teacher_hidden, torchs, exact)
    assert shared.statistics.packed_tokens == alone.statistics.packed_tokens - 9 - 4  # the heads
    assert shared.statistics.unshared_tokens == alone.statistics.unshared_tokens


def test_tokens_come_rollout_after_rollout(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    scored = score(tiny_model("llama"), LiveTeacher(), ragged_groups)
    completions = [c for g in ragged_groups for c in g.completions]
    assert scored.targets.tolist() == [token for c in completions for token in c]
    assert scored.rollout_index.tolist() == [i for i, c in enumerate(completions) for _ in c]
    assert scored.positions.tolist() == [p for c in completions for p in range(len(c))]
    assert scored.student_hidden.shape == scored.teacher_hidden.shape == (len(scored.targets), 48)
    assert scored.student_hidden.requires_grad
    assert not scored.teacher_hidden.requires_grad


def test_two_runs_give_the_same_bits(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    results = []
    for _ in range(2):
        student = tiny_model("qwen3")
        scored = score(student, LiveTeacher(), ragged_groups)
        forward_kl(student, scored.student_hidden, scored.teacher_hidden).backward()
        results.append(gradients(student))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_stash_is_filled_once_and_freed(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    stashes, borrowed = [], []

    class Spy(PrefixStash):
        def __init__(self, index: torch.Tensor) -> None:
            super().__init__(index)
            stashes.append(self)

        def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            borrowed.append(layer)
            return super().__getitem__(layer)

    monkeypatch.setattr(scoring, "PrefixStash", Spy)
    student = tiny_model("llama")
    student.gradient_checkpointing_enable()
    scored = score(student, LiveTeacher(), ragged_groups)
    assert borrowed == [0, 1, 2]
    forward_kl(student, scored.student_hidden, scored.teacher_hidden).backward()
    assert [len(stash) for stash in stashes] == [0]  # neither kept nor captured by the replay


def test_no_logits_are_made(tiny_model: ModelFactory, ragged_groups: list[PromptGroup]) -> None:
    student = tiny_model("llama")

    def fail(module: torch.nn.Module, args: object) -> None:
        pytest.fail("the lm_head ran")

    student.lm_head.register_forward_pre_hook(fail)
    score(student, LiveTeacher(), ragged_groups)


def test_half_precision_loses_no_more_than_a_padded_step(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    exact = padded_two_pass(*[tiny_model("llama")] * 2, ragged_groups)
    half = tiny_model("llama").to(torch.bfloat16)
    padded = padded_two_pass(half, half, ragged_groups)
    scored = score(half, LiveTeacher(), ragged_groups)
    packed = (scored.student_hidden, scored.teacher_hidden)
    for got, usual, expected in zip(packed, padded, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - expected).square().mean() < 1.5 * (usual - expected).square().mean()


def test_dropout_is_refused_by_name(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama", attention_dropout=0.1)
    with pytest.raises(RandomModelError, match=r"config\.attention_dropout is 0\.1, expected 0"):
        score(student, LiveTeacher(), ragged_groups)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2)
    adapted = get_peft_model(tiny_model("llama"), config)
    with pytest.raises(RandomModelError, match=r"peft_config\['default'\]\.lora_dropout is 0\.2"):
        score(adapted, LiveTeacher(), ragged_groups)
    student = tiny_model("llama")
    student.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.3))
    with pytest.raises(RandomModelError, match=r"layers\.0\.mlp\.act_fn\.1 is 0\.3"):
        score(student, LiveTeacher(), ragged_groups)
    teacher = BaseTeacher(tiny_model("llama", attention_dropout=0.1))
    with pytest.raises(RandomModelError, match="attention_dropout"):
        score(tiny_model("llama"), teacher, ragged_groups)
