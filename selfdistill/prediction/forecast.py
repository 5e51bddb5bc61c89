"""What a configuration's training will bring, by its method, by others on its data, and by GRPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter

from selfdistill.analysis.sections import method_labels, parse_methods
from selfdistill.config import Config, Distillation, GRPOMethod
from selfdistill.evaluation.intervals import Interval
from selfdistill.prediction.advice import Advice, advise
from selfdistill.prediction.law import (
    Fitted,
    Laws,
    effort,
    forecast_distillation,
    forecast_grpo,
    read_laws,
)
from selfdistill.prediction.probe import ContextProbe, Probe, probe
from selfdistill.prediction.unseen import (
    unseen_in_distillation,
    unseen_in_grpo,
    unseen_in_optimizer,
)
from selfdistill.training.checkpoint import fingerprint
from selfdistill.training.solver import Solver, load_solver

# Rollouts of a group: what the law was fitted to, and what GRPO would draw where the configuration
# does not say it.
GRPO_GROUP = 8
# What a law was fitted to may be exceeded by this factor before it counts as outside.
SLACK = 1.25


@dataclass(frozen=True)
class Forecast:
    """What one method should bring.

    Attributes:
        label: of the method.
        prompts, group_size: of a step.
        gain: share of right answers after the configured steps, minus that before; None where no
            law was fitted to anything like it.
        outside: what the law has never seen here, in words.
        mixed_groups: of a step, groups with right and wrong rollouts; of GRPO only.
    """

    label: str
    prompts: int
    group_size: int
    gain: Interval | None
    outside: tuple[str, ...]
    mixed_groups: float | None = None


@dataclass(frozen=True)
class Cost:
    """What training and the probe cost; seconds of this machine, as busy as it was.

    Attributes:
        step: seconds of a training step, from the probe's own speed: sampling, the two forward
            passes, and as much again for the backward pass. None where nothing was scored.
        training: of all steps and evaluations.
        probe: of the probe.
    """

    step: float | None
    training: float | None
    probe: float

    @property
    def share(self) -> float | None:
        """The probe's part of the training's cost."""
        return None if not self.training else self.probe / self.training


@dataclass(frozen=True)
class Prediction:
    """Everything that `selfdistill predict` says.

    Attributes:
        model, task: of the configuration.
        steps, rollouts: the budget: steps, and rollouts of each.
        samples: k of Avg@k.
        probe: what was measured.
        forecasts: one for each probed method or, where none was asked for, the configured one that
            no law covers; and GRPO's.
        cost: of training and of the probe.
        advice: what to begin with.
        fitted_by: the command behind the laws.
    """

    model: str
    task: str
    steps: int
    rollouts: int
    samples: int
    probe: Probe
    forecasts: tuple[Forecast, ...]
    cost: Cost
    advice: Advice
    fitted_by: str

    def to_json(self) -> str:
        """Everything as one line of JSON; intervals are shares of 1, times are seconds."""
        return TypeAdapter(Prediction).dump_json(self).decode()


def predict(
    config: Config,
    *,
    methods: str | None = None,
    attempts: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Prediction:
    """Probe the untrained solver and forecast the gain of training; nothing is trained.

    Args:
        config: of the run.
        methods: whose teachers to try, see `selfdistill.analysis.sections.parse_methods`; None: the
            run's own. GRPO is forecast in any case.
        attempts: see `selfdistill.prediction.probe.probe`.
        progress: called with the number of rollouts just sampled.

    Raises:
        ConfigError: see `parse_methods`.
        UnusableModelError: see `load_solver`.
        TaskError: likewise, or no training problem leaves room for an answer.
    """
    sections: list[Distillation] = []
    if methods is not None or isinstance(config.method, Distillation):
        sections = parse_methods(methods, config)
    solver = load_solver(config)
    named = list(zip(method_labels(sections), sections, strict=True))
    measured = probe(config, named, attempts=attempts, solver=solver, progress=progress)
    laws = read_laws()
    forecasts = [
        distillation_forecast(config, section, measured, context, laws, solver)
        for section, context in zip(sections, measured.contexts, strict=True)
    ]
    if not (sections or isinstance(config.method, GRPOMethod)):
        forecasts.append(_no_law(config))
    if (grpo := grpo_forecast(config, measured, laws, solver)) is not None:
        forecasts.append(grpo)
    return Prediction(
        model=config.model,
        task=config.task.name,
        steps=config.steps,
        rollouts=config.prompts_per_step * config.method.group_size,
        samples=config.evaluation.samples,
        probe=measured,
        forecasts=tuple(forecasts),
        cost=estimate_cost(config, measured),
        advice=advise(measured, forecasts),
        fitted_by=laws.command,
    )


def distillation_forecast(
    config: Config,
    section: Distillation,
    measured: Probe,
    context: ContextProbe,
    laws: Laws,
    solver: Solver,
) -> Forecast:
    """Return the forecast of a method with a teacher, at the configured prompts and rollouts."""
    prompts, group = config.prompts_per_step, config.method.group_size
    outside = [*_unlike(config, laws, solver), *unseen_in_distillation(section)]
    if context.disputes_right_steps:
        outside.append(f"a teacher that disputes right steps ({context.label})")
    on_the_step = context.localisation.share_at
    if on_the_step is None:
        outside.append("attempts whose first wrong step is not known")
        return Forecast(context.label, prompts, group, None, tuple(outside))
    known = (context.gap, measured.student, 1 - on_the_step.value, effort(config))
    outside += _beyond(laws.distillation, known)
    gain = None if outside else forecast_distillation(laws.distillation, *known)
    return Forecast(context.label, prompts, group, gain, tuple(outside))


def grpo_forecast(config: Config, measured: Probe, laws: Laws, solver: Solver) -> Forecast | None:
    """Return GRPO's forecast with as many rollouts a step; None where they make no group."""
    rollouts = config.prompts_per_step * config.method.group_size
    own = config.method.name == "grpo"
    group = config.method.group_size if own else min(GRPO_GROUP, rollouts)
    if group < 2:
        return None
    prompts = rollouts // group
    mixed = prompts * measured.mixed(group)
    known = (measured.student, float(prompts), effort(config))
    outside = [*_unlike(config, laws, solver), *unseen_in_grpo(config)]
    outside += _beyond(laws.grpo, known)
    if group != GRPO_GROUP:
        outside.append(f"groups of {group}")
    gain = None if outside else forecast_grpo(laws.grpo, *known)
    return Forecast("grpo", prompts, group, gain, tuple(outside), mixed_groups=mixed)


