"""The training loop: rollout, critique, context, score, fused loss, step, evaluate, checkpoint."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial

import torch
from rich.console import Console
from transformers.utils import logging as transformers_logging

from selfdistill.config import Config, ConfigError, OptimizerConfig
from selfdistill.model.attention import enable_prefix_sharing
from selfdistill.model.device import resolve_device
from selfdistill.model.folder import load_config
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.randomness import enable_activation_checkpointing, refuse_random_passes
from selfdistill.model.teacher import build_teacher
from selfdistill.model.weights import TrainedWeights
from selfdistill.places import alone_in
from selfdistill.progress import progress_bars
from selfdistill.rollout.attempts import judge
from selfdistill.runlog import Clock, JsonLines, peak_rss_mib
from selfdistill.tasks.build import training_problems
from selfdistill.training.batch import build_batch, context_kinds
from selfdistill.training.checkpoint import CheckpointStore, TrainState, fingerprint
from selfdistill.training.distributed import Ranks, join_ranks
from selfdistill.training.divergence import refuse_divergence
from selfdistill.training.empty_steps import describe, nothing_learned, trailing
from selfdistill.training.gradients import StudentLoss, accumulate_gradients, clip_gradients
from selfdistill.training.held_out import (
    evaluate,
    evaluation_is_due,
    out_of_patience,
    refresh_is_due,
)
from selfdistill.training.interrupt import deferred_interrupt
from selfdistill.training.metrics import StepMetrics, rewards, tied
from selfdistill.training.questions import questions_of
from selfdistill.training.run_folder import (
    CHECKPOINTS,
    EVALUATIONS_FILE,
    METRICS_FILE,
    first_day,
    keep_config,
    refuse_other_run,
)
from selfdistill.training.solver import build_engine, keep_date, load_solver
from selfdistill.training.state_file import MAY_DIFFER, digest_inputs, refuse_ranks_apart
from selfdistill.visible import say


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        step: finished optimiser steps.
        interrupted: True when somebody stopped it before its end; it can be resumed. One that
            stops by itself (`evaluation.patience`) has come to its end.
        best_step, best_metric: see `selfdistill.training.checkpoint.TrainState`.
    """

    step: int
    interrupted: bool
    best_step: int | None
    best_metric: float | None


def train(config: Config, *, resume: bool = False, console: Console | None = None) -> TrainResult:
    """Train as configured; everything lands in `config.output_dir`.

    Ctrl-C (or SIGTERM) lets the step at hand finish and saves it; an evaluation at hand is given up
    and made up for when the run is resumed; a second Ctrl-C stops at once. The same configuration
    gives the same numbers, interrupted or not, and up to rounding on any number of ranks.

    Args:
        config: the run.
        resume: continue from the last checkpoint, if there is one.
        console: where progress is shown; the standard error stream by default.

    Raises:
        ConfigError: `gradient_tolerance` on a GPU, `shard` with vLLM, ranks or a model that
            `tensor_parallel_size` does not divide, no such schedule or tracker.
        RunExistsError: the folder holds a run and `resume` is False, or one that cannot go on.
        PlaceTakenError: another process works in the folder.
        LogError: the folder holds a log that is none.
        CheckpointError: the last checkpoint is torn, belongs to another run, or cannot be written.
        DivergedError: the loss or gradient is not finite; the last checkpoint is kept.
        NothingLearnedError: too many steps in a row, or all of the run, taught nothing.
        RankFailedError: another rank failed; the message names it.
        EngineError: an engine died, or a critic's server gave no answer; the last checkpoint
            is kept.
        EngineMismatchError: the rollout engine has other weights than the student; likewise.
        UnsupportedModelError: the model's family cannot share prefixes exactly.
        UnavailableBackendError: the attention that was asked for cannot run.
        PromptTooLongError: a rollout does not fit, and `prompt.too_long` is "error".
        TaskError: the problems cannot be read, or no problem of a step leaves room.
    """
    transformers_logging.disable_progress_bar()
    with join_ranks() as ranks:
        if console is None or not ranks.is_main:
            console = Console(stderr=True, quiet=not ranks.is_main)
        with ExitStack() as stack:
            if ranks.is_main:
                stack.enter_context(alone_in(config.output_dir))
                refuse_other_run(config, resume=resume)
            ranks.any(False)  # the others hear of a refusal here, before they load anything
            return _train(config, ranks, console=console)


