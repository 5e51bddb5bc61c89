from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import tiny_config
from torch import nn

from selfdistill.config import Config, PeerMethod, RefSolMethod
from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.probe import Probe, _variance, probe
from selfdistill.prompts.context import TeacherContext
from selfdistill.rollout.engine import Rollout, SamplingParams
from selfdistill.seeds import derive_seed
from selfdistill.tasks.build import training_problems
from selfdistill.training.solver import Solver, load_solver

PROBLEMS = 8


class KnowsReferences:
    """Writes the reference where the prompt has it, else for the first few problems only."""

    def __init__(self, solver: Solver, *, solved: int) -> None:
        seed = derive_seed(solver.config.seed, "predict")
        problems = training_problems(solver.task, count=PROBLEMS, seed=seed)
        self.answers: dict[tuple[int, ...], str] = {}
        self.tokenizer = solver.tokenizer
        for i, problem in enumerate(problems):
            shown = TeacherContext("reference", problem.reference)
            prompt = solver.context.teacher_prompt(problem, shown)
            self.answers[tuple(prompt)] = problem.reference
            alone = tuple(solver.context.student_prompt(problem))
            wrong = next(p.reference for p in problems if p.answer != problem.answer)
            self.answers[alone] = problem.reference if i < solved else wrong

    def generate(
        self, prompts: Sequence[Sequence[int]], *, group_size: int, params: SamplingParams
    ) -> list[list[Rollout]]:
        del params
        found = []
        for prompt in prompts:
            text = self.answers[tuple(prompt)]
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
            found.append([Rollout(tokens, [-0.5] * len(tokens), text, True)] * group_size)
        return found

    def sync(self, model: nn.Module) -> None:
        del model  # nothing is trained

    def wait_for_group(self) -> None:
        pass


def tiny(solver_dir: Path, tmp_path: Path) -> Config:
    return tiny_config(solver_dir, tmp_path / "run", rollout={"max_new_tokens": 24})


def probed(solver_dir: Path, tmp_path: Path, *, solved: int) -> Probe:
    config = tiny(solver_dir, tmp_path)
    solver = load_solver(config)
    solver = replace(solver, engine=KnowsReferences(solver, solved=solved))
    section = RefSolMethod()
    return probe(config, [("refsol", section)], attempts=2 * PROBLEMS, solver=solver)


def test_the_gap_is_the_teachers_share_less_the_students(solver_dir: Path, tmp_path: Path) -> None:
    found = probed(solver_dir, tmp_path, solved=2)
    (context,) = found.contexts
    assert (found.problems, found.rollouts) == (PROBLEMS, 3 * PROBLEMS)
    assert found.student.value == pytest.approx(2 / PROBLEMS)
    assert (context.teacher.value, context.taught) == (1.0, 1.0)
    assert context.gap.value == pytest.approx(1 - 2 / PROBLEMS)
    assert context.gap.low > 0
    # Attempts of both kinds were scored, and every wrong one has its place.
    assert (context.right.attempts, context.wrong.attempts) == (2, PROBLEMS - 2)
    assert context.localisation.attempts == PROBLEMS - 2
    assert context.active is not None
    assert found.own_surprise is not None
    assert found.own_surprise.value == pytest.approx(0.5)
    assert found.reference_surprise is not None
    assert found.reference_surprise.value > 1  # the weights are random
    assert not (tmp_path / "run").exists()


def test_attempts_without_a_context_keep_what_they_are(solver_dir: Path, tmp_path: Path) -> None:
    # Nobody solves anything, so no attempt has a peer that did.
    config = tiny(solver_dir, tmp_path)
    section = PeerMethod(group_size=4)
    found = probe(config, [("peer", section)], attempts=8)
    (context,) = found.contexts
    assert found.problems == 2  # whole groups of four
    assert (context.taught, context.gap.value, context.active, context.mask) == (0, 0, None, None)


def test_what_mixed_groups_are_made_of() -> None:
    # Two kinds of problems, each solved at its own rate: the moments decide.
    rates = np.random.default_rng(0).beta(2.0, 3.0, 200_000)
    one = Interval(float(rates.mean()), 0.0, 1.0)
    found = Probe(1, 1, one, float(rates.var()), None, None, (), 1.0, 1.0, 1.0, 1.0)
    for size in (2, 8):
        expected = (1 - rates**size - (1 - rates) ** size).mean()
        assert found.mixed(size) == pytest.approx(expected, abs=2e-3)
    alike = replace(found, variance=0.0)
    assert alike.mixed(8) == pytest.approx(1 - one.value**8 - (1 - one.value) ** 8, abs=1e-4)
    assert replace(found, student=Interval(0.0, 0.0, 0.1)).mixed(8) == 0.0


def test_the_variance_of_problems_leaves_out_chance(solver_dir: Path, tmp_path: Path) -> None:
    # Both attempts at a problem are alike here: all variance is that of the problems.
    found = probed(solver_dir, tmp_path, solved=4)
    assert found.variance == pytest.approx(np.var([1.0] * 4 + [0.0] * 4, ddof=1))


def test_chance_alone_makes_no_problem_harder() -> None:
    """Each problem at one rate: what two attempts at each vary by is not the problems'."""
    right = np.random.default_rng(0).binomial(2, 0.4, 50_000) / 2
    assert right.var() == pytest.approx(0.12, abs=0.005)
    assert _variance(list(right), samples=2) < 0.005


def test_too_few_attempts_are_refused(solver_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attempts is 1, expected at least 2"):
        probe(tiny(solver_dir, tmp_path), [], attempts=1)
