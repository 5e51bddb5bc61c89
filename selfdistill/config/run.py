"""The configuration of one training run, a section for each part of it."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfdistill.config.engines import (
    VLLM_ADAPTER_RANKS,
    EngineConfig,
    TransformersEngineConfig,
    VLLMServerEngineConfig,
    VLLMTextEngine,
)
from selfdistill.config.methods import (
    ContrastMethod,
    MethodConfig,
    RefreshedTeacherConfig,
    RefSolMethod,
    ScribeCriticConfig,
    StepAlignMethod,
)
from selfdistill.config.section import (
    Float,
    InputFile,
    Int,
    JsonObject,
    NearbyName,
    OutputPath,
    PositiveInt,
    Section,
)
from selfdistill.config.tasks import ArithmeticTaskConfig, TaskConfig


class Shot(Section):
    """A solved question."""

    question: str
    """As that of a problem: the instruction follows it, too."""
    answer: str
    """What the model should have written."""


class PromptConfig(Section):
    """How questions and contexts become prompts, through the tokenizer's chat template."""

    chat_template: InputFile | None = None
    """A file with the Jinja template to use instead of the tokenizer's own, which a base model does
    not have."""
    system: str | None = None
    """A system turn before every question. It goes through the chat template as it is."""
    few_shot: tuple[Shot, ...] = ()
    """Turns with solved questions before every question, as the system turn."""
    question: str | None = None
    """A Jinja template of the question's turn, with the variables `question` and `instruction`; by
    default the one and, after an empty line, the other."""
    context: str | None = None
    """A Jinja template of what the teacher sees beyond it, with the variables `kind` (critique,
    reference, feedback) and `text`; by default the text between <kind> and </kind>."""
    date: datetime.date | None = None
    """The day that chat templates write which write one; by default that of the run's first start,
    which it keeps, so that its prompts stay the same."""
    student_template: JsonObject = Field(default_factory=dict)
    """More variables for the student's chat template, such as {enable_thinking: false}."""
    teacher_template: JsonObject = Field(default_factory=dict)
    """The same for the teacher."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its completion; by default what the model has positions for."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a rollout whose prompts do not fit: stop, or leave it out and count it."""


class Truncation(Section):
    """What is never sampled, at the temperature, in this order."""

    min_p: Float = Field(default=0.0, ge=0, le=1)
    """Tokens less likely than this times the likeliest; 0 keeps all."""
    top_k: Int = Field(default=0, ge=0)
    """All but so many of the likeliest tokens; 0 keeps all."""
    top_p: Float = Field(default=1.0, gt=0, le=1)
    """The least likely tokens that this share of the rest can do without; 1 keeps all."""


class EvaluationSampling(Truncation):
    """How evaluations sample."""

    temperature: Float = Field(default=1.0, ge=0)
    """Softmax temperature; 0 takes the likeliest token."""


class RolloutConfig(Truncation):
    """How the student's attempts are sampled, in evaluation too unless that says otherwise."""

    temperature: Float = Field(default=1.0, gt=0)
    """Softmax temperature of sampling."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end a completion, which keeps them."""
    max_new_tokens: PositiveInt = 128
    """Completions are cut off at this length."""
    engine: EngineConfig = TransformersEngineConfig()
    """What samples."""


class AdapterConfig(Section):
    """LoRA adapters (peft) on a frozen model; no dropout, which would make the teacher disagree."""

    r: PositiveInt = 16
    """The rank of the adapters."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Names of the layers; by default every linear one but the lm_head, which stays frozen."""


