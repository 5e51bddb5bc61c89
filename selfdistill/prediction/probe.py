"""What a few hundred rollouts of the untrained solver say; nothing is trained, no test is touched.

The student attempts training problems. One attempt at each is then scored by student and teacher
as training would score it, and the teacher itself answers the same question with the context that
it would see beside this attempt. The first says where the two disagree, the second how much better
the teacher is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfdistill.analysis.localisation import (
    Localisation,
    MaskEffect,
    Overall,
    localise,
    mask_effects,
    overall,
    suggest,
)
from selfdistill.analysis.tokens import TokenAnalysis, analyze
from selfdistill.config import Config, Distillation, PeerMethod
from selfdistill.evaluation.intervals import Interval, bootstrap
from selfdistill.evaluation.resampling import ratio_intervals
from selfdistill.methods.method import Contexts
from selfdistill.model.lm_head import find_lm_heads
from selfdistill.model.teacher import build_teacher
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.attempts import Attempts, judge
from selfdistill.rollout.engine import Rollout, sample
from selfdistill.seeds import derive_seed
from selfdistill.tasks.build import training_problems
from selfdistill.tasks.interface import Problem
from selfdistill.training.agreement import with_own_logprobs
from selfdistill.training.solver import Solver, load_solver, sampling_params

# Attempts at each problem; two tell how unequal the problems are.
SAMPLES = 2
# A teacher that finds right steps less likely than the student by more than this (nats a token, on
# average) writes another solution than the attempt. In the miniature those taught nothing (-1.2 and
# -1.5), while the rarest wordings (-0.7) did.
OTHER_SOLUTION = -1.0
# References whose wording is looked at.
REFERENCES = 32


@dataclass(frozen=True)
class ContextProbe:
    """What one method's self-teacher does to the same attempts.

    Attributes:
        label: of the method.
        taught: share of the attempts that the method has a context for.
        teacher: share that is right of what the teacher writes instead; where it has no context,
            the attempt itself counts.
        gap: teacher less the student's share over all attempts, paired by problem.
        right, wrong: how likely the teacher finds the right and the wrong attempts, beside the
            student; None of the figures is known where there are no such attempts.
        localisation: how the advantage lies around the first wrong step, where steps are known.
        active: share of the tokens with |A| > 0.1 nats; None where nothing is taught.
        mask: the mask with the fewest tokens that keeps 90 % of the sum of |A|, or None.
        masked: what the configured advantage mask keeps; None without one, and for masks of whole
            steps or of a share of each rollout.
    """

    label: str
    taught: float
    teacher: Interval
    gap: Interval
    right: Overall
    wrong: Overall
    localisation: Localisation
    active: Interval | None
    mask: MaskEffect | None
    masked: MaskEffect | None

    @property
    def disputes_right_steps(self) -> bool:
        """Whether the teacher writes another solution than the attempts, right steps included."""
        before = self.localisation.mean_before
        return before is not None and before.value < OTHER_SOLUTION


@dataclass(frozen=True)
class Probe:
    """What was measured before any training.

    Attributes:
        problems: of the train split.
        rollouts: sampled in all, the teacher's among them.
        student: share of all attempts that are right.
        variance: of the problems' own rates of success, beyond what so few attempts vary by.
        own_surprise: nats a token that the student gives its own right attempts.
        reference_surprise: likewise the reference solutions; None where there are none.
        contexts: one for each method that was asked for.
        tokens: of an attempt, on average.
        sampling: seconds for each sampled token, all rows together.
        scoring: seconds for each scored token, student and teacher together, nothing backward.
        seconds: of all of it, loading left out.
    """

    problems: int
    rollouts: int
    student: Interval
    variance: float
    own_surprise: Interval | None
    reference_surprise: Interval | None
    contexts: tuple[ContextProbe, ...]
    tokens: float
    sampling: float
    scoring: float
    seconds: float

    def mixed(self, group_size: int) -> float:
        """Return the share of groups that hold right and wrong attempts, 0 to 1.

        The rates of success are taken to follow a beta distribution of the mean and the variance
        that were seen.
        """
        mean = self.student.value
        if not 0 < mean < 1:
            return 0.0
        spread = min(max(self.variance / (mean * (1 - mean)), 1e-6), 1 - 1e-6)
        total = 1 / spread - 1
        places = np.arange(group_size)
        all_right = np.prod((mean * total + places) / (total + places))
        all_wrong = np.prod(((1 - mean) * total + places) / (total + places))
        return float(1 - all_right - all_wrong)


def probe(
    config: Config,
    methods: Sequence[tuple[str, Distillation]],
    *,
    attempts: int = 256,
    solver: Solver | None = None,
    progress: Callable[[int], None] | None = None,
) -> Probe:
    """Measure the untrained solver and its self-teachers.

    Args:
        config: of the run.
        methods: sections with a teacher, and what to call them; none for GRPO alone.
        attempts: of the student; each teacher writes as many as there are problems.
        solver: the untrained solver; loaded by default.
        progress: called with the number of rollouts just sampled.

    Raises:
        ValueError: fewer than two attempts.
        UnusableModelError: see `load_solver`, like TaskError.
    """
    if attempts < SAMPLES:
        raise ValueError(f"attempts is {attempts}, expected at least {SAMPLES}")
    solver = solver or load_solver(config)
    start = time.perf_counter()
    # A peer is another attempt of the same group, so there must be whole groups.
    samples = max([SAMPLES, *(s.group_size for _, s in methods if isinstance(s, PeerMethod))])
    problems = _problems(solver, max(1, attempts // samples))
    rollouts = _sample(
        solver, [solver.context.student_prompt(p) for p in problems], samples, "student"
    )
    sampled = time.perf_counter() - start
    tokens = sum(len(rollout.token_ids) for group in rollouts for rollout in group)
    if progress is not None:
        progress(len(problems) * samples)
    groups = judge(solver.task, problems, rollouts)
    shares = [_share_right(group) for group in groups]
    scoring, found = [], []
    for label, section in methods:
        context, seconds = _context_probe(solver, config, label, section, groups)
        found.append(context)
        scoring.append(seconds / max(1, sum(len(g.rollouts[0].token_ids) for g in groups)))
        if progress is not None:
            progress(len(problems))
    return Probe(
        problems=len(problems),
        rollouts=len(problems) * (samples + len(methods)),
        student=bootstrap(shares),
        variance=_variance(shares, samples),
        own_surprise=_surprise(
            [
                (group.problem.id, rollout.logprobs)
                for group in groups
                for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
                if verdict.correct
            ]
        ),
        reference_surprise=_surprise(_reference_logprobs(solver, problems)),
        contexts=tuple(found),
        tokens=tokens / (len(problems) * samples),
        sampling=sampled / max(1, tokens),
        scoring=float(np.mean(scoring)) if scoring else 0.0,
        seconds=time.perf_counter() - start,
    )


def _problems(solver: Solver, count: int) -> list[Problem]:
    size = solver.task.size("train")
    count = count if size is None else min(count, size)
    drawn = training_problems(
        solver.task, count=count, seed=derive_seed(solver.config.seed, "predict")
    )
    kept, _ = solver.with_room(drawn)
    return kept


def _sample(
    solver: Solver, prompts: Sequence[list[int]], samples: int, who: str
) -> list[list[Rollout]]:
    seed = derive_seed(solver.config.seed, "predict", who)
    return sample(
        solver.engine,
        prompts,
        group_size=samples,
        params=sampling_params(solver.config.rollout, seed),
        names=[f"prompt {i} of the {who}" for i in range(len(prompts))],
    )


def _context_probe(
    solver: Solver,
    config: Config,
    label: str,
    section: Distillation,
    groups: Sequence[Attempts],
) -> tuple[ContextProbe, float]:
    """Return the figures of a method, and the seconds that scoring took."""
    method = solver.build_method(config.model_copy(update={"method": section}).method)
    contexts: Contexts = method.contexts(groups)
    first = [_without_long(solver, g, found[0]) for g, found in zip(groups, contexts, strict=True)]
    taught = [i for i, context in enumerate(first) if context is not None]
    # The teacher is the solver as it is: its answers come from the same engine.
    prompts = [
        solver.context.teacher_prompt(group.problem, context)
        for group, context in zip(groups, first, strict=True)
        if context is not None
    ]
    answers = _sample(solver, prompts, 1, "teacher")
    judged = judge(solver.task, [groups[i].problem for i in taught], answers)
    # All attempts at a problem say how often the student is right; one of them is taught.
    student = [_share_right(group) for group in groups]
    teacher = [float(group.verdicts[0].correct) for group in groups]
    for i, attempt in zip(taught, judged, strict=True):
        teacher[i] = float(attempt.verdicts[0].correct)

    weights = build_teacher(section.teacher, solver.model)
    assert weights is not None  # every Distillation has one
    start = time.perf_counter()
    records = analyze(
        solver,
        weights,
        method,
        groups,
        [(i, 0) for i in taught],
        lm_heads=find_lm_heads(solver.model, weights),
    )
    seconds = time.perf_counter() - start
    masks = mask_effects(records)
    return (
        ContextProbe(
            label=label,
            taught=len(taught) / len(groups),
            teacher=bootstrap(teacher),
            gap=bootstrap(
                [t - s for s, t in zip(student, teacher, strict=True)], bounds=(-1.0, 1.0)
            ),
            right=overall([r for r in records if r.correct]),
            wrong=overall([r for r in records if not r.correct]),
            localisation=localise(records),
            active=next((m.rho for m in masks if (m.threshold, m.sign) == (0.1, "any")), None),
            mask=suggest(masks),
            masked=_masked(section, records),
        ),
        seconds,
    )


def _without_long(
    solver: Solver, group: Attempts, context: TeacherContext | None
) -> TeacherContext | None:
    """Return the context, or None where teacher and attempt do not fit behind each other."""
    if context is None:
        return None
    room = solver.config.rollout.max_new_tokens
    prompt = len(solver.context.teacher_prompt(group.problem, context))
    longest = solver.context.max_length
    return context if longest is None or prompt + room <= longest else None


def _masked(section: Distillation, records: Sequence[TokenAnalysis]) -> MaskEffect | None:
    mask = section.loss.advantage_mask
    if mask is None or mask.per_step or mask.top_fraction is not None:
        return None
    effects = mask_effects(records, thresholds=[mask.threshold], signs=[mask.sign])
    return next(iter(effects), None)


def _share_right(group: Attempts) -> float:
    return sum(verdict.correct for verdict in group.verdicts) / len(group.verdicts)


def _variance(shares: Sequence[float], samples: int) -> float:
    """Return the variance of the problems' rates, without what `samples` attempts add to it."""
    if len(shares) < 2 or samples < 2:
        return 0.0
    values = np.asarray(shares)
    chance = (values * (1 - values)).mean() / (samples - 1)
    return max(0.0, float(values.var(ddof=1) - chance))


