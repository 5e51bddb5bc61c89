"""The training loop: rollout, critique, context, score, fused loss, step, evaluate, checkpoint."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import signal
import threading
from collections import Counter
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
from selfdistill.config import Config, save_config
from selfdistill.context import TeacherContext
from selfdistill.evaluate import Attempts, judge, summarize
from selfdistill.layout import PromptGroup
from selfdistill.methods import build_method
from selfdistill.methods.loss import Head, Loss, lm_head
from selfdistill.progress import progress_bars
from selfdistill.rollout import Rollout, SamplingParams
from selfdistill.runlog import Clock, JsonLines, peak_rss_mib
from selfdistill.scoring import score
from selfdistill.solver import Solver, load_solver
from selfdistill.teacher import BaseTeacher, LiveTeacher, Teacher

# Settings that a continued run may change without becoming another run.
MAY_DIFFER = ("model", "output_dir", "device", "steps", "checkpoint")


class RunExistsError(RuntimeError):
    """The output folder already holds a run that nobody asked to continue."""


class DivergedError(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl; per-token figures are means over the step's completion tokens.

    Attributes:
        step: the optimiser step, from 1.
        loss: the minimised loss (tokens that the advantage mask drops count as 0).
        kl: the divergence of the objective, over all tokens, in nats.
        advantage: log p_teacher(y) - log p_student(y), in nats.
        entropy: of the student's next-token distribution, in nats.
        active: share of the tokens that carry a gradient.
        reward: share of the rollouts with the right answer.
        engine_disagreement: largest difference between the rollout engine's log-prob of a token and
            the trainer's own, in nats; None where nothing was compared.
        contexts: how many rollouts had which kind of context; "none" had none.
        grad_norm: before clipping.
        learning_rate: of this step.
        tokens: completion tokens.
        packed_tokens: tokens that student and teacher read.
        unshared_tokens: what they would have read without prefix sharing.
        seconds: wall time of each phase.
        peak_rss_mib: highest resident memory of the process so far.
    """

    step: int
    loss: float
    kl: float
    advantage: float
    entropy: float
    active: float
    reward: float
    engine_disagreement: float | None
    contexts: dict[str, int]
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
        EngineError: an engine died, or a critic's server gave no answer; likewise.
        EngineMismatchError: the rollout engine has other weights than the student; likewise.
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
        solver.engine.sync(student)
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
                prompts = [solver.context.student_prompt(problem) for problem in batch]
                groups = solver.engine.generate(
                    prompts,
                    group_size=method.group_size,
                    params=SamplingParams(
                        temperature=config.rollout.temperature,
                        max_new_tokens=config.rollout.max_new_tokens,
                        seed=derive_seed(config.seed, "rollout", step),
                    ),
                )
            with clock("check"):
                disagreement = check_engine(config, step, student, heads[0], prompts, groups)
            with clock("reward"):
                attempts = judge(solver.task, batch, groups)
            with clock("critique"):
                contexts = method.contexts(attempts)
            with clock("context"):
                prompt_groups = render_groups(solver, attempts, contexts)
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
                rate = settings.learning_rate * min(1.0, step / max(1, settings.warmup_steps))
                for parameters in optimizer.param_groups:
                    parameters["lr"] = rate
                norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
                refuse_divergence(step, totals.loss, norm.item(), store)
                optimizer.step()
            with clock("sync"):
                solver.engine.sync(student)

            state = replace(state, step=step)
            if step % config.evaluation.every == 0 or step == config.steps:
                with clock("evaluate"):
                    state = evaluate(solver, state, evaluation_log, bars)
            metrics = StepMetrics(
                step=step,
                loss=totals.loss,
                kl=totals.kl / totals.tokens,
                advantage=totals.advantage / totals.tokens,
                entropy=totals.entropy / totals.tokens,
                active=totals.active / totals.tokens,
                reward=mean_reward(attempts),
                engine_disagreement=disagreement,
                contexts=count_contexts(contexts),
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
            bars.update(bar, advance=1, note=f"KL {metrics.kl:.3f}  reward {metrics.reward:.2f}")
    return TrainResult(
        step=state.step,
        interrupted=state.step < config.steps,
        best_step=state.best_step,
        best_metric=state.best_metric,
    )


def build_teacher(
    config: Config, student: PreTrainedModel, *, base: PreTrainedModel | None = None
) -> tuple[Teacher, PreTrainedModel]:
    """Return the teacher strategy and the model whose head it uses.

    Args:
        config: names the strategy.
        student: the model that learns.
        base: the model as it was before; None takes a copy of the student, which then must not
            have learned anything yet.
    """
    match config.method.teacher.name:
        case "live":
            return LiveTeacher(), student
        case "base":
            base = base if base is not None else copy.deepcopy(student)
            return BaseTeacher(base), base


def check_engine(
    config: Config,
    step: int,
    student: PreTrainedModel,
    head: Head,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Rollout]],
) -> float | None:
    """Compare the log-probs of an engine that has weights of its own with the student's.

    One prompt's rollouts are enough: wrong weights are wrong everywhere.

    Returns:
        The largest difference in nats, or None when there is nothing to compare at this step.

    Raises:
        EngineMismatchError: it is larger than the configured tolerance.
    """
    engine = config.rollout.engine
    if engine.name == "transformers" or step % engine.check_every != 0:
        return None
    from selfdistill.rollout.agreement import check_agreement

    exact = engine.dtype == "float32" and student.dtype == torch.float32
    return check_agreement(
        student,
        head,
        prompts[:1],
        groups[:1],
        temperature=config.rollout.temperature,
        tolerance=engine.tolerance or (1e-4 if exact else 1.0),
    )


