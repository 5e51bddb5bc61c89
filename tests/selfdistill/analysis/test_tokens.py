from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from exactness import assert_no_worse_than_torch
from padded_step import in_float64
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from selfdistill.analysis.tokens import analyze, erroneous_attempts
from selfdistill.config import AdvantageMaskConfig, Config, LossConfig, RefSolMethod
from selfdistill.methods.method import Contexts
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import LiveTeacher, build_teacher
from selfdistill.prompts.context import ContextRenderer, TeacherContext
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.rollout.engine import Rollout
from selfdistill.rollout.spans import token_span
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic import ArithmeticTask
from selfdistill.training.solver import Solver

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


@torch.no_grad()
def plain_figures(
    models: tuple[LlamaForCausalLM, ...], prompts: tuple[list[int], ...], completion: list[int]
) -> dict[str, torch.Tensor]:
    """What a record holds of each token, by plain forward passes of student and teacher."""
    s, t = (
        model(torch.tensor([[*prompt, *completion[:-1]]]))
        .logits[0, len(prompt) - 1 :]
        .log_softmax(-1)
        for model, prompt in zip(models, prompts, strict=True)
    )
    targets = torch.tensor(completion)[:, None]
    return {
        "student_logprob": s.gather(-1, targets)[:, 0],
        "teacher_logprob": t.gather(-1, targets)[:, 0],
        "advantage": (t - s).gather(-1, targets)[:, 0],
        "kl": (t.exp() * (t - s)).sum(-1),
        "entropy": -(s.exp() * s).sum(-1),
    }


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
    method = solver.build_method(config.method)
    problems = TASK.problems(split="test", count=3)
    groups = [
        [encode(tokenizer, text) for text in (p.reference, wrong_attempt(p.reference))]
        for p in problems
    ]
    attempts = judge(TASK, problems, groups)
    chosen = [(2, 1), (0, 1), (1, 1), (1, 0)]
    records = analyze(
        solver,
        teacher,
        method,
        attempts,
        chosen,
        lm_heads=find_lm_heads(student, teacher),
        batch_size=2,
    )
    assert [r.problem_id for r in records] == [problems[i].id for i, _ in chosen]
    for found, (i, j) in zip(records, chosen, strict=True):
        problem, rollout = problems[i], groups[i][j]
        context = method.contexts(attempts)[i][j]
        assert context is not None
        assert found.context == context.text
        assert (found.wrong_tokens is not None) == (j == 1)
        prompts = renderer.student_prompt(problem), renderer.teacher_prompt(problem, context)
        torchs = plain_figures((student, base), prompts, rollout.token_ids)
        exact = plain_figures(tuple(map(in_float64, (student, base))), prompts, rollout.token_ids)
        for name in exact:
            values = torch.tensor(getattr(found, name))
            # Differences and means of log-probs, of order 1 and more.
            assert_no_worse_than_torch(name, values, torchs[name], exact[name], floor=1.0)
        assert "".join(found.tokens) == "".join(tokenizer.decode([t]) for t in rollout.token_ids)


def test_wrong_attempts_are_picked_problem_by_problem(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    problems = TASK.problems(split="test", count=4)
    groups = []
    for i, problem in enumerate(problems):
        texts = [problem.reference] + [wrong_attempt(problem.reference)] * (2 if i else 0)
        groups.append([encode(tokenizer, text) for text in texts])
    cut_off = encode(tokenizer, problems[0].reference.rsplit(" <", 1)[0])
    groups[0].append(cut_off)
    attempts = judge(TASK, problems, groups)
    assert erroneous_attempts(attempts, limit=4) == [(0, 1), (1, 1), (1, 2), (2, 1)]
    assert erroneous_attempts(attempts, limit=9, each=1) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert erroneous_attempts(attempts, limit=2, located=True) == [(1, 1), (1, 2)]


def others(attempts: Sequence[Attempts]) -> Contexts:
    """What the other rollout of each group says."""
    return [
        [TeacherContext("reference", other.text) for other in reversed(attempt.rollouts)]
        for attempt in attempts
    ]


def test_contexts_see_the_whole_group(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    config = Config(model="unused", output_dir=Path("unused"))
    student = make_model()
    solver = Solver(
        config,
        student,
        tokenizer,
        TASK,
        TransformersEngine(student, tokenizer),
        ContextRenderer(tokenizer),
    )
    problems = TASK.problems(split="test", count=2)
    groups = [
        [encode(tokenizer, text) for text in (p.reference, wrong_attempt(p.reference))]
        for p in problems
    ]
    seen: list[int] = []
    (record,) = analyze(
        solver,
        LiveTeacher(),
        replace(solver.build_method(config.method), contexts=others),
        judge(TASK, problems, groups),
        [(1, 1)],
        lm_heads=find_lm_heads(student, LiveTeacher()),
        progress=seen.append,
    )
    assert record.response == groups[1][1].text
    assert record.context == groups[1][0].text
    assert seen == [1]


def test_a_method_is_scored_with_its_own_loss(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Not with that of the run, which has no use for steps here."""
    config = Config(model="unused", output_dir=Path("unused"))
    student = make_model()
    solver = Solver(
        config,
        student,
        tokenizer,
        TASK,
        TransformersEngine(student, tokenizer),
        ContextRenderer(tokenizer),
    )
    loss = LossConfig(advantage_mask=AdvantageMaskConfig(per_step=True))
    (problem,) = TASK.problems(split="test", count=1)
    attempts = judge(TASK, [problem], [[encode(tokenizer, problem.reference)]])
    (record,) = analyze(
        solver,
        LiveTeacher(),
        solver.build_method(RefSolMethod(loss=loss)),
        attempts,
        [(0, 0)],
        lm_heads=find_lm_heads(student, LiveTeacher()),
    )
    assert len(record.advantage) == len(attempts[0].rollouts[0].token_ids)
