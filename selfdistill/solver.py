"""The model that solves problems, with its tokenizer, its task and its sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfdistill.config import Config
from selfdistill.context import ContextRenderer
from selfdistill.evaluate import Attempts, sample_attempts
from selfdistill.rollout import SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.arithmetic import ArithmeticTask


@dataclass(frozen=True)
class Solver:
    """A student and all that is needed to sample from it and to judge what it wrote."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: ArithmeticTask
    engine: TransformersEngine
    context: ContextRenderer

    def attempt(
        self,
        *,
        split: str,
        problems: int,
        samples: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[Attempts]:
        """Sample and judge `samples` attempts at each of the first `problems` of a split.

        The problems are the same whatever the seed, which decides the sampled tokens only.
        """
        return sample_attempts(
            self.engine,
            self.context.student_prompt,
            self.task,
            self.task.problems(split=split, count=problems),
            samples=samples,
            params=SamplingParams(
                temperature=self.config.rollout.temperature,
                max_new_tokens=self.config.rollout.max_new_tokens,
                seed=seed,
            ),
            progress=progress,
        )


def load_solver(config: Config, weights: str | Path | None = None) -> Solver:
    """Load the configured model, or other `weights` of the same kind (a checkpoint folder).

    Raises:
        OSError: there is no such model folder, or it lacks a file (transformers names it).
    """
    source = str(weights or config.model)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).to(device).eval()
    task = ArithmeticTask(
        step_counts=config.task.step_counts,
        reference_dialect=config.task.reference_dialect,
        predicted_success=config.task.predicted_success,
    )
    return Solver(
        config,
        model,
        tokenizer,
        task,
        TransformersEngine(model, tokenizer, batch_size=config.rollout.engine.batch_size),
        ContextRenderer(
            tokenizer,
            max_length=config.prompt.max_length
            or getattr(model.config, "max_position_embeddings", None),
            student_template=config.prompt.student_template,
            teacher_template=config.prompt.teacher_template,
        ),
    )
