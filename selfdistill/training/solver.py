"""The model that solves problems, with its tokenizer, its task and its sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from selfdistill.config import (
    Config,
    EvaluationSampling,
    LocalTextEngine,
    MethodConfig,
    RolloutConfig,
)
from selfdistill.methods.build import build_method
from selfdistill.methods.method import Method
from selfdistill.model.device import resolve_device
from selfdistill.model.folder import check_vocabulary, load_tokenizer
from selfdistill.model.weights import Student, load_model
from selfdistill.prompts.context import ContextRenderer
from selfdistill.rollout.attempts import Attempts, sample_attempts
from selfdistill.rollout.engine import RolloutEngine, SamplingParams
from selfdistill.rollout.transformers_engine import TransformersEngine
from selfdistill.tasks.build import build_task, held_out_problems
from selfdistill.tasks.interface import Problem, Task, TaskError
from selfdistill.training.checkpoint import fingerprint
from selfdistill.training.state_file import digest_inputs, read_checkpoint, refuse_other


def sampling_params(
    settings: RolloutConfig, seed: int, evaluation: EvaluationSampling | None = None
) -> SamplingParams:
    """Return how completions are drawn.

    Args:
        settings: of the run; lengths and stop strings are the same in evaluations.
        seed: of the call.
        evaluation: how evaluations are sampled, if that differs.
    """
    chosen = settings if evaluation is None else evaluation
    return SamplingParams(
        temperature=chosen.temperature,
        max_new_tokens=settings.max_new_tokens,
        seed=seed,
        top_k=chosen.top_k,
        top_p=chosen.top_p,
        min_p=chosen.min_p,
        stop=settings.stop,
    )


@dataclass(frozen=True)
class Solver:
    """A student and all that is needed to sample from it and to judge what it wrote."""

    config: Config
    model: Student
    tokenizer: PreTrainedTokenizerBase
    task: Task
    engine: RolloutEngine
    context: ContextRenderer

    def build_method(self, settings: MethodConfig) -> Method:
        """Build a method that teaches the solver's task from its rollouts.

        Raises:
            ConfigError: see `selfdistill.methods.build.build_method`.
        """
        return build_method(
            settings,
            self.task,
            temperature=self.config.rollout.temperature,
            device=self.config.device,
            today=self.config.prompt.date,
        )

    def attempt(
        self,
        *,
        split: str,
        problems: int | Literal["all"],
        samples: int,
        seed: int,
        part: range | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Attempts]:
        """Sample and judge `samples` attempts at each of the first `problems` of a split.

        The problems are the same whatever the seed, which decides the sampled tokens only. With a
        `part` of those that `with_room` returns, only these are attempted, with the outcome that
        they have among all.

        Raises:
            TaskError: see `with_room`.
        """
        asked, _ = self.with_room(held_out_problems(self.task, split=split, count=problems))
        part = part if part is not None else range(len(asked))
        return sample_attempts(
            self.engine,
            self.context.student_prompt,
            self.task,
            asked[part.start : part.stop],
            samples=samples,
            params=sampling_params(
                self.config.rollout, seed + part.start, self.config.evaluation.sampling
            ),
            progress=progress,
        )

    def with_room(self, problems: Sequence[Problem]) -> tuple[list[Problem], int]:
        """Return the problems that leave room for a whole answer, and how many do not.

        Raises:
            TaskError: some do not, and `prompt.too_long` is "error"; or none does.
        """
        room = self.config.rollout.max_new_tokens
        kept = [p for p in problems if self.context.leaves_room(p, max_new_tokens=room)]
        left_out = len(problems) - len(kept)
        if left_out and (self.config.prompt.too_long == "error" or not kept):
            wrong = next(problem for problem in problems if problem not in kept)
            raise TaskError(
                f"{left_out} of {len(problems)} problems leave no room for {room} new tokens "
                f"(rollout.max_new_tokens), such as {wrong.id!r}, whose prompt has "
                f"{len(self.context.student_prompt(wrong))} tokens of "
                f"{self.context.max_length}: raise prompt.max_length where the model has the "
                "positions, lower rollout.max_new_tokens, or leave them out (prompt.too_long: drop)"
            )
        return kept, left_out


def load_solver(config: Config, checkpoint: Path | None = None) -> Solver:
    """Load the configured task and model, with the weights of a checkpoint if one is given.

    Raises:
        CheckpointError: the checkpoint is torn, or that of another configuration, of other base
            weights (where the adapters stand on them), problems, or of another tokenizer.
        UnusableModelError: there is no such model, or it cannot be loaded whole.
        TaskError: the task's problems cannot be read.
        UnsupportedAdapterError: the adapter names layers that cannot be adapted.
    """
    tokenizer = load_solver_tokenizer(config)
    task = build_task(config.task)
    if checkpoint is None:
        model = load_model(config)
    else:
        model = load_checkpoint(config, checkpoint, digest_inputs(task, tokenizer))
    model = model.to(resolve_device(config.device))
    engine = build_engine(config, model, tokenizer)
    if checkpoint is not None:
        engine.sync(model)
    return Solver(
        config,
        model,
        tokenizer,
        task,
        engine,
        build_renderer(config, tokenizer, task, model.config),
    )


def keep_date(solver: Solver, day: date) -> Solver:
    """Return a solver whose prompts write that day, where chat templates of the run write one.

    Nothing changes where the configuration names a day, or nobody asks for one.
    """
    config = solver.config
    critic = getattr(config.method, "critic", None)
    local = isinstance(getattr(critic, "engine", None), LocalTextEngine)
    if config.prompt.date is not None or not (solver.context.writes_date or local):
        return solver
    config = with_date(config, day)
    context = build_renderer(config, solver.tokenizer, solver.task, solver.model.config)
    return replace(solver, config=config, context=context)


def with_date(config: Config, day: date) -> Config:
    """Return a configuration whose prompts write that day."""
    return config.model_copy(update={"prompt": config.prompt.model_copy(update={"date": day})})


def recorded_date(recorded: Mapping[str, Any]) -> date | None:
    """Return the day in a configuration as `Config.model_dump(mode="json")` gives it."""
    try:
        return date.fromisoformat(recorded["prompt"]["date"])
    except (LookupError, TypeError, ValueError):  # none, or somebody else wrote the document
        return None


def load_solver_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the configured model's tokenizer, with the configured chat template if there is one."""
    template = config.prompt.chat_template
    return load_tokenizer(config.model, chat_template=Path(template) if template else None)


