"""Settings that no law was fitted to, by name: a forecast with one of them would be a guess."""

from __future__ import annotations

import json
from collections.abc import Collection

from selfdistill.config import Config, Distillation, GRPOMethod, OptimizerConfig, ScribeCriticConfig
from selfdistill.config.section import Section

# What the laws are given as a number (`selfdistill.prediction.law.effort`), or as the shape of a
# step.
MEASURED = ("learning_rate", "schedule", "schedule_options", "warmup_steps")
SHAPE = ("name", "group_size")
# Of the critics, those whose critiques are among the conditions of the fit.
CRITICS = [ScribeCriticConfig(), ScribeCriticConfig(copying="full_repetition")]


def unseen_in_optimizer(settings: OptimizerConfig) -> list[str]:
    """Return what differs from the optimiser that every law was fitted with."""
    return _differing(settings, OptimizerConfig(), "optimizer", leave=MEASURED)


def unseen_in_distillation(section: Distillation) -> list[str]:
    """Return what differs from the loss, rewards, teacher and critics of the first law's fit.

    Sections are compared whole, so that a setting that is newer than the fit is refused, too.
    """
    found = _differing(section.loss, type(section.loss)(), "method.loss")
    if section.reward is not None:
        found.append("method.reward")
    if section.teacher != Distillation().teacher:
        found.append(f"method.teacher: {section.teacher.name}")
    critic = getattr(section, "critic", None)
    if isinstance(critic, ScribeCriticConfig) and critic not in CRITICS:
        found += _differing(critic, CRITICS[0], "method.critic")
    elif critic is not None and critic not in CRITICS:
        found.append(f"method.critic: {critic.name}")
    return found


def unseen_in_grpo(config: Config) -> list[str]:
    """Return what differs from the GRPO of the second law's fit, where the run is one of GRPO."""
    if not isinstance(config.method, GRPOMethod):
        return []
    return _differing(config.method, GRPOMethod(), "method", leave=SHAPE)


def _differing(
    settings: Section, fitted: Section, path: str, *, leave: Collection[str] = ()
) -> list[str]:
    found = []
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if name in leave or value == getattr(fitted, name):
            continue
        if isinstance(value, Section):
            kind = getattr(value, "name", None)
            found.append(f"{path}.{name}" if kind is None else f"{path}.{name}: {kind}")
        else:
            text = json.dumps(settings.model_dump(mode="json")[name]).strip('"')
            found.append(f"{path}.{name}: {text}")
    return found
