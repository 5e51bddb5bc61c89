"""The training loop: rollout, critique, context, score, fused loss, step, evaluate, checkpoint."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from selfdistill.checkpoint import CheckpointStore, TrainState, fingerprint
from selfdistill.config import Config, MethodConfig, save_config
from selfdistill.context import TeacherContext
from selfdistill.evaluate import Attempts, judge, summarize
from selfdistill.layout import PromptGroup
from selfdistill.methods import Method, build_method
from selfdistill.methods.loss import Head, Loss, lm_head
from selfdistill.progress import progress_bars
from selfdistill.rollout import Rollout, SamplingParams
from selfdistill.runlog import Clock, JsonLines, peak_rss_mib
from selfdistill.scoring import score
from selfdistill.solver import Solver, load_solver
from selfdistill.spans import token_span, token_steps
from selfdistill.tasks import Verdict
from selfdistill.teacher import BaseTeacher, LiveTeacher, Teacher

# Settings that a continued run may change without becoming another run.
MAY_DIFFER = ("model", "output_dir", "device", "steps", "checkpoint")


class RunExistsError(RuntimeError):
    """The output folder already holds a run that nobody asked to continue."""


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; per-token figures are means over the completion tokens read.

    None stands for what the step does not have: no teacher, or no token that was read. With several
    updates a step, the figures of the loss are those of the last one.

    Attributes:
        step: the training step, from 1.
        loss: the minimised loss (tokens that the advantage mask drops count as 0).
        kl: the divergence of the objective, in nats (GRPO: from the reference model).
        advantage: log p_teacher(y) - log p_student(y), in nats (GRPO: of the normalised reward).
        entropy: of the student's next-token distribution, in nats.
        active: share of all completion tokens, read or not, that carry a gradient.
        reward: share of the rollouts with the right answer.
        tied: share of the prompts whose rollouts all got the same reward.
        dropped: rollouts that were left out because the method has no context for them.
        grad_norm: before clipping.
        learning_rate: of this step.
        tokens: completion tokens of the rollouts that were not left out.
        packed_tokens: tokens that student and teacher read.
        unshared_tokens: what they would have read without prefix sharing.
        seconds: wall time of each phase.
        peak_rss_mib: highest resident memory of the process so far.
    """

    step: int
    loss: float
    kl: float | None
    advantage: float | None
    entropy: float | None
    active: float
    reward: float
    tied: float
    dropped: int
    grad_norm: float
    learning_rate: float
    tokens: int
    packed_tokens: int
    unshared_tokens: int
    seconds: dict[str, float]
    peak_rss_mib: float


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: finished optimiser steps.
        interrupted: True when it was stopped before the last step; it can be resumed.
        best_step: the step with the best held-out Avg@k.
        best_metric: that Avg@k.
    """

    step: int
    interrupted: bool
    best_step: int | None
    best_metric: float | None


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train as configured; everything lands in `config.output_dir`.

    Ctrl-C (or SIGTERM) lets the step at hand finish and saves it; a second one stops at once. The
    same configuration gives the same numbers, interrupted or not.

    Args:
        config: the run.
        resume: continue from the last checkpoint, if there is one.
        console: where progress is shown; the standard error stream by default.

    Raises:
        RunExistsError: the folder holds a run and `resume` is False.
        CheckpointError: the last checkpoint is torn, belongs to another run, or cannot be written.
        DivergedError: the loss or gradient is not finite; the last checkpoint is kept.
    """
    transformers_logging.disable_progress_bar()
    console = console or Console(stderr=True)
    store = CheckpointStore(config.output_dir / "checkpoints")
    if os.path.lexists(store.last) and not resume:
        raise RunExistsError(
            f"{config.output_dir} already holds a run: resume it (--resume), or choose another "
            "output_dir"
        )
    solver = load_solver(config)
    student = solver.model
    teacher, teacher_model = build_teacher(config, student)
    heads = (lm_head(student), lm_head(teacher_model))
    method = build_method(config, solver.task)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    state = TrainState(
        step=0,
        best_step=None,
        best_metric=None,
        config=config.model_dump(mode="json"),
        base_sha256=fingerprint(student),
    )
    if os.path.lexists(store.last):
        found = store.load(
            store.last,
            model=student,
            optimizer=optimizer,
            config=state.config,
            base_sha256=state.base_sha256,
            may_differ=MAY_DIFFER,
        )
        state = replace(found, config=state.config)
        console.print(f"Resuming after step {state.step} of {config.steps}.")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, config.output_dir / "config.yaml")
    metrics_log = JsonLines(config.output_dir / "metrics.jsonl")
    metrics_log.keep_until(state.step)
    evaluation_log = JsonLines(config.output_dir / "evaluations.jsonl")
    evaluation_log.keep_until(state.step if state.best_step is not None else -1)
    problems = solver.task.problems(
        split="train", count=config.steps * config.prompts_per_step, seed=config.seed
    )

    with deferred_interrupt(console) as interrupt, progress_bars(console) as bars:
        bar = bars.add_task("train", total=config.steps, completed=state.step, note="")
        if state.best_step is None:
            state = evaluate(solver, state, evaluation_log, bars)
            store.save(state, student, solver.tokenizer, optimizer)

        while state.step < config.steps and not interrupt.requested:
            step = state.step + 1
            clock = Clock()
            end = step * config.prompts_per_step
            batch = problems[end - config.prompts_per_step : end]

            with clock("rollout"):
                groups = solver.engine.generate(
                    [solver.context.student_prompt(problem) for problem in batch],
                    group_size=method.group_size,
                    params=SamplingParams(
                        temperature=config.rollout.temperature,
                        max_new_tokens=config.rollout.max_new_tokens,
                        seed=derive_seed(config.seed, "rollout", step),
                    ),
                )
            with clock("reward"):
                attempts = judge(solver.task, batch, groups)
            with clock("critique"):
                contexts = method.contexts(attempts)
            with clock("context"):
                kept, contexts = leave_out(method, attempts, contexts)
                prompt_groups = render_groups(
                    solver, cut_rollouts(solver, config.method, kept), contexts
                )
            rate = settings.learning_rate * min(1.0, step / max(1, settings.warmup_steps))
            for _ in range(config.updates_per_step):
                with clock("score"):
                    optimizer.zero_grad()
                    totals = accumulate_gradients(
                        student,
                        teacher,
                        method.loss,
                        prompt_groups,
                        heads=heads,
                        groups_per_pass=config.prompts_per_microbatch,
                    )
                with clock("update"):
                    for parameters in optimizer.param_groups:
                        parameters["lr"] = rate
                    norm = torch.nn.utils.clip_grad_norm_(
                        student.parameters(), settings.max_grad_norm
                    )
                    refuse_divergence(step, totals.loss, norm.item(), store)
                    optimizer.step()

            state = replace(state, step=step)
            if step % config.evaluation.every == 0 or step == config.steps:
                with clock("evaluate"):
                    state = evaluate(solver, state, evaluation_log, bars)
            metrics = StepMetrics(
                step=step,
                loss=totals.loss,
                kl=None if teacher is None else totals.per_token(totals.kl),
                advantage=totals.per_token(totals.advantage),
                entropy=totals.per_token(totals.entropy),
                active=totals.active / max(1, totals.tokens),
                reward=mean_reward(attempts),
                tied=tied_prompts(attempts),
                dropped=sum(len(attempt.rollouts) for attempt in attempts)
                - sum(len(attempt.rollouts) for attempt in kept),
                grad_norm=norm.item(),
                learning_rate=rate,
                tokens=totals.tokens,
                packed_tokens=totals.packed_tokens,
                unshared_tokens=totals.unshared_tokens,
                seconds=clock.seconds,
                peak_rss_mib=peak_rss_mib(),
            )
            metrics_log.append(asdict(metrics))
            stopping = interrupt.requested or step == config.steps
            if stopping or state.best_step == step or step % config.checkpoint.every == 0:
                store.save(state, student, solver.tokenizer, optimizer)
            kl = "" if metrics.kl is None else f"KL {metrics.kl:.3f}  "
            bars.update(bar, advance=1, note=f"{kl}reward {metrics.reward:.2f}")
    return TrainResult(
        step=state.step,
        interrupted=state.step < config.steps,
        best_step=state.best_step,
        best_metric=state.best_metric,
    )


