"""Evaluations on the dev split while training goes on."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from rich.progress import Progress

from selfdistill.config import EvaluationConfig, TeacherConfig
from selfdistill.evaluation.scores import summarize
from selfdistill.rollout.attempts import Attempts
from selfdistill.runlog import Clock, JsonLines
from selfdistill.seeds import derive_seed
from selfdistill.tasks.build import held_out_problems
from selfdistill.training.checkpoint import TrainState
from selfdistill.training.distributed import Ranks
from selfdistill.training.interrupt import Interrupt
from selfdistill.training.solver import Solver


def evaluation_is_due(state: TrainState, settings: EvaluationConfig, *, steps: int) -> bool:
    """Return whether the state ends a step that is to be evaluated and was not.

    Args:
        state: of the run, after a step.
        settings: how often to evaluate.
        steps: of the whole run, whose last one is evaluated in any case.
    """
    wanted = state.step % settings.every == 0 or state.step == steps
    return wanted and state.evaluated_step != state.step


def out_of_patience(state: TrainState, settings: EvaluationConfig) -> bool:
    """Return whether too many evaluations in a row were no better than the best one.

    It follows from the state alone, so a run that goes on decides as one that was never stopped.
    """
    if settings.patience is None or state.best_step is None or state.evaluated_step != state.step:
        return False
    waited = state.step // settings.every - state.best_step // settings.every
    return waited >= settings.patience


def refresh_is_due(
    state: TrainState, teacher: TeacherConfig | None, settings: EvaluationConfig
) -> bool:
    """Return whether a step that is done (and evaluated, where it is to be) makes the teacher anew.

    It follows from the state alone, as `out_of_patience` does. The evaluation of a run's last step
    does not count unless it is due anyway, or a run that is lengthened would be another one.
    Whoever goes back to the best step waits until this one was evaluated: it may be the best, and
    an interrupt puts the evaluation off.
    """
    if teacher is None or teacher.name != "refreshed":
        return False
    if teacher.every is not None:
        is_known = state.evaluated_step == state.step or not teacher.from_best
        return state.step % teacher.every == 0 and is_known
    is_evaluated = state.evaluated_step == state.step and state.step % settings.every == 0
    return is_evaluated and state.best_step != state.step


class _EvaluationStopped(Exception):
    """Somebody asked the run to stop in the middle of an evaluation."""


def evaluate(
    solver: Solver,
    settings: EvaluationConfig,
    state: TrainState,
    ranks: Ranks,
    interrupt: Interrupt,
    log: JsonLines,
    bars: Progress,
    *,
    seed: int,
) -> TrainState:
    """Evaluate on the dev split, log it, and return the state with the best step so far.

    The ranks share the problems. An interrupt on a rank that is not done yet ends it for all; then
    the state comes back as it was, not evaluated.

    Args:
        solver: the student as it is now.
        settings: how many problems and attempts.
        state: of the run, after a step.
        ranks: the processes that share the problems.
        interrupt: is told what is under way, and asked whether to stop.
        log: gets the result.
        bars: show the progress.
        seed: of the run.
    """
    interrupt.doing, interrupt.step = "evaluation", state.step
    clock = Clock()
    asked, left_out = solver.with_room(
        held_out_problems(solver.task, split="dev", count=settings.problems)
    )
    share = ranks.share(len(asked))
    bar = bars.add_task("evaluate", total=len(share), note=f"step {state.step}, dev")

    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bars.advance(bar, count)
        if interrupt.requested and done < len(share):
            raise _EvaluationStopped

    attempts: list[Attempts] | None = None
    with clock("evaluate"), suppress(_EvaluationStopped):
        attempts = solver.attempt(
            split="dev",
            problems=settings.problems,
            part=share,
            samples=settings.samples,
            seed=derive_seed(seed, "evaluate", state.step),
            progress=progress,
        )
    # Also where this rank was asked to stop, and others were not yet.
    solver.engine.wait_for_group()
    bars.remove_task(bar)
    if ranks.any(attempts is None):
        return state
    result = summarize(ranks.gather(attempts or []), solver.task, split="dev", too_long=left_out)
    if ranks.is_main:
        log.append({"step": state.step, "seconds": clock.seconds, **json.loads(result.to_json())})
    state = replace(state, evaluated_step=state.step)
    if state.best_metric is not None and result.merit <= state.best_metric:
        return state
    return replace(state, best_step=state.step, best_metric=result.merit)