def _no_law(config: Config) -> Forecast:
    """Return that nothing is known about the configured method, which follows no teacher."""
    name, group = config.method.name, config.method.group_size
    outside = (f"the method {name}",)
    return Forecast(name, config.prompts_per_step, group, None, outside)


def estimate_cost(config: Config, measured: Probe) -> Cost:
    """Return what training should cost at the speed that the probe had."""
    if not measured.scoring:
        return Cost(None, None, measured.seconds)
    rollouts = config.prompts_per_step * config.method.group_size
    step = rollouts * measured.tokens * (measured.sampling + 2 * measured.scoring)
    evaluation = config.evaluation
    problems = evaluation.problems if isinstance(evaluation.problems, int) else measured.problems
    asked = (1 + -(-config.steps // evaluation.every)) * problems * evaluation.samples
    training = config.steps * step + asked * measured.tokens * measured.sampling
    return Cost(step, training, measured.seconds)


def _unlike(config: Config, laws: Laws, solver: Solver) -> list[str]:
    """Say what no law has been fitted to, before any figure is looked at."""
    found = []
    if config.task.name != "arithmetic":
        found.append(f"the task {config.task.name}")
    if fingerprint(solver.model) != laws.solver_sha256:
        found.append("this model")
    if config.adapter is not None:
        found.append("adapters")
    return found + unseen_in_optimizer(config.optimizer)


def _beyond(fitted: Fitted, known: Sequence[Interval | float]) -> list[str]:
    """Say which of the figures lie outside of what the law was fitted to, as they were measured."""
    found = []
    for (name, (low, high)), given in zip(fitted.ranges.items(), known, strict=True):
        value = given.value if isinstance(given, Interval) else given
        if not low / SLACK <= value <= high * SLACK:
            found.append(f"{name} {value:.3g} (fitted from {low:.3g} to {high:.3g})")
    return found