def build_teacher(
    config: Config, student: PreTrainedModel, *, base: PreTrainedModel | None = None
) -> tuple[Teacher | None, PreTrainedModel]:
    """Return the teacher strategy and the model whose head it uses; no teacher, the student's.

    Args:
        config: names the strategy.
        student: the model that learns.
        base: the model as it was before; None takes a copy of the student, which then must not
            have learned anything yet.
    """
    if config.method.teacher is None:
        return None, student
    match config.method.teacher.name:
        case "live":
            return LiveTeacher(), student
        case "base":
            base = base if base is not None else copy.deepcopy(student)
            return BaseTeacher(base), base


def leave_out(
    method: Method,
    attempts: Sequence[Attempts],
    contexts: Sequence[Sequence[TeacherContext | None]],
) -> tuple[list[Attempts], list[list[TeacherContext | None]]]:
    """Return attempts and contexts without the rollouts that the method cannot learn from.

    Prompts whose rollouts are all left out are left out, too: nothing may remain.
    """
    if not method.needs_context:
        return list(attempts), list(map(list, contexts))
    kept: list[Attempts] = []
    kept_contexts: list[list[TeacherContext | None]] = []
    for attempt, group_contexts in zip(attempts, contexts, strict=True):
        places = [i for i, context in enumerate(group_contexts) if context is not None]
        if places:
            kept.append(
                Attempts(
                    attempt.problem,
                    [attempt.rollouts[i] for i in places],
                    [attempt.verdicts[i] for i in places],
                )
            )
            kept_contexts.append([group_contexts[i] for i in places])
    return kept, kept_contexts


