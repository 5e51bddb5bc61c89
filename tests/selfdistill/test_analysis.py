from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.analysis import (
    TokenAnalysis,
    analyze,
    erroneous_attempts,
    localise,
    token_span,
)
from selfdistill.config import Config
from selfdistill.context import ContextRenderer
from selfdistill.evaluate import Attempts, judge
from selfdistill.methods import build_method
from selfdistill.methods.loss import find_heads
from selfdistill.rollout import Rollout
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.solver import Solver
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.teacher import build_teacher

TASK = ArithmeticTask(step_counts=(3,))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Rollout:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Rollout(ids, [0.0] * len(ids), tokenizer.decode(ids, skip_special_tokens=True), True)


def wrong_attempt(reference: str) -> str:
    """The reference with another result in the second step, and what follows from it."""
    steps = reference.split(" <")
    words = steps[1].split(" ")
    words[-1] = f"{(int(words[-1]) + 10) % 100:02d}"
    return " <".join([steps[0], " ".join(words), *steps[2:]])


def record(
    advantage: list[float], wrong: tuple[int, int] | None, kl: list[float] | None = None
) -> TokenAnalysis:
    zeros = [0.0] * len(advantage)
    return TokenAnalysis(
        problem_id="p",
        question="",
        answer="",
        reference="",
        response="",
        context="",
        correct=False,
        first_wrong_step=None if wrong is None else 1,
        wrong_tokens=wrong,
        tokens=[""] * len(advantage),
        advantage=advantage,
        kl=kl or zeros,
        entropy=zeros,
        student_logprob=zeros,
        teacher_logprob=zeros,
    )


def test_spans_of_text_become_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    (problem,) = TASK.problems(split="test", count=1)
    rollout = encode(tokenizer, wrong_attempt(problem.reference))
    verdict = TASK.check(problem, rollout.text)
    assert verdict.first_wrong_step == 2
    span = token_span(tokenizer, rollout, verdict.wrong_span)
    assert span is not None
    tokens = [tokenizer.decode([token]) for token in rollout.token_ids]
    assert tokens[span[0]] == "<step_2>"
    assert tokens[span[1]] == "<step_3>"
    assert verdict.wrong_span is not None
    assert (
        tokenizer.decode(rollout.token_ids[slice(*span)])
        == rollout.text[slice(*verdict.wrong_span)]
    )
    assert token_span(tokenizer, rollout, None) is None


def test_figures_are_those_of_the_models_own_logits(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = Config(model="unused", output_dir=Path("unused"))
    student, base = make_model(seed=0), make_model(seed=1)
    renderer = ContextRenderer(tokenizer)
    solver = Solver(
        config, student, tokenizer, TASK, TransformersEngine(student, tokenizer), renderer
    )
    teacher = build_teacher(config.method.teacher, student, base=base)
    method = build_method(config, TASK)
    attempts = []
    for problem in TASK.problems(split="test", count=3):
        rollout = encode(tokenizer, wrong_attempt(problem.reference))
        attempts.append((problem, rollout, TASK.check(problem, rollout.text)))
    records = analyze(
        solver,
        teacher,
        method,
        attempts,
        heads=find_heads(student, teacher),
        batch_size=2,
    )
    assert [r.problem_id for r in records] == [problem.id for problem, _, _ in attempts]
    for found, (problem, rollout, _) in zip(records, attempts, strict=True):
        ((context,),) = method.contexts(judge(TASK, [problem], [[rollout]]))
        assert found.context == context.text
        assert found.wrong_tokens is not None
        logprobs = []
        for model, prompt in (
            (student, renderer.student_prompt(problem)),
            (base, renderer.teacher_prompt(problem, context)),
        ):
            with torch.no_grad():
                ids = torch.tensor([[*prompt, *rollout.token_ids[:-1]]])
                logprobs.append(model(ids).logits[0, len(prompt) - 1 :].log_softmax(-1))
        s, t = logprobs
        targets = torch.tensor(rollout.token_ids)[:, None]
        expected = {
            "student_logprob": s.gather(-1, targets)[:, 0],
            "teacher_logprob": t.gather(-1, targets)[:, 0],
            "advantage": (t - s).gather(-1, targets)[:, 0],
            "kl": (t.exp() * (t - s)).sum(-1),
            "entropy": -(s.exp() * s).sum(-1),
        }
        for name, values in expected.items():
            torch.testing.assert_close(
                torch.tensor(getattr(found, name)), values, atol=2e-5, rtol=1e-4
            )
        assert "".join(found.tokens) == "".join(tokenizer.decode([t]) for t in rollout.token_ids)


def test_localisation_looks_before_at_and_after_the_wrong_step() -> None:
    found = localise(
        [
            record([0.2, 0.4, -3.0, 1.0, 0.0], (2, 4), [0, 0, 3, 0, 1]),
            record([-0.3, -5.0], (1, 2)),
            record([9.0, 9.0], None),
        ]
    )
    assert found.attempts == 2
    assert found.mean_before == pytest.approx((0.2 + 0.4 - 0.3) / 3)
    assert found.mean_at == pytest.approx((-3 + 1 - 5) / 3)
    assert found.mean_after == pytest.approx(0)
    assert found.lowest_at == pytest.approx(-4)
    assert found.share_at == pytest.approx(9 / 9.9)
    assert found.negative_before == pytest.approx(1 / 3)
    assert found.kl_share_at == pytest.approx(3 / 4)
    nothing = localise([record([1.0], None)])
    assert (nothing.attempts, nothing.mean_before, nothing.share_at) == (0, None, None)


def test_one_wrong_attempt_of_each_problem_is_picked(tokenizer: PreTrainedTokenizerBase) -> None:
    problems = TASK.problems(split="test", count=4)
    attempts = []
    for i, problem in enumerate(problems):
        texts = [problem.reference] * 2 + [wrong_attempt(problem.reference)] * (2 if i else 0)
        rollouts = [encode(tokenizer, text) for text in texts]
        verdicts = [TASK.check(problem, rollout.text) for rollout in rollouts]
        attempts.append(Attempts(problem, rollouts, verdicts))
    picked = erroneous_attempts(attempts, limit=2)
    assert [problem for problem, _, _ in picked] == problems[1:3]
    assert all(verdict.wrong_span is not None for _, _, verdict in picked)
