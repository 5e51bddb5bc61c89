"""What `selfdistill reproduce` runs: a list of jobs, made from one base configuration.

An arm is one way of training (a row of a table). The learning rate of an arm is the one with the
best dev accuracy among the jobs of part "rates", which have a seed of their own and never see a
test problem; the jobs that use it name them as `rates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from selfdistill.config import Config
from selfdistill.errors import UserError
from studies.arithmetic.reproduce.arms import (
    ARMS,
    COPYING,
    MAIN_ARMS,
    OTHER_PATH,
    RARE_DIALECT,
    SIDE_ARMS,
    USUAL_DIALECT,
    Arm,
    Part,
    Scale,
    copying_arm,
    dialect_arm,
)

Study: TypeAlias = Literal["main", "copy", "difficulty", "wording"]
STUDIES: tuple[Study, ...] = get_args(Study)

RATES_SEED = 100


@dataclass(frozen=True)
class TestSet:
    """Held-out problems, and the attempts at each."""

    problems: int
    samples: int


@dataclass(frozen=True)
class Outside:
    """Test problems unlike those of training.

    Attributes:
        name: of the file.
        step_counts: the numbers of operations that a question may have.
        test: how many problems and attempts.
    """

    name: str
    step_counts: tuple[int, ...]
    test: TestSet


@dataclass(frozen=True)
class Training:
    """Train, and measure the best checkpoint on test problems.

    Attributes:
        name: unique; its folder.
        part: what it belongs to.
        config: the run; `output_dir` is set when it starts, and so is the learning rate if `rates`.
        rates: names of the jobs among whose learning rates the best one is taken; empty: as in
            `config`.
        test: None for the jobs that choose a learning rate.
        milestones: steps after which the best checkpoint so far is measured.
        outside: other problems that the last of those is measured on.
        first: another run, at the same learning rate, whose best checkpoint this one starts from.
    """

    name: str
    part: Part
    config: Config
    rates: tuple[str, ...] = ()
    test: TestSet | None = None
    milestones: tuple[int, ...] = ()
    outside: tuple[Outside, ...] = ()
    first: Config | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the jobs that must be finished before."""
        return self.rates


@dataclass(frozen=True)
class BaseEvaluation:
    """Measure the solver before training, alone and with what its teacher would see."""

    name: str
    part: Part
    config: Config
    test: TestSet
    needs: tuple[str, ...] = ()
    outside: tuple[Outside, ...] = ()


@dataclass(frozen=True)
class TokenScores:
    """Score the base solver's wrong attempts token by token under several contexts.

    Attributes:
        contexts: a configuration (method and task) for each named context; all see the same
            attempts.
        test: where the attempts come from.
    """

    name: str
    part: Part
    contexts: dict[str, Config] = field(hash=False)
    test: TestSet
    needs: tuple[str, ...] = ()


Job: TypeAlias = Training | BaseEvaluation | TokenScores


class UnknownStudyError(UserError):
    """A study that does not exist was asked for."""


def parse_studies(text: str | None) -> tuple[Study, ...]:
    """Read a list such as "main,copy"; None means all of them.

    Raises:
        UnknownStudyError: one of them does not exist.
    """
    if text is None:
        return STUDIES
    wanted = {name.strip() for name in text.split(",")}
    if not wanted <= set(STUDIES):
        raise UnknownStudyError(
            f"only: got {', '.join(sorted(wanted - set(STUDIES)))!r}, expected some of "
            f"{', '.join(STUDIES)}, with commas between"
        )
    return tuple(study for study in STUDIES if study in wanted)


# Rows of the main table that a study shows, too.
_ALSO_SHOWN: dict[Study, tuple[str, ...]] = {
    "copy": ("stepalign-8x1",),
    "wording": ("refsol-8x1", "refsol-rare-8x1"),
}


def build_plan(model: str, scale: Scale, studies: Sequence[Study] = STUDIES) -> list[Job]:
    """Return the jobs of some studies and of what they need, in an order that can be run.

    Args:
        model: the shipped solver's folder.
        scale: how much is computed.
        studies: which ones.
    """
    plan = _Builder(model, scale)
    jobs: list[Job] = [
        *(job for arm in MAIN_ARMS for job in plan.rate_jobs(arm)),
        *plan.main(),
        *plan.copy(),
        *plan.difficulty(),
        *plan.wording(),
    ]
    wanted = {job.name for job in jobs if job.part in studies}
    for study in studies:
        folders = tuple(folder_of("main", key) + "/" for key in _ALSO_SHOWN.get(study, ()))
        wanted |= {job.name for job in jobs if job.name.startswith(folders)}
    by_name = {job.name: job for job in jobs}
    wanted |= {needed for name in wanted for needed in by_name[name].needs}
    return [job for job in jobs if job.name in wanted]


def rate_names(arm: Arm, scale: Scale) -> tuple[str, ...]:
    """Return the names of the jobs that choose an arm's learning rate, the lowest first."""
    return tuple(f"rates/{arm.key}/{rate:.0e}" for rate in scale.rates)


def folder_of(part: Part, arm: str, *, stratum: tuple[float, float] | None = None) -> str:
    """Return the name of an arm's jobs up to the seed."""
    return f"{part}/{stratum_key(stratum)}/{arm}" if stratum else f"{part}/{arm}"


def stratum_key(stratum: tuple[float, float]) -> str:
    """Return the folder's name of a range of predicted success: "success-0.06-0.12"."""
    return f"success-{stratum[0]:g}-{stratum[1]:g}"


