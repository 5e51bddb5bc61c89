"""The configured method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from selfdistill.config import (
    Config,
    EnvironmentMethod,
    GRPOMethod,
    PeerMethod,
    RefSolMethod,
    StepAlignMethod,
)
from selfdistill.methods.environment import environment
from selfdistill.methods.grpo import grpo
from selfdistill.methods.method import Method
from selfdistill.methods.peer import peer
from selfdistill.methods.refsol import refsol
from selfdistill.methods.stepalign import stepalign
from selfdistill.tasks.interface import Task

# Who builds the method of a configuration section: called with it, the task and the whole run.
BUILDERS: dict[type[Any], Callable[[Any, Task, Config], Method]] = {
    StepAlignMethod: stepalign,
    RefSolMethod: refsol,
    PeerMethod: peer,
    EnvironmentMethod: environment,
    GRPOMethod: grpo,
}


def build_method(config: Config, task: Task) -> Method:
    """Build the configured method.

    Raises:
        ConfigError: the loss asks for steps that the task does not know; or see `build_critic`.
    """
    return BUILDERS[type(config.method)](config.method, task, config)