def cut_rollouts(
    solver: Solver, method: MethodConfig, attempts: Sequence[Attempts]
) -> list[Attempts]:
    """Cut the tokens of each rollout behind its first wrong step, if the loss asks for it."""
    if method.name == "grpo" or not method.loss.stop_after_first_wrong_step:
        return list(attempts)

    def cut(rollout: Rollout, verdict: Verdict) -> Rollout:
        span = token_span(solver.tokenizer, rollout, verdict.wrong_span)
        stop = None if span is None else span[1]
        return replace(
            rollout, token_ids=rollout.token_ids[:stop], logprobs=rollout.logprobs[:stop]
        )

    return [
        replace(attempt, rollouts=list(map(cut, attempt.rollouts, attempt.verdicts)))
        for attempt in attempts
    ]


def rollout_steps(solver: Solver, rollouts: Sequence[Rollout]) -> list[list[int]] | None:
    """Return the step of every token, if the loss asks for it; see `PromptGroup.steps`."""
    method = solver.config.method
    if method.name == "grpo":
        return None
    mask = method.loss.advantage_mask
    if mask is None or not mask.per_step:
        return None
    return [
        token_steps(solver.tokenizer, rollout, solver.task.step_spans(rollout.text))
        for rollout in rollouts
    ]


def render_groups(
    solver: Solver,
    attempts: Sequence[Attempts],
    contexts: Sequence[Sequence[TeacherContext | None]],
) -> list[PromptGroup]:
    """Put questions, contexts and judged rollouts together as token ids."""
    return [
        solver.context.prompt_group(
            attempt.problem,
            group_contexts,
            [rollout.token_ids for rollout in attempt.rollouts],
            rewards=[float(verdict.correct) for verdict in attempt.verdicts],
            old_logprobs=[rollout.logprobs for rollout in attempt.rollouts],
            steps=rollout_steps(solver, attempt.rollouts),
        )
        for attempt, group_contexts in zip(attempts, contexts, strict=True)
    ]


@dataclass
class Totals:
    """Sums over the completion tokens that were read in one step.

    `loss` is already divided by the step's denominator; `tokens` counts those not read, too.
    """

    tokens: int
    tokens_read: int = 0
    loss: float = 0.0
    kl: float = 0.0
    advantage: float = 0.0
    entropy: float = 0.0
    active: int = 0
    packed_tokens: int = 0
    unshared_tokens: int = 0

    def per_token(self, total: float) -> float | None:
        """Return a sum's mean over the tokens that were read; None when there are none."""
        return total / self.tokens_read if self.tokens_read else None