Decay = Annotated[Float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with a linear warm-up of the learning rate, and a schedule."""

    learning_rate: Float = Field(default=1e-4, gt=0)
    """The rate after warm-up."""
    schedule: Literal[
        "constant",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "cosine_with_min_lr",
        "polynomial",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "constant"
    """What follows the warm-up, as transformers' `get_scheduler` has it. With `constant` and
    `inverse_sqrt` a run that goes on may change `steps`; the others end with the run."""
    schedule_options: JsonObject = Field(default_factory=dict)
    """More for such a schedule: {num_cycles: 3}, {min_lr_rate: 0.1} or {power: 2}."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: Int = Field(default=10, ge=0)
    """Step i of the warm-up runs at i / warmup_steps of the rate."""
    max_grad_norm: Float = Field(default=1.0, gt=0)
    """The global gradient norm is clipped to this."""

    @model_validator(mode="after")
    def _options_belong_to_a_schedule(self) -> OptimizerConfig:
        if self.schedule == "constant" and self.schedule_options:
            raise ValueError("schedule_options are for other schedules than constant")
        return self


class EvaluationConfig(Section):
    """Held-out evaluation during training; the best checkpoint is chosen by its Avg@k.

    Where a task's own rewards are more than right or wrong, by their mean.
    """

    every: PositiveInt = 15
    """Evaluate after every so many steps, and once before the first and after the last."""
    problems: PositiveInt | Literal["all"] = 100
    """At most so many problems of the dev split, the same ones each time."""
    samples: PositiveInt = 4
    """Attempts per problem: the k of Pass@k, Maj@k and Avg@k."""
    sampling: EvaluationSampling | None = None
    """How they are sampled; by default as in training."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations in a row without a new best one; null takes all steps."""


class CheckpointConfig(Section):
    """What is kept on disk: the best state and the last ones."""

    every: PositiveInt = 1
    """Write `last` after every so many steps; an interrupt (Ctrl-C) always writes it."""
    keep: PositiveInt | Literal["all"] = 1
    """How many of those written last are kept, beside the best."""


class CompletionsConfig(Section):
    """Rollouts with rewards, contexts and the advantage of each token; `selfdistill show` them."""

    every: PositiveInt = 1
    """Of every so many steps."""
    max_mib: PositiveInt = 256
    """Most MiB of the folder `completions`; the oldest steps go."""


class TrackerConfig(Section):
    """An experiment tracker, by its name in accelerate."""

    name: str
    """Such as tensorboard, trackio or wandb."""
    project: str = "selfdistill"
    """The name of the project there."""
    options: JsonObject = Field(default_factory=dict)
    """More arguments of the tracker, such as {name: first-try} for wandb."""


class Config(Section):
    """One training run."""

    model: NearbyName
    """The solver: a folder or a Hub name. This and all paths count from the YAML file."""
    output_dir: OutputPath
    """Where metrics, checkpoints and the report go."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in; the trained weights and the optimiser are float32 anyway."""
    adapter: AdapterConfig | None = None
    """Train LoRA adapters only; by default every weight learns."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more compute."""
    task: TaskConfig = ArithmeticTaskConfig()
    """Where the problems come from and who checks the answers."""
    method: MethodConfig = StepAlignMethod()
    """What the student learns from its attempts."""
    prompt: PromptConfig = PromptConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models live; `auto` takes a GPU when there is one."""
    shard: bool = False
    """Spread weights, gradients and optimiser states over the ranks of torchrun (FSDP2) instead of
    keeping all of them on each; one process alone has nobody to share with."""
    attention: Literal["auto", "loop", "flash", "flex"] = "auto"
    """Who computes it over shared prefixes; `selfdistill doctor` says what `auto` takes."""
    seed: Int = Field(default=0, ge=0)
    """Chooses the training problems and every sampled token."""
    steps: PositiveInt = 60
    """Training steps: each draws new rollouts."""
    prompts_per_step: PositiveInt = 8
    """Problems per training step."""
    tokens_per_microbatch: PositiveInt = 16384
    """Most packed tokens (student's and teacher's) of one forward and backward pass: memory follows
    it, the gradient of the step does not. A problem with more of them has a pass of its own."""
    updates_per_step: PositiveInt = 1
    """Optimiser updates on the rollouts of a step; after the first the student has moved on."""
    max_empty_steps: PositiveInt | None = 10
    """Stop when so many steps in a row taught nothing, such as those of a critic without a usable
    answer, or when no step of a run did; null goes on whatever happens."""
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    completions: CompletionsConfig | None = CompletionsConfig()
    """Keeps what the student wrote at each step; null keeps the figures alone."""
    trackers: tuple[TrackerConfig, ...] = ()
    """Who gets the figures of each step beside metrics.jsonl."""
    report: bool = True
    """End `selfdistill train` with a page of curves and settings (report/compare.html)."""

    @model_validator(mode="after")
    def _importance_weights_compare_like_with_like(self) -> Config:
        loss = getattr(self.method, "loss", None)
        if (
            loss is not None
            and loss.importance_clip is not None
            and loss.temperature != self.rollout.temperature
        ):
            raise ValueError(
                f"method.loss.importance_clip compares probabilities at the loss's temperature of "
                f"{loss.temperature} with those of sampling at {self.rollout.temperature}: set "
                "method.loss.temperature to rollout.temperature"
            )
        return self

    @model_validator(mode="after")
    def _engine_takes_the_adapter(self) -> Config:
        engine = self.rollout.engine
        if isinstance(engine, VLLMServerEngineConfig) and self.adapter is None:
            raise ValueError(
                "adapter: rollout.engine vllm_server hands servers a LoRA adapter, and this run "
                "trains whole weights, which vLLM's own transfer moves between GPUs only (NCCL, "
                "CUDA IPC): set adapter: {}, or rollout.engine.name: vllm"
            )
        if engine.name != "transformers" and self.adapter is not None:
            most = VLLM_ADAPTER_RANKS[-1]
            if self.adapter.r > most:
                raise ValueError(
                    f"adapter.r: got {self.adapter.r}, but vLLM takes adapters up to rank {most}: "
                    "set a smaller one, or rollout.engine.name: transformers"
                )
        return self

    @model_validator(mode="after")
    def _ranks_have_one_layout(self) -> Config:
        shares = getattr(self.rollout.engine, "tensor_parallel_size", 1) > 1
        critic = getattr(self.method, "critic", None)
        if shares and isinstance(getattr(critic, "engine", None), VLLMTextEngine):
            raise ValueError(
                "method.critic.engine: a process has its ranks in one layout for all engines of "
                "vLLM, and rollout.engine.tensor_parallel_size shares engines, where each rank "
                "would have a critic of its own: set method.critic.engine.name to transformers or "
                "server, or tensor_parallel_size to 1"
            )
        return self

    @model_validator(mode="after")
    def _older_rollouts_are_weighed(self) -> Config:
        if not getattr(self.rollout.engine, "max_staleness", 0):
            return self
        loss = getattr(self.method, "loss", None)
        if loss is not None and loss.importance_clip is None:
            raise ValueError(
                "rollout.engine.max_staleness: rollouts of the weights before need importance "
                "weights: set method.loss.importance_clip (such as 2), or max_staleness to 0"
            )
        if self.rollout.top_k or self.rollout.top_p < 1 or self.rollout.min_p:
            raise ValueError(
                "rollout.engine.max_staleness: with top_k, top_p or min_p importance weights need "
                "the share that was kept; vLLM does not say it, and the weights that could tell "
                "are gone: set them to 0, 1 and 0, or max_staleness to 0"
            )
        return self

    @model_validator(mode="after")
    def _refreshed_teacher_gets_to_teach(self) -> Config:
        teacher = self.method.teacher
        stalls = isinstance(teacher, RefreshedTeacherConfig) and teacher.every is None
        if stalls and self.evaluation.patience == 1:
            raise ValueError(
                "method.teacher: without `every` it is made anew after an evaluation that found "
                "nothing better, and evaluation.patience: 1 ends the run there: raise patience, or "
                "set `every`"
            )
        if isinstance(teacher, RefreshedTeacherConfig) and teacher.from_best:
            if (teacher.every or self.evaluation.every) % self.evaluation.every:
                raise ValueError(
                    f"method.teacher.every: got {teacher.every}, and with from_best the student "
                    "would go back from steps that nobody evaluated: set it to a multiple of "
                    f"evaluation.every ({self.evaluation.every})"
                )
            if getattr(self.rollout.engine, "max_staleness", 0):
                raise ValueError(
                    "method.teacher.from_best: rollouts that were drawn ahead are of weights that "
                    "the student leaves: set rollout.engine.max_staleness to 0"
                )
        return self

    @model_validator(mode="after")
    def _contrast_has_another_problem(self) -> Config:
        method = self.method
        is_alone = self.prompts_per_step == 1
        if isinstance(method, ContrastMethod) and method.against == "other" and is_alone:
            raise ValueError(
                "prompts_per_step: got 1, and method.against: other takes its critique from "
                "another problem of the step, so that no rollout could teach: set prompts_per_step "
                "to 2 or more, or method.against to wrong"
            )
        return self

    @model_validator(mode="after")
    def _task_has_what_the_method_needs(self) -> Config:
        method, task = self.method, self.task
        if isinstance(task, ArithmeticTaskConfig):
            return self
        if isinstance(getattr(method, "critic", None), ScribeCriticConfig):
            raise ValueError(
                "method.critic: the scribe writes steps of the arithmetic task only, and the task "
                f"is {task.name}: choose another critic or another method"
            )
        if isinstance(method, RefSolMethod) and not getattr(task, "reference", "its own"):
            raise ValueError(
                "task.reference: refsol shows the teacher the reference solutions, so name the "
                f"field of the {task.name} data that holds them"
            )
        return self
