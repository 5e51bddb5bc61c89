"""Policy gradients in plain torch, and attempts to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from exactness import assert_no_worse_than_torch
from padded_step import gradients, in_float64
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from selfdistill.config import Config
from selfdistill.methods.build import build_method
from selfdistill.methods.method import Method
from selfdistill.model.layout import PromptGroup
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.rollout.engine import Rollout
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.tasks.interface import Task

TEMPERATURE = 1.3


def own_logprobs(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """[t, V] by the model's own forward, at the temperature of the loss."""
    logits = model(input_ids=torch.tensor([prompt + completion[:-1]])).logits[0, len(prompt) - 1 :]
    return log_softmax(logits / TEMPERATURE, -1)


def sampled(logprobs: Tensor, completion: list[int]) -> Tensor:
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def known(groups: Sequence[PromptGroup], rewards: Sequence[list[float]]) -> list[PromptGroup]:
    """The groups with rewards, log-probs of an older policy and some wrong tokens."""
    generator = torch.Generator().manual_seed(2)

    def rows(group: PromptGroup) -> list[list[float]]:
        return [(torch.rand(len(c), generator=generator) - 5.0).tolist() for c in group.completions]

    return [
        replace(
            group,
            rewards=own,
            old_logprobs=rows(group),
            wrong=[[2 <= i < 5 for i in range(len(c))] for c in group.completions],
        )
        for group, own in zip(groups, rewards, strict=True)
    ]


def surrogate(logprobs: Tensor, old: list[float], advantage: float | Tensor) -> Tensor:
    ratio = (logprobs - torch.tensor(old, dtype=logprobs.dtype)).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def assert_equal_to_plain_torch(
    loss: Tensor,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plain: Callable[[PreTrainedModel, PreTrainedModel], Tensor],
) -> None:
    """Hold a loss, whose backward pass is done, against a formula in float32 and in float64."""
    ours = loss.detach(), gradients(student)
    results = []
    for convert in (copy.deepcopy, in_float64):
        models = convert(student), convert(teacher)
        models[0].zero_grad()
        expected = plain(*models)
        expected.backward()
        results.append((expected.detach(), gradients(models[0])))
    for name, *found in zip(("loss", "gradients"), ours, *results, strict=True):
        # A mean of ratios times advantages is of order 1, and of either sign.
        assert_no_worse_than_torch(name, *found, **({"floor": 1.0} if name == "loss" else {}))


TASK = ArithmeticTask(step_counts=(3,))


def built(task: Task, **method: object) -> Method:
    config = Config.model_validate({"model": "m", "output_dir": "o", "method": method})
    return build_method(config.method, task, temperature=1.0, device="cpu", today=None)


def attempts_at(*texts: str) -> list[Attempts]:
    (problem,) = TASK.problems(split="train", count=1)
    return judge(TASK, [problem], [[Rollout([5, 2], [-0.1, -0.2], text, True) for text in texts]])


def solution() -> list[str]:
    (problem,) = TASK.problems(split="train", count=1)
    return problem.reference.replace(" <", "|<").split("|")


def spoilt(step: str) -> str:
    return f"{step[:-2]}{(int(step[-2:]) + 1) % 100:02d}"
