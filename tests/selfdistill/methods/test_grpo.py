"""GRPO against plain torch on full logits, against TRL, and in a training step."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM, PreTrainedModel

import selfdistill.training.batch
import selfdistill.training.gradients
from selfdistill.methods.grpo import GRPOLoss, group_advantages
from selfdistill.model.layout import PromptGroup
from selfdistill.model.lm_head import find_lm_head
from selfdistill.model.scoring import score
from selfdistill.model.teacher import BaseTeacher
from selfdistill.training.gradients import StudentLoss, accumulate_gradients

ModelFactory = Callable[..., PreTrainedModel]
TEMPERATURE = 1.3


def make_loss(**changes: Any) -> GRPOLoss:
    settings: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "clip_low": 0.1,
        "clip_high": 0.15,
        "normalize_std": True,
        "kl_coefficient": 0.0,
    }
    return GRPOLoss(**{**settings, **changes})


def own_logprobs(
    model: PreTrainedModel,
    prompt: list[int],
    completion: list[int],
    *,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Log-probs of a completion by the model's own forward at the sampling temperature."""
    logits = model(input_ids=torch.tensor([prompt + completion[:-1]])).logits[0, len(prompt) - 1 :]
    targets = torch.tensor(completion)[:, None]
    return log_softmax(logits / temperature, -1).gather(-1, targets)[:, 0]


def judged(groups: Sequence[PromptGroup], rewards: Sequence[list[float]]) -> list[PromptGroup]:
    """The groups as an older policy sampled them: its log-probs are random but not far off."""
    generator = torch.Generator().manual_seed(2)
    return [
        replace(
            group,
            teacher_prompts=[group.student_prompt] * len(group.completions),
            rewards=own,
            old_logprobs=[
                (torch.rand(len(c), generator=generator) - 6.0).tolist() for c in group.completions
            ],
        )
        for group, own in zip(groups, rewards, strict=True)
    ]


def stale(groups: Sequence[PromptGroup], model: PreTrainedModel) -> list[PromptGroup]:
    """Groups whose policy was a little different from `model`, both ways."""
    generator = torch.Generator().manual_seed(3)
    result = []
    for group in groups:
        rows = []
        for completion in group.completions:
            with torch.no_grad():
                logprobs = own_logprobs(model, group.student_prompt, completion)
            rows.append(
                (logprobs + 0.4 * torch.randn(len(completion), generator=generator)).tolist()
            )
        result.append(replace(group, old_logprobs=rows))
    return result


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def plain_loss(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    groups: Sequence[PromptGroup],
    *,
    coefficient: float,
    std: bool,
) -> Tensor:
    """GRPO written down once more, one rollout at a time, on full logits."""
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = rewards - rewards.mean()
        if std and advantages.any():
            advantages = advantages / rewards.std()
        for i, completion in enumerate(group.completions):
            logprobs = own_logprobs(model, group.student_prompt, completion)
            old = torch.tensor(group.old_logprobs[i], dtype=torch.float64)
            ratio = (logprobs - old).exp()
            bounded = ratio.clamp(0.9, 1.15)
            total = total - torch.minimum(ratio * advantages[i], bounded * advantages[i]).sum()
            if reference is not None:
                with torch.no_grad():
                    log_ratio_0 = own_logprobs(reference, group.student_prompt, completion)
                log_ratio = log_ratio_0 - logprobs
                total = total + coefficient * (log_ratio.exp() - log_ratio - 1).sum()
            tokens += len(completion)
    return total / tokens


def assert_as_exact_as_plain_torch(
    loss: float,
    found: dict[str, Tensor],
    models: tuple[PreTrainedModel, PreTrainedModel],
    groups: Sequence[PromptGroup],
    *,
    coefficient: float = 0.0,
    std: bool = True,
) -> None:
    """Hold a step of student and reference against plain_loss, in float64 and in float32."""
    results = []
    for convert in (copy.deepcopy, in_float64):
        student, base = map(convert, models)
        student.zero_grad()
        reference = base if coefficient else None
        expected = plain_loss(student, reference, groups, coefficient=coefficient, std=std)
        expected.backward()
        results.append((expected, gradients(student)))
    (torch_loss, torchs), (exact_loss, exact) = results
    # A mean of ratios times advantages: of order 1, and of either sign.
    assert_no_worse_than_torch("loss", torch.tensor(loss), torch_loss, exact_loss, floor=1.0)
    assert_no_worse_than_torch("gradients", found, torchs, exact)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("std", [True, False])
