"""The plan: what runs, in which order, and what no run may see."""

from __future__ import annotations

from collections import Counter

import pytest

from selfdistill.tasks.arithmetic import ArithmeticTask
from studies.arithmetic.reproduce.arms import FULL, MAIN_ARMS, QUICK, REGIMES, Scale
from studies.arithmetic.reproduce.budget import job_seconds, minutes
from studies.arithmetic.reproduce.job_list import (
    RATES_SEED,
    STUDIES,
    BaseEvaluation,
    TokenScores,
    Training,
    UnknownStudyError,
    build_plan,
    parse_studies,
)

PLAN = build_plan("solver", FULL)
TRAININGS = [job for job in PLAN if isinstance(job, Training)]


def test_every_part_has_the_runs_that_it_should():
    arms, strata = len(MAIN_ARMS), len(FULL.strata)
    assert arms == 8
    assert Counter(job.part for job in PLAN) == {
        "rates": arms * len(FULL.rates),
        "main": arms * len(FULL.seeds) + 1,
        "copy": 2 * len(FULL.side_seeds) + 1,
        "difficulty": strata * (5 * len(FULL.side_seeds) + 1),
        "wording": len(FULL.dialects) * len(FULL.wording_seeds) + 1,
    }
    assert len(FULL.seeds) == 3
    assert FULL.samples == 12
    assert FULL.problems >= 200


def test_no_two_jobs_share_a_folder():
    names = [job.name for job in PLAN]
    assert len(set(names)) == len(names)
    assert not any(a != b and b.startswith(f"{a}/") for a in names for b in names)


def test_what_a_job_needs_comes_before_it():
    place = {job.name: i for i, job in enumerate(PLAN)}
    assert all(place[need] < place[job.name] for job in PLAN for need in job.needs)


def test_learning_rates_are_chosen_without_test_problems_and_with_a_seed_of_their_own():
    candidates = [job for job in TRAININGS if job.part == "rates"]
    finals = [job for job in TRAININGS if job.part != "rates"]
    assert all(job.test is None and job.config.seed == RATES_SEED for job in candidates)
    assert all(job.test is not None and job.config.seed != RATES_SEED for job in finals)
    assert all(len(job.rates) == len(FULL.rates) for job in finals)
    of_arm = {job.name: job.config for job in candidates}
    for job in finals:
        if job.part == "main":
            assert {of_arm[name].method for name in job.rates} == {job.config.method}
            assert {of_arm[name].task for name in job.rates} == {job.config.task}
            rates = {of_arm[name].optimizer.learning_rate for name in job.rates}
            assert rates == set(FULL.rates)


def test_arms_differ_from_each_other_in_method_prompts_and_wording_alone():
    def rest(job: Training) -> dict[str, object]:
        settings = job.config.model_dump()
        del settings["method"], settings["prompts_per_step"], settings["task"]["reference_dialect"]
        return settings

    first, *others = [rest(j) for j in TRAININGS if j.part == "main" and j.config.seed == 0]
    assert all(other == first for other in others)


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_what_a_regime_says_is_equal_is_equal(regime):
    arms = (regime.grpo, regime.refsol, regime.refsol_rare, regime.stepalign)
    if "prompts" in regime.name:
        assert {arm.prompts for arm in arms} == {8}
        assert regime.grpo.rollouts == 8 * regime.stepalign.rollouts
    else:
        (rollouts,) = {arm.rollouts for arm in arms}
        assert f"{rollouts} a step" in regime.name


@pytest.mark.parametrize("stratum", [None, (0.3, 0.5)])
def test_test_problems_are_never_trained_on_or_chosen_by(stratum):
    """The splits are disjoint by construction; this looks at the very problems."""
    wanted = [
        job
        for job in TRAININGS
        if job.test is not None
        and job.config.task.predicted_success == stratum
        and job.config.seed == 0
    ]
    job = wanted[0]
    task = ArithmeticTask(**job.config.task.model_dump(exclude={"name"}))
    count = job.config.steps * job.config.prompts_per_step
    seeds = (RATES_SEED, *FULL.seeds)
    train = {p.id for s in seeds for p in task.problems(split="train", count=count, seed=s)}
    dev = {p.id for p in task.problems(split="dev", count=job.config.evaluation.problems)}
    assert job.test is not None
    test = {p.id for p in task.problems(split="test", count=job.test.problems)}
    assert not test & train
    assert not test & dev
    assert not dev & train


def test_one_study_brings_what_it_needs_and_no_more():
    copy = build_plan("solver", FULL, ["copy"])
    assert {job.part for job in copy} == {"rates", "main", "copy"}
    shown = {job.name.split("/")[1] for job in copy if job.part in ("rates", "main")}
    assert shown == {"stepalign-8x1"}


def test_token_scores_see_the_same_problems_under_every_context():
    for job in PLAN:
        if isinstance(job, TokenScores):
            first, *others = [config.task for config in job.contexts.values()]
            assert all(other.predicted_success == first.predicted_success for other in others)


def test_base_success_is_measured_in_every_stratum():
    measured = [job for job in PLAN if isinstance(job, BaseEvaluation)]
    assert {job.config.task.predicted_success for job in measured} == {None, *FULL.strata}


def test_the_budget():
    assert minutes(PLAN, workers=2) <= 70
    assert minutes(build_plan("solver", QUICK), workers=2) <= 10
    assert minutes(PLAN, workers=1) == 2 * minutes(PLAN, workers=2)
    assert all(job_seconds(job) > 0 for job in PLAN)


def test_more_work_costs_more():
    few, many = (build_plan("solver", Scale(milestones=(n,)), ["main"]) for n in (30, 60))
    assert minutes(few, workers=1) < minutes(many, workers=1)


def test_studies_are_read_from_a_list():
    assert parse_studies(None) == STUDIES
    assert parse_studies("wording, main") == ("main", "wording")
    with pytest.raises(UnknownStudyError, match=r"got 'speed'.*main, copy, difficulty, wording"):
        parse_studies("main,speed")