def _train(config: Config, ranks: Ranks, *, console: Console) -> TrainResult:
    loss, device = getattr(config.method, "loss", None), resolve_device(config.device)
    if getattr(loss, "gradient_tolerance", None) is not None and device != "cpu":
        raise ConfigError(
            f"method.loss.gradient_tolerance: a run on {device} makes the exact gradient only: set "
            "it to null, or device: cpu"
        )
    sharded = config.shard and ranks.size > 1
    if sharded and config.rollout.engine.name != "transformers":
        raise ConfigError(
            f"shard: rollout.engine {config.rollout.engine.name} takes over whole weights, and its "
            "log-probs are compared with theirs, but no rank has them: set shard: false (with an "
            "adapter there is little to spread), or rollout.engine.name: transformers"
        )
    shared = getattr(config.rollout.engine, "tensor_parallel_size", 1)
    if shared > 1:
        from selfdistill.rollout.vllm_groups import check_groups

        check_groups(shared, ranks=ranks.size, model_config=load_config(config.model))
    kept = config.checkpoint.keep
    store = CheckpointStore(config.output_dir / CHECKPOINTS, keep=None if kept == "all" else kept)
    rate_of, may_differ = warm_up(config.optimizer), {*MAY_DIFFER}
    if config.optimizer.schedule != "constant":
        from selfdistill.training.schedule import ends_with_the_run, learning_rates

        rate_of = learning_rates(config)
        if ends_with_the_run(config.optimizer.schedule):
            may_differ -= {"steps"}
    overlaps = bool(getattr(config.rollout.engine, "max_staleness", 0))
    if overlaps:  # nothing is drawn for a step behind the last one
        may_differ -= {"steps"}
    # The day that prompts write comes first, because a checkpoint is compared with a configuration
    # that holds it. All ranks take that of rank 0: it may be midnight.
    day = first_day(config) or date.today()
    (day, *_) = ranks.gather([day])
    solver = keep_date(load_solver(config), day)
    config = solver.config
    student = solver.model
    # Refuses a model that cannot share prefixes, before anything is made of it.
    enable_prefix_sharing(student, backend=config.attention)
    base_sha256 = fingerprint(student)
    # A teacher with weights of its own copies them here, where the student has learned nothing yet.
    teacher = build_teacher(config.method.teacher, student, own_frozen=sharded)
    lm_heads = find_lm_heads(student, teacher)
    method = solver.build_method(config.method)
    objective = StudentLoss(
        student, teacher, method.loss, lm_heads=lm_heads, attention=config.attention
    )
    # Divided weights would be gathered for every sampled token, so a whole copy samples; it is made
    # while there is a whole model to copy.
    if sharded:
        solver = replace(solver, engine=build_engine(config, deepcopy(student), solver.tokenizer))
    if config.activation_checkpointing:
        enable_activation_checkpointing(student)
    # Random passes are looked for while the models are whole. FSDP2 divides them next, and only
    # then does the optimiser get its parameters, which are the parts.
    refuse_random_passes(student)
    if sharded:
        objective.shard(compute_dtype=getattr(torch, config.precision))
    weights = TrainedWeights(student)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        weights.masters.values(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    state = TrainState(
        step=0,
        evaluated_step=None,
        best_step=None,
        best_metric=None,
        config=config.model_dump(mode="json"),
        base_sha256=base_sha256,
        inputs=digest_inputs(solver.task, solver.tokenizer),
    )
    refuse_ranks_apart(ranks.gather([state.inputs]))
    # Everything that has a state exists now, and a checkpoint puts its own in place.
    if os.path.lexists(store.last):
        found = store.load(
            store.last,
            weights=weights,
            optimizer=optimizer,
            teacher=teacher,
            config=state.config,
            base_sha256=state.base_sha256,
            inputs=state.inputs,
            may_differ=may_differ,
        )
        state = replace(found, config=state.config, inputs=state.inputs)
        solver.engine.sync(student)
        console.print(f"Resuming after step {state.step} of {config.steps}.")
    metrics_log = JsonLines(config.output_dir / METRICS_FILE)
    evaluation_log = JsonLines(config.output_dir / EVALUATIONS_FILE)
    # The logs may have come further than the checkpoint: those steps are taken again.
    if ranks.is_main:
        metrics_log.keep_until(state.step)
        evaluation_log.keep_until(-1 if state.evaluated_step is None else state.evaluated_step)
    completions = None
    if config.completions is not None:
        from selfdistill.training.completions import CompletionLog

        completions = CompletionLog(config.output_dir, config.completions, solver.tokenizer)
        if ranks.is_main:
            completions.keep_until(state.step)
    warned = False
    empty = ranks.gather(trailing(metrics_log.read()) if ranks.is_main else [])
    # Drawn for the whole run at once, so that a step has the same ones whenever it is taken.
    problems = training_problems(
        solver.task, count=config.steps * config.prompts_per_step, seed=config.seed
    )

    ask = partial(
        questions_of, solver=solver, problems=problems, group_size=method.group_size, ranks=ranks
    )
    ahead = None
    if overlaps:
        from selfdistill.training.overlap import Ahead

        ahead = Ahead(solver.engine, ask, ranks=ranks, steps=config.steps)
        if state.step:
            ahead.restore(store.last)

    def save() -> None:
        files = None if ahead is None else ahead.files()
        main = ranks.is_main
        store.save(state, weights, solver.tokenizer, optimizer, teacher, files=files, writes=main)

    def refresh() -> None:
        wanted = config.method.teacher
        if teacher is None or not refresh_is_due(state, wanted, config.evaluation):
            return
        if getattr(wanted, "from_best", False) and state.best_step != state.step:
            store.go_back(weights=weights, optimizer=optimizer)
            solver.engine.sync(student)
        teacher.refresh(weights.masters)

    with (
        deferred_interrupt(console, launched=ranks.size > 1) as interrupt,
        progress_bars(console) as bars,
        _tracked(config, ranks, console, metrics_log, evaluation_log),
    ):
        evaluate_now = partial(
            evaluate,
            solver,
            config.evaluation,
            ranks=ranks,
            interrupt=interrupt,
            log=evaluation_log,
            bars=bars,
            seed=config.seed,
        )
        interrupt.saved = state.step if os.path.lexists(store.last) else None
        bar = bars.add_task("train", total=config.steps, completed=state.step, note="")
        evaluates = evaluation_is_due(state, config.evaluation, steps=config.steps)
        if evaluates:
            state = evaluate_now(state)
            refresh()
        # Not before: after a start that failed, the mended configuration must not meet the first
        # one, which would make it another run.
        if ranks.is_main:
            keep_config(config, step=state.step)
        if evaluates and state.evaluated_step == state.step:
            save()
            interrupt.saved = state.step
        stopping = ranks.any(interrupt.requested)
        early = out_of_patience(state, config.evaluation)

        while state.step < config.steps and not (stopping or early):
            step = state.step + 1
            interrupt.doing, interrupt.step = "step", step
            clock = Clock()
            questions = ask(step)

            # The student attempts the problems; nothing below changes what it wrote.
            with clock("rollout"):
                groups = questions.sample(solver.engine) if ahead is None else ahead.take(questions)
            # Attempts of other weights than the student's would teach the wrong thing, so they are
            # refused before anybody judges them.
            disagreement = None
            if config.rollout.engine.name != "transformers":
                from selfdistill.training.engine_checks import check_engine, complete_logprobs

                prompts, model = questions.prompts, (student, lm_heads[0])
                with clock("check"):
                    fresh = (prompts, groups) if ahead is None else ahead.fresh
                    disagreement = check_engine(
                        config.rollout, step, *model, *fresh, config.attention
                    )
                    groups = complete_logprobs(
                        config.rollout, method, *model, prompts, groups, config.attention
                    )
            with clock("reward"):
                attempts = judge(solver.task, questions.asked, groups)
            # The critic is called here, by methods that have one (methods/stepalign.py); others
            # make what the teacher sees from the verdicts or the references.
            with clock("critique"):
                contexts = method.contexts(attempts)
                if method.complete is not None:
                    contexts = method.complete(attempts, contexts, ranks.gather)
                kinds = ranks.gather(context_kinds(contexts))
            # Rollouts that teach nothing leave before the models read them.
            with clock("context"):
                batch = build_batch(
                    solver, method, attempts, contexts, too_long=config.prompt.too_long
                )
            # Student and teacher score the same tokens once for each update; after the first update
            # the student is no longer the one that sampled them.
            rate = rate_of(step)
            taught = False
            keeper = completions if completions is not None and completions.keeps(step) else None
            for _ in range(config.updates_per_step):
                with clock("score"):
                    optimizer.zero_grad()
                    totals = accumulate_gradients(
                        objective,
                        batch.groups,
                        tokens_per_pass=config.tokens_per_microbatch,
                        ranks=ranks,
                        observe=None if keeper is None else keeper.observe,
                    )
                taught = taught or totals.active > 0
                with clock("update"):
                    if not sharded:
                        ranks.sum_gradients(weights.masters.values())
                    for parameters in optimizer.param_groups:
                        parameters["lr"] = rate
                    norm = clip_gradients(weights.masters.values(), max_norm=settings.max_grad_norm)
                    refuse_divergence(step, totals.loss, norm.item(), store)
                    optimizer.step()
                    weights.publish()
                    if teacher is not None:
                        teacher.update(weights.masters)
            # What is drawn for the next step is of the weights before. The new ones are handed over
            # before the evaluation, which samples from them.
            if ahead is not None:
                with clock("wait"):
                    ahead.settle()
            with clock("sync"):
                solver.engine.sync(student)

            if keeper is not None:
                written = ranks.gather(keeper.records(attempts, contexts, batch))
                if ranks.is_main:
                    keeper.write(step, written)
            # What each rank left out is added up on all of them; only then is the step done.
            unasked = questions.left_out * method.group_size
            unsure = sum(verdict.undecided for a in attempts for verdict in a.verdicts)
            dropped, too_long, undecided = map(
                int, ranks.sum(batch.dropped, batch.too_long, unsure)
            )
            unusable = Counter(ranks.gather(list(method.unusable.elements())))
            state = replace(state, step=step)
            if evaluation_is_due(state, config.evaluation, steps=config.steps):
                with clock("evaluate"):
                    state = evaluate_now(state)
            refresh()
            metrics = StepMetrics(
                step=step,
                loss=totals.loss,
                kl=None if teacher is None else totals.per_token(totals.kl),
                advantage=totals.per_token(totals.advantage),
                entropy=totals.per_token(totals.entropy),
                active=totals.active / max(1, totals.tokens),
                taught=taught,
                reward=ranks.mean(rewards(attempts)),
                undecided=undecided,
                tied=ranks.mean(tied(attempts)),
                dropped=dropped,
                too_long=unasked + too_long,
                unusable=dict(unusable),
                engine_disagreement=disagreement,
                contexts=dict(Counter(kinds)),
                grad_norm=norm.item(),
                learning_rate=rate,
                tokens=totals.tokens,
                packed_tokens=totals.packed_tokens,
                unshared_tokens=totals.unshared_tokens,
                seconds=clock.seconds,
                peak_rss_mib=peak_rss_mib(),
            )
            # The log is written before the checkpoint: a run that is killed in between takes the
            # step again and writes the same line, where the other order would lose one.
            record = asdict(metrics)
            if ranks.is_main:
                metrics_log.append(record)
            empty = [] if taught else [*empty, record]
            if empty and not warned:
                warned = True
                say(console, f"Step {step} taught nothing: {describe(config, empty)}.")
            stopping = ranks.any(interrupt.requested)
            failure = nothing_learned(config, empty, step=step)
            early = out_of_patience(state, config.evaluation)
            last = stopping or early or step == config.steps or failure is not None
            if last or state.best_step == step or step % config.checkpoint.every == 0:
                save()
                interrupt.saved = step
            if failure is not None:
                raise failure
            kl = "" if metrics.kl is None else f"KL {metrics.kl:.3f}  "
            bars.update(bar, advance=1, note=f"{kl}reward {metrics.reward:.2f}")
    if not stopping and (failure := nothing_learned(config, empty, step=state.step)) is not None:
        raise failure  # a finished run was to go on
    return TrainResult(
        step=state.step,
        interrupted=state.step < config.steps and not early,
        best_step=state.best_step,
        best_metric=state.best_metric,
    )


def _tracked(
    config: Config, ranks: Ranks, console: Console, *logs: JsonLines
) -> AbstractContextManager[None]:
    """Let trackers follow the logs, where the configuration names some."""
    if not (config.trackers and ranks.is_main):
        return nullcontext()
    from selfdistill.training.trackers import following

    return following(config, dict(zip(("train", "dev"), logs, strict=True)), console)


def warm_up(settings: OptimizerConfig) -> Callable[[int], float]:
    """Return the rate of each step, counted from 1: a warm-up and a constant."""
    rate, steps = settings.learning_rate, max(1, settings.warmup_steps)
    return lambda step: rate * min(1.0, step / steps)