def test_loss_and_gradient_equal_plain_torch(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], coefficient: float, std: bool
) -> None:
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    groups = stale(judged(ragged_groups, [[1.0, 0.0, 0.0], [0.0, 1.0]]), student)
    teacher = BaseTeacher(base) if coefficient else None
    loss = make_loss(kl_coefficient=coefficient, normalize_std=std)
    scored = score(student, teacher, groups)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=len(scored.targets))
    output.loss.backward()
    assert_as_exact_as_plain_torch(
        output.loss.item(), gradients(student), (student, base), groups,
        coefficient=coefficient, std=std,
    )  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_loss_and_gradient_equal_trl(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], beta: float
) -> None:
    grpo_trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="compares with TRL: pip install trl==1.16.0"
    )
    student, base = tiny_model("llama", seed=0), tiny_model("llama", seed=1)
    groups = stale(judged(ragged_groups, [[1.0, 0.0, 1.0], [0.0, 1.0]]), student)
    loss = make_loss(kl_coefficient=beta)
    scored = score(student, BaseTeacher(base), groups)
    hidden = scored.student_hidden.detach().requires_grad_()
    scored = replace(scored, student_hidden=hidden)
    output = loss(scored, find_lm_head(student), find_lm_head(base), normalizer=len(scored.targets))
    output.loss.backward()

    # TRL's tokens are padded rows; its own function gets log-probs of these very hidden states.
    lengths = [len(c) for group in groups for c in group.completions]

    def padded(flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)

    def by_trl(dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Its loss, the gradient of the hidden states, and the share that it clips."""

        def logprobs(states: Tensor, model: PreTrainedModel) -> Tensor:
            logits = states @ model.lm_head.weight.detach().to(dtype).T / TEMPERATURE
            return padded(log_softmax(logits, -1).gather(-1, scored.targets[:, None])[:, 0])

        states = hidden.detach().to(dtype).requires_grad_()
        rows = logprobs(states, student)
        trainer = SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *a, **k: (rows, torch.zeros_like(rows), None),
            accelerator=SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x),
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
            model=SimpleNamespace(training=False),
            _metrics=defaultdict(lambda: defaultdict(list)),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level="token",
            loss_type="bnpo",
            epsilon_low=loss.clip_low,
            epsilon_high=loss.clip_high,
            beta=beta,
            use_vllm=False,
            _entropy_bonus_enabled=False,
        )
        assert scored.rewards is not None
        assert scored.old_logprobs is not None
        ids = padded(scored.targets)
        advantages = group_advantages(scored.rewards, scored.rollout_group, normalize_std=True)
        inputs = {
            "prompt_ids": ids[:, :0],
            "prompt_mask": ids[:, :0],
            "completion_ids": ids,
            "completion_mask": padded(torch.ones(sum(lengths), dtype=dtype)),
            "advantages": advantages.to(dtype),
            "old_per_token_logps": padded(scored.old_logprobs.to(dtype)),
            "ref_per_token_logps": logprobs(scored.teacher_hidden.to(dtype), base),
        }
        theirs = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
        theirs.backward()
        assert states.grad is not None
        (clipped,) = trainer._metrics["eval"]["clip_ratio/region_mean"]
        return theirs.detach(), states.grad, clipped

    torchs, exact = by_trl(torch.float32), by_trl(torch.float64)
    assert_no_worse_than_torch("loss", output.loss.detach(), torchs[0], exact[0], floor=1.0)
    assert_no_worse_than_torch("d hidden", hidden.grad, torchs[1], exact[1])
    clipped = exact[2]
    assert 0 < clipped < 1
    if beta == 0:
        # Shares of 33 tokens.
        assert 1 - output.active.float().mean().item() == pytest.approx(clipped)


def test_the_clip_stops_the_gradient_where_nothing_is_left_to_gain(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    (group,) = judged(ragged_groups[1:], [[1.0, 0.0]])
    for shift, clipped_rollout in ((-1.0, 0), (1.0, 1)):  # far more, far less likely than it was
        with torch.no_grad():
            rows = [
                (own_logprobs(student, group.student_prompt, c) + shift).tolist()
                for c in group.completions
            ]
        scored = score(student, None, [replace(group, old_logprobs=rows)])
        scored = replace(scored, student_hidden=scored.student_hidden.detach().requires_grad_())
        head = find_lm_head(student)
        output = make_loss()(scored, head, head, normalizer=1.0)
        output.loss.backward()
        assert torch.equal(output.active, scored.rollout_index != clipped_rollout)
        moved = scored.student_hidden.grad.abs().sum(-1) > 0
        assert torch.equal(moved, output.active)


def test_advantages_are_relative_to_the_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    plain = group_advantages(rewards, group, normalize_std=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0]
    normalised = group_advantages(rewards, group, normalize_std=True)
    # A standard deviation of four rewards, 0.5 but for a few roundings of 6e-8.
    torch.testing.assert_close(normalised[:4], plain[:4] / 0.5)
    assert normalised[4:].tolist() == [0, 0, 0]


def step_gradient(
    student: PreTrainedModel,
    groups: Sequence[PromptGroup],
    *,
    tokens_per_pass: int = 10_000,
    base: PreTrainedModel | None = None,
    **settings: Any,
) -> tuple[Any, dict[str, Tensor]]:
    totals = accumulate_gradients(
        StudentLoss(
            student,
            None if base is None else BaseTeacher(base),
            make_loss(**settings),
            lm_heads=(find_lm_head(student), find_lm_head(base or student)),
        ),
        groups,
        tokens_per_pass=tokens_per_pass,
    )
    return totals, gradients(student)


def test_a_group_of_equal_rewards_is_not_read_but_counts(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_model("llama")
    read: list[PromptGroup] = []

    def watched(model: Any, teacher: Any, groups: Sequence[PromptGroup], **options: Any) -> Any:
        read.extend(groups)
        return score(model, teacher, groups, **options)

    monkeypatch.setattr(selfdistill.training.gradients, "score", watched)
    informative, tied = stale(judged(ragged_groups, [[1.0, 0.0, 0.0], [1.0, 1.0]]), student)
    totals, both = step_gradient(student, [informative, tied])
    assert read == [informative]
    assert (totals.tokens, totals.tokens_read) == (33, 20)
    # By plain torch, too, which reads both: the mean is over the tokens of both.
    assert_as_exact_as_plain_torch(totals.loss, both, (student, student), [informative, tied])

    read.clear()
    totals, nothing = step_gradient(student, [tied])
    assert (read, totals.tokens_read, totals.loss) == ([], 0, 0.0)
    assert not any(gradient.any() for gradient in nothing.values())
    # The penalty has something to say about every rollout.
    _, penalised = step_gradient(
        student, [tied], base=tiny_model("llama", seed=1), kl_coefficient=1
    )
    assert read == [tied]
    assert any(gradient.any() for gradient in penalised.values())


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_micro_batches_give_the_gradient_of_the_whole_step(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup], coefficient: float
) -> None:
    student, base = tiny_model("llama"), tiny_model("llama", seed=1)
    rewards = [[1.0, 0.0, 0.0], [1.0, 0.0], [1.0, 1.0, 1.0]]
    groups = stale(judged([*ragged_groups, ragged_groups[0]], rewards), student)
    settings: dict[str, Any] = {"kl_coefficient": coefficient}
    if coefficient:
        settings["base"] = base
    whole, _ = step_gradient(student, groups, **settings)
    for size in (1, 120, 10_000):
        totals, found = step_gradient(student, groups, tokens_per_pass=size, **settings)
        assert totals.active == whole.active
        assert_as_exact_as_plain_torch(
            totals.loss, found, (student, base), groups, coefficient=coefficient
        )


def test_missing_rewards_are_an_error(
    tiny_model: ModelFactory, ragged_groups: list[PromptGroup]
) -> None:
    student = tiny_model("llama")
    head = find_lm_head(student)
    scored = score(student, None, stale(ragged_groups, student))
    with pytest.raises(ValueError, match="rewards is missing"):
        make_loss()(scored, head, head, normalizer=1.0)


def test_sampling_and_scoring_agree_on_the_log_probs(
    make_model: Callable[..., LlamaForCausalLM], solver_dir: Path
) -> None:
    """On-policy the ratio is 1: the engine's log-probs are those that the loss compares with."""
    from selfdistill.config import Config
    from selfdistill.rollout.attempts import judge
    from selfdistill.rollout.engine import SamplingParams
    from selfdistill.training.solver import load_solver

    config = Config.model_validate(
        {
            "model": str(solver_dir),
            "output_dir": "unused",
            "device": "cpu",
            "method": {"name": "grpo", "group_size": 3},
            "rollout": {"temperature": 0.7, "max_new_tokens": 12},
        }
    )
    solver = load_solver(config)
    problems = solver.task.problems(split="train", count=2)
    rollouts = solver.engine.generate(
        [solver.context.student_prompt(problem) for problem in problems],
        group_size=3,
        params=SamplingParams(temperature=0.7, max_new_tokens=12),
    )
    attempts = judge(solver.task, problems, rollouts)
    method = solver.build_method(config.method)
    groups = selfdistill.training.batch.render_groups(
        solver, method, attempts, method.contexts(attempts)
    )
    scored = score(solver.model, None, groups)
    head = find_lm_head(solver.model)
    output = method.loss(scored, head, head, normalizer=1.0)
    assert scored.old_logprobs is not None
    torchs, exact = (
        torch.cat(
            [
                own_logprobs(model, group.student_prompt, completion, temperature=0.7)
                for group in groups
                for completion in group.completions
            ]
        )
        for model in (solver.model, in_float64(solver.model))
    )
    for found in (output.student_logprob, scored.old_logprobs):
        assert_no_worse_than_torch("log-probs", found, torchs, exact)