def accumulate_gradients(
    student: PreTrainedModel,
    teacher: Teacher | None,
    loss: Loss,
    groups: Sequence[PromptGroup],
    *,
    heads: tuple[Head, Head],
    groups_per_pass: int,
) -> Totals:
    """Add the gradient of the step's mean loss to the student's parameters.

    Every pass divides by the denominator of all groups, so the gradient does not depend on how many
    groups one pass takes. Groups without gradient are not read.

    Args:
        student: gets the gradients.
        teacher: scores the same completions with more context; None for a method without one.
        loss: the method's loss.
        groups: all prompt groups of the step.
        heads: of the student and of the teacher.
        groups_per_pass: prompt groups that are scored at once.
    """
    totals = Totals(tokens=sum(group.num_tokens for group in groups))
    denominator = sum(loss.denominator(group) for group in groups)
    to_read = [group for group in groups if loss.learns_from(group)]
    for start in range(0, len(to_read), groups_per_pass):
        scored = score(student, teacher, to_read[start : start + groups_per_pass])
        output = loss(scored, *heads, normalizer=denominator)
        output.loss.backward()
        assert output.advantage is not None  # the loss was given the sampled tokens
        totals.tokens_read += len(scored.targets)
        totals.loss += output.loss.item()
        totals.kl += output.divergence.sum().item()
        totals.advantage += output.advantage.sum().item()
        totals.entropy += output.entropy.sum().item()
        totals.active += int(output.active.sum())
        totals.packed_tokens += scored.statistics.packed_tokens
        totals.unshared_tokens += scored.statistics.unshared_tokens
    return totals


def mean_reward(attempts: Sequence[Attempts]) -> float:
    """Return the share of rollouts with the right answer."""
    correct = [verdict.correct for attempt in attempts for verdict in attempt.verdicts]
    return sum(correct) / len(correct)


def tied_prompts(attempts: Sequence[Attempts]) -> float:
    """Return the share of prompts whose rollouts all got the same reward (GRPO learns nothing)."""
    tied = [len({verdict.correct for verdict in attempt.verdicts}) == 1 for attempt in attempts]
    return sum(tied) / len(tied)


def evaluate(solver: Solver, state: TrainState, log: JsonLines, bars: Progress) -> TrainState:
    """Evaluate on the dev split, log it, and return the state with the best step so far."""
    settings = solver.config.evaluation
    clock = Clock()
    bar = bars.add_task("evaluate", total=settings.problems, note=f"step {state.step}, dev")
    with clock("evaluate"):
        attempts = solver.attempt(
            split="dev",
            problems=settings.problems,
            samples=settings.samples,
            seed=derive_seed(solver.config.seed, "evaluate", state.step),
            progress=lambda count: bars.advance(bar, count),
        )
    bars.remove_task(bar)
    result = summarize(attempts, solver.task, split="dev")
    log.append({"step": state.step, "seconds": clock.seconds, **json.loads(result.to_json())})
    value = result.avg_at_k.value
    if state.best_metric is not None and value <= state.best_metric:
        return state
    return replace(state, best_step=state.step, best_metric=value)


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on all parts, so that no two uses share random numbers."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def refuse_divergence(step: int, loss: float, grad_norm: float, store: CheckpointStore) -> None:
    """Stop before a step that would ruin the weights.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise DivergedError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}, expected finite "
        f"numbers. The step was not taken; the last good state is {store.last}. Lower "
        "optimizer.learning_rate, or look at the rollouts of this step."
    )


@dataclass
class Interrupt:
    """Whether somebody asked the run to stop."""

    requested: bool = False


@contextmanager
def deferred_interrupt(console: Console) -> Iterator[Interrupt]:
    """Turn the first Ctrl-C or SIGTERM into a request; the second one acts as usual."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt  # only the main thread may set signal handlers
        return
    previous: dict[int, Any] = {}

    def request(signum: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        for number, handler in previous.items():
            signal.signal(number, handler)
        console.print("Finishing and saving this step; once more to stop at once.")

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, request)
    try:
        yield interrupt
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