def _reference_logprobs(
    solver: Solver, problems: Sequence[Problem]
) -> list[tuple[str, list[float]]]:
    """Return the log-prob (nats) of every token of some references, as answers of the student."""
    known = [problem for problem in problems if problem.reference.strip()][:REFERENCES]
    texts = [
        solver.tokenizer.encode(problem.reference, add_special_tokens=False) for problem in known
    ]
    groups = [[Rollout(tokens, [0.0] * len(tokens), "", True)] for tokens in texts]
    scored = with_own_logprobs(
        solver.model,
        find_lm_heads(solver.model, None)[0],
        [solver.context.student_prompt(problem) for problem in known],
        groups,
        temperature=solver.config.rollout.temperature,
        attention=solver.config.attention,
    )
    return [
        (problem.id, group[0].policy_logprobs) for problem, group in zip(known, scored, strict=True)
    ]


def _surprise(found: Sequence[tuple[str, Sequence[float]]]) -> Interval | None:
    """Return nats a token, problems resampled."""
    sums: dict[str, list[float]] = {}
    for name, logprobs in found:
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] -= sum(logprobs)
        total[1] += len(logprobs)
    if not sums:
        return None
    (interval,) = ratio_intervals(
        [[total[0]] for total in sums.values()], [[total[1]] for total in sums.values()]
    )
    return interval
