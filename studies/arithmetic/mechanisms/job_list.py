"""What the study runs: for each arm one job a learning rate, on dev problems, and one a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfdistill.config import Config
from studies.arithmetic.mechanisms.arms import (
    ARMS,
    BY_KEY,
    REFERENCES,
    Arm,
    Scale,
    Settings,
    merged,
)
from studies.arithmetic.reproduce.job_list import (
    RATES_SEED,
    BaseEvaluation,
    Job,
    Outside,
    TestSet,
    Training,
    UnknownStudyError,
)

BASE = "mechanisms/base"

# What is added to a run's seed in the run before it, which would draw the same problems.
BEFORE = 1000


def parse_studies(text: str | None) -> tuple[Arm, ...]:
    """Read a list of arms such as "entry-clip,teacher-live"; None means all of them.

    The references that every arm stands beside come in any case.

    Raises:
        UnknownStudyError: one of them does not exist.
    """
    if text is None:
        return ARMS
    wanted = {name.strip() for name in text.split(",")}
    if not wanted <= BY_KEY.keys():
        raise UnknownStudyError(
            f"only: got {', '.join(sorted(wanted - BY_KEY.keys()))!r}, expected some of "
            f"{', '.join(BY_KEY)}, with commas between"
        )
    return tuple(arm for arm in ARMS if arm.key in wanted or arm in REFERENCES)


def build_plan(model: str, scale: Scale, arms: Sequence[Arm] = ARMS) -> list[Job]:
    """Return the jobs of some arms, in an order that can be run.

    Args:
        model: the shipped solver's folder.
        scale: how much is computed.
        arms: which ones; an arm's jobs stand together, so that a stopped study has whole arms.
    """
    test = TestSet(scale.problems, scale.samples)
    around = tuple(
        Outside(name, counts, TestSet(scale.outside_problems, scale.outside_samples))
        for name, counts in scale.outside.items()
    )
    base = make_config(model, scale, {}, steps=scale.steps)
    jobs: list[Job] = [BaseEvaluation(BASE, "mechanisms", base, test, outside=around)]
    for arm in arms:
        for name, rate in zip(rate_names(arm, scale), scale.rates, strict=True):
            settings = {"seed": RATES_SEED, "optimizer": {"learning_rate": rate}}
            config, first = _runs(model, scale, arm, settings)
            jobs.append(Training(name, "rates", config, first=first))
        for name, seed in zip(run_names(arm, scale), scale.seeds, strict=True):
            config, first = _runs(model, scale, arm, {"seed": seed})
            jobs.append(
                Training(
                    name,
                    "mechanisms",
                    config,
                    rates=rate_names(arm, scale),
                    test=test,
                    milestones=(config.steps,),
                    outside=around,
                    first=first,
                )
            )
    return jobs


def rate_names(arm: Arm, scale: Scale) -> tuple[str, ...]:
    """Return the names of the jobs that choose an arm's learning rate, the lowest first."""
    return tuple(f"rates/{arm.key}/{rate:.0e}" for rate in scale.rates)


def run_names(arm: Arm, scale: Scale) -> tuple[str, ...]:
    """Return the names of an arm's jobs, one for each seed."""
    return tuple(f"mechanisms/{arm.key}/seed-{seed}" for seed in scale.seeds)


def _runs(model: str, scale: Scale, arm: Arm, more: Settings) -> tuple[Config, Config | None]:
    """Return an arm's run, and the one before it if there is one."""
    settings = merged(arm.settings_at(scale), more)
    if arm.first is None:
        return make_config(model, scale, settings, steps=scale.steps), None
    rest = scale.steps - scale.first_steps
    return (
        make_config(model, scale, settings, steps=rest),
        make_config(
            model,
            scale,
            merged(merged(arm.first, more), {"seed": more["seed"] + BEFORE}),
            steps=scale.first_steps,
        ),
    )


def make_config(model: str, scale: Scale, changes: Settings, *, steps: int) -> Config:
    """Return StepAlignFB's configuration, one rollout of 8 prompts a step, with some changes."""
    common: dict[str, Any] = {
        "model": model,
        "output_dir": Path("set-when-it-starts"),
        "task": {"name": "arithmetic"},
        "method": {"name": "stepalign", "group_size": 1},
        "device": "cpu",
        "steps": steps,
        "prompts_per_step": 8,
        "rollout": {"max_new_tokens": 96},
        "evaluation": {
            "every": scale.evaluate_every,
            "problems": scale.dev_problems,
            "samples": scale.dev_samples,
        },
        # One prompt a step has many steps whose rewards are equal.
        "max_empty_steps": None,
        "checkpoint": {"every": scale.evaluate_every},
        "completions": None,
    }
    return Config.model_validate(merged(common, changes))