class _Builder:
    def __init__(self, model: str, scale: Scale) -> None:
        self.model = model
        self.scale = scale

    def config(self, arm: Arm, *, stratum: tuple[float, float] | None = None, **top: Any) -> Config:
        """Return the base configuration with an arm's method and some settings changed."""
        scale = self.scale
        task: dict[str, Any] = {"name": "arithmetic", "reference_dialect": arm.dialect}
        if stratum is not None:
            task["predicted_success"] = stratum
        settings: dict[str, Any] = {
            "model": self.model,
            "output_dir": Path("set-when-it-starts"),
            "task": task,
            "method": arm.method,
            "device": "cpu",
            "steps": scale.milestones[-1],
            "prompts_per_step": arm.prompts,
            "rollout": {"max_new_tokens": 96},
            "evaluation": {
                "every": scale.evaluate_every,
                "problems": scale.dev_problems,
                "samples": scale.dev_samples,
            },
            # One prompt a step has many steps whose rewards are equal, on hard problems most.
            "max_empty_steps": None,
            # The best step is saved in any case; this bounds what a kill costs.
            "checkpoint": {"every": scale.evaluate_every},
            # Nobody reads the words of 92 jobs.
            "completions": None,
        }
        return Config.model_validate({**settings, **top})

    def rate_jobs(self, arm: Arm) -> list[Training]:
        """Return one job for each learning rate, trained with a seed that no other job has."""
        return [
            Training(
                name,
                "rates",
                self.config(
                    arm,
                    seed=RATES_SEED,
                    steps=self.scale.rate_steps,
                    optimizer={"learning_rate": rate},
                ),
            )
            for name, rate in zip(rate_names(arm, self.scale), self.scale.rates, strict=True)
        ]

    def runs(
        self,
        part: Part,
        arm: Arm,
        *,
        rates_of: Arm,
        seeds: Sequence[int],
        problems: int,
        stratum: tuple[float, float] | None = None,
    ) -> list[Training]:
        """Return an arm's runs, one for each seed, at the learning rate chosen for `rates_of`."""
        return [
            Training(
                f"{folder_of(part, arm.key, stratum=stratum)}/seed-{seed}",
                part,
                self.config(arm, stratum=stratum, seed=seed),
                rates=rate_names(rates_of, self.scale),
                test=TestSet(problems, self.scale.samples),
                milestones=self.scale.milestones,
            )
            for seed in seeds
        ]

    def main(self) -> list[Job]:
        """GRPO, RefSol and StepAlignFB from the same checkpoint."""
        scale = self.scale
        test = TestSet(scale.problems, scale.samples)
        jobs: list[Job] = [
            BaseEvaluation("main/base", "main", self.config(ARMS["stepalign-8x1"]), test)
        ]
        for arm in MAIN_ARMS:
            jobs += self.runs("main", arm, rates_of=arm, seeds=scale.seeds, problems=scale.problems)
        return jobs

    def copy(self) -> list[Job]:
        """Return the three ways of copying: advantages by token, and training with the others."""
        scale = self.scale
        contexts = {
            **{label: self.config(copying_arm(name)) for name, label in COPYING.items()},
            "RefSol, usual wording": self.config(ARMS["refsol-8x1"]),
            "RefSol, rare wording": self.config(ARMS["refsol-rare-8x1"]),
            OTHER_PATH: self.config(
                ARMS["refsol-8x1"], task={"name": "arithmetic", "reference_order": "reversed"}
            ),
        }
        jobs: list[Job] = [TokenScores("copy/tokens", "copy", contexts, TestSet(*scale.analysed))]
        for copying in ("full_repetition", "omission"):
            jobs += self.runs(
                "copy",
                copying_arm(copying),
                rates_of=ARMS["stepalign-8x1"],
                seeds=scale.side_seeds,
                problems=scale.problems,
            )
        return jobs

    def difficulty(self) -> list[Job]:
        """Return problems of one predicted base success at a time, training and test alike."""
        scale = self.scale
        jobs: list[Job] = []
        for stratum in scale.strata:
            test = TestSet(scale.side_problems, scale.samples)
            name = folder_of("difficulty", "base", stratum=stratum)
            config = self.config(ARMS["stepalign-8x1"], stratum=stratum)
            jobs.append(BaseEvaluation(name, "difficulty", config, test))
            for arm in SIDE_ARMS:
                jobs += self.runs(
                    "difficulty",
                    arm,
                    rates_of=arm,
                    seeds=scale.side_seeds,
                    problems=scale.side_problems,
                    stratum=stratum,
                )
        return jobs

    def wording(self) -> list[Job]:
        """RefSol with references in ever rarer words; the ends of the axis are in the main part."""
        scale = self.scale
        dialects = (USUAL_DIALECT, *scale.dialects, RARE_DIALECT)
        contexts = {
            COPYING["partial_repetition"]: self.config(ARMS["stepalign-8x1"]),
            **{f"dialect {d}": self.config(dialect_arm(d)) for d in dialects},
        }
        jobs: list[Job] = [
            TokenScores("wording/tokens", "wording", contexts, TestSet(*scale.analysed))
        ]
        for dialect in scale.dialects:
            jobs += self.runs(
                "wording",
                dialect_arm(dialect),
                rates_of=ARMS["refsol-rare-8x1"],
                seeds=scale.wording_seeds,
                problems=scale.problems,
            )
        return jobs
