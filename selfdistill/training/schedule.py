"""The learning rate of each step by transformers' schedules; loaded where one is configured."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import get_scheduler

from selfdistill.config import Config, ConfigError


def ends_with_the_run(schedule: str) -> bool:
    """Return whether the rates of a schedule hang on the number of steps."""
    return schedule not in ("constant", "inverse_sqrt")


def learning_rates(config: Config) -> Callable[[int], float]:
    """Return the rate of each step, counted from 1; a pure function, so nothing has to be saved.

    Args:
        config: of the run, at whose last step a schedule has come to its end.

    Raises:
        ConfigError: the schedule does not take these options.
    """
    settings = config.optimizer
    stand_in = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=settings.learning_rate)
    try:
        # It counts from 0, where a warm-up has no rate yet; from 1 on the last step of a run would
        # have none, so the schedule is one step longer than the run.
        schedule = get_scheduler(
            settings.schedule,
            stand_in,
            num_warmup_steps=settings.warmup_steps,
            num_training_steps=config.steps + 1,
            scheduler_specific_kwargs=dict(settings.schedule_options),
        )
        (factor,) = schedule.lr_lambdas
        factor(config.steps)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"optimizer.schedule_options: the schedule {settings.schedule} of transformers does "
            f"not take {settings.schedule_options} ({error}): see its documentation of "
            "get_scheduler"
        ) from error
    return lambda step: settings.learning_rate * factor(step)