def count_contexts(contexts: Sequence[Sequence[TeacherContext | None]]) -> dict[str, int]:
    """Return how many rollouts have which kind of context, "none" included."""
    return dict(
        Counter("none" if context is None else context.kind for g in contexts for context in g)
    )


def render_groups(
    solver: Solver,
    attempts: Sequence[Attempts],
    contexts: Sequence[Sequence[TeacherContext]],
) -> list[PromptGroup]:
    """Put questions, contexts and rollouts together as token ids."""
    return [
        solver.context.prompt_group(
            attempt.problem,
            group_contexts,
            [rollout.token_ids for rollout in attempt.rollouts],
        )
        for attempt, group_contexts in zip(attempts, contexts, strict=True)
    ]


@dataclass
class Totals:
    """Sums over the completion tokens of one step (`loss` is already divided by their number)."""

    tokens: int
    loss: float = 0.0
    kl: float = 0.0
    advantage: float = 0.0
    entropy: float = 0.0
    active: int = 0
    packed_tokens: int = 0
    unshared_tokens: int = 0


def accumulate_gradients(
    student: PreTrainedModel,
    teacher: Teacher,
    loss: Loss,
    groups: Sequence[PromptGroup],
    *,
    heads: tuple[Head, Head],
    groups_per_pass: int,
) -> Totals:
    """Add the gradient of the step's mean loss to the student's parameters.

    Every pass divides by the tokens of all groups, so the gradient does not depend on how many
    groups one pass takes.

    Args:
        student: gets the gradients.
        teacher: scores the same completions with more context.
        loss: the method's loss.
        groups: all prompt groups of the step.
        heads: of the student and of the teacher.
        groups_per_pass: prompt groups that are scored at once.
    """
    tokens = sum(len(completion) for group in groups for completion in group.completions)
    totals = Totals(tokens=tokens)
    for start in range(0, len(groups), groups_per_pass):
        scored = score(student, teacher, groups[start : start + groups_per_pass])
        output = loss(scored, *heads, normalizer=tokens)
        output.loss.backward()
        assert output.advantage is not None  # the loss was given the sampled tokens
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
