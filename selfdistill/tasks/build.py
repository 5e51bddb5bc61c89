"""The configured task, and the problems that a run draws from it."""

from __future__ import annotations

from typing import Literal

from selfdistill.config import TaskConfig
from selfdistill.tasks.interface import Problem, Task, TaskError


def build_task(config: TaskConfig) -> Task:
    """Build the configured task.

    Raises:
        TaskError: its problems cannot be read, or a package is missing.
    """
    match config.name:
        case "arithmetic":
            from selfdistill.tasks.arithmetic import ArithmeticTask

            return ArithmeticTask(
                step_counts=config.step_counts,
                reference_dialect=config.reference_dialect,
                reference_order=config.reference_order,
                predicted_success=config.predicted_success,
            )
        case "jsonl" | "hub":
            from selfdistill.tasks.dataset import load_dataset_task

            return load_dataset_task(config)
        case "python":
            from selfdistill.tasks.python_task import load_python_task

            return load_python_task(config)


def training_problems(task: Task, *, count: int, seed: int) -> list[Problem]:
    """Return what a run trains on, in order: whole epochs, each in an order of its own.

    A longer run starts with the problems of a shorter one.

    Raises:
        TaskError: the task has no training problems.
    """
    size = task.size("train")
    if size is None:
        return task.problems(split="train", count=count, seed=seed)
    if size == 0:
        raise TaskError(f"the {task.name} task has no train problems: give it some")
    problems: list[Problem] = []
    for epoch in range(-(-count // size)):
        problems += task.problems(split="train", count=size, seed=seed + (epoch << 32))
    return problems[:count]


def held_out_problems(task: Task, *, split: str, count: int | Literal["all"]) -> list[Problem]:
    """Return the first problems of a split, `count` of them or as many as there are.

    Raises:
        TaskError: the split is empty; or it has no end, and all of it was asked for.
    """
    size = task.size(split)
    if size is None and count == "all":
        raise TaskError(
            f"the {task.name} task has as many {split} problems as anybody asks for: give a number"
        )
    if size == 0:
        raise TaskError(
            f"the {task.name} task has no {split} problems: give it some, or say how many it "
            "takes of all (counts, beside shares)"
        )
    most = [number for number in (size, count) if isinstance(number, int)]
    return task.problems(split=split, count=min(most))