def load_checkpoint(
    config: Config, checkpoint: Path, inputs: Mapping[str, str] | None = None
) -> Student:
    """Load the weights of a checkpoint of this configuration, and of no other.

    Args:
        config: of the run.
        checkpoint: its folder.
        inputs: `digest_inputs`; None: it does not matter what the run was trained on.

    Raises:
        CheckpointError: see `load_solver`.
    """
    state = read_checkpoint(checkpoint)
    refuse_other(checkpoint, state, config=config.model_dump(mode="json"), inputs=inputs)
    if config.adapter is None:
        return load_model(config, checkpoint)
    from selfdistill.model.adapters import load_adapter

    model = load_model(config)
    refuse_other(checkpoint, state, base_sha256=fingerprint(model))
    load_adapter(model, checkpoint)
    return model


def build_renderer(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    model_config: PreTrainedConfig,
) -> ContextRenderer:
    """Return the renderer of all prompts of a run.

    Raises:
        UnusableModelError: no usable chat template, or the tokenizer does not fit the model.
    """
    renderer = ContextRenderer(
        tokenizer,
        config.prompt,
        instruction=task.instruction,
        max_length=config.prompt.max_length
        or getattr(model_config, "max_position_embeddings", None),
    )
    rows = model_config.get_text_config().vocab_size
    check_vocabulary(tokenizer, renderer.largest_token, rows=rows)
    return renderer


def build_engine(
    config: Config, model: Student, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """Build the configured engine; one with weights of its own starts from the configured model.

    Args:
        config: names the engine and the model.
        model: the student, which `RolloutEngine.sync` will be told about; a PEFT wrapper says that
            only adapters will change.
        tokenizer: of the model.
    """
    settings = config.rollout.engine
    if settings.name == "transformers":
        return TransformersEngine(model, tokenizer, batch_size=settings.batch_size)
    if settings.name == "vllm_server":
        from selfdistill.rollout.vllm_server_engine import VLLMServerEngine

        return VLLMServerEngine(config.model, tokenizer, settings)
    from selfdistill.model.adapters import adapter_rank
    from selfdistill.rollout.vllm_engine import VLLMEngine

    return VLLMEngine(
        config.model,
        tokenizer,
        settings,
        adapter_rank=adapter_rank(model),
        tensor_parallel_size=settings.tensor_parallel_size,
    )
