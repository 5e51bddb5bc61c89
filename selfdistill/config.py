"""One typed configuration for a run: YAML in, YAML out.

Every section refuses unknown keys, and what belongs to one choice only (the critic of StepAlign,
the mixing weight of the Jensen-Shannon divergence) lives inside that choice, so that a combination
which means nothing cannot be written down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator


class ConfigError(ValueError):
    """A configuration file that asks for something that does not exist."""


class Section(BaseModel):
    """A frozen group of settings; the string under a field says what the field does."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )


Rate = Annotated[float, Field(ge=0, le=1)]


class ArithmeticTask(Section):
    """Chained arithmetic with an exact checker (embedded, needs no download)."""

    name: Literal["arithmetic"] = "arithmetic"
    step_counts: tuple[Annotated[int, Field(ge=1, le=9)], ...] = Field(
        default=(4, 5, 6), min_length=1
    )
    """The numbers of operations that a question may have."""
    reference_dialect: int = Field(default=0, ge=0, le=5)
    """The wording of the reference solutions; 0 is the shipped solver's usual one."""
    predicted_success: tuple[Rate, Rate] | None = None
    """Only questions that the shipped solver is predicted to solve at a rate in [first, second)."""


class ForwardKL(Section):
    """KL(teacher || student): the student covers all that the teacher considers likely."""

    name: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Section):
    """KL(student || teacher): the student drops what the teacher considers unlikely."""

    name: Literal["reverse_kl"] = "reverse_kl"


class GeneralizedJSD(Section):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student.

    GKD (arXiv 2306.13649).
    """

    name: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, ge=0, le=1)
    """The teacher's share of the mixture m; 0 is defined as forward KL and 1 as reverse KL."""


class SkewKL(Section):
    """KL(teacher || m), m = beta teacher + (1 - beta) student: bounded where the student has none.

    DistiLLM (arXiv 2402.03898).
    """

    name: Literal["skew_kl"] = "skew_kl"
    beta: float = Field(default=0.1, gt=0, lt=1)
    """The teacher's share of the mixture m."""


class SkewReverseKL(Section):
    """KL(student || m), m = beta teacher + (1 - beta) student."""

    name: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    beta: float = Field(default=0.9, gt=0, lt=1)
    """The teacher's share of the mixture m."""


ObjectiveConfig = Annotated[
    ForwardKL | ReverseKL | GeneralizedJSD | SkewKL | SkewReverseKL, Field(discriminator="name")
]


class TopKConfig(Section):
    """Compares the distributions on the most likely tokens only, the others in one bucket."""

    k: PositiveInt
    """How many tokens, at most the vocabulary."""
    of: Literal["student", "teacher"] = "student"
    """Whose most likely tokens."""
    tail: bool = True
    """Keep the bucket of the others; false normalises the k tokens alone."""


class AdvantageMaskConfig(Section):
    """Which tokens learn, chosen by their advantage A = log p_teacher(y) - log p_student(y)."""

    threshold: float = Field(default=0.0, ge=0)
    """Tokens with |A| at or below it get no gradient."""
    sign: Literal["any", "positive", "negative"] = "any"
    """Keep both signs, only tokens the teacher prefers, or only tokens the teacher rejects."""
    top_fraction: float | None = Field(default=None, gt=0, le=1)
    """Of the tokens left, keep those with the largest |A|: this share of each rollout's tokens."""
    per_step: bool = False
    """Judge whole steps by their mean A; tokens of no step are dropped. Needs a task with steps."""


class LossConfig(Section):
    """The loss on the completion tokens, averaged over the training step."""

    objective: ObjectiveConfig = ForwardKL()
    """Which divergence between the teacher's and the student's next-token distributions."""
    advantage_mask: AdvantageMaskConfig | None = None
    """Restricts the gradient to some tokens; the dropped ones stay in the denominator."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits before the divergence."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every token counts the same, or every rollout (the mean of its tokens) does."""
    top_k: TopKConfig | None = None
    """Restricts the divergence to the most likely tokens; null compares the whole vocabulary."""
    token_clip: float | None = Field(default=None, gt=0)
    """A token's divergence counts at most this much (nats); beyond it has no gradient."""
    importance_clip: float | None = Field(default=None, gt=0)
    """Weighs each token by how much likelier it has become since it was sampled, at most by this.

    Matters from the second update on (`updates_per_step`) or with an engine that samples from other
    numbers. Needs `temperature` to be that of the rollouts.
    """
    stop_after_first_wrong_step: bool = False
    """Cut a rollout behind its first wrong step: what follows stands on a false result.

    The rest is neither read nor counted. Needs a task that knows steps.
    """


class BaseTeacherConfig(Section):
    """The fixed solver as it was before training, as in the paper: frozen, or adapters off."""

    name: Literal["base"] = "base"


class LiveTeacherConfig(Section):
    """The student's own weights of this step; shares the prompt's keys and values with it."""

    name: Literal["live"] = "live"


TeacherConfig = Annotated[BaseTeacherConfig | LiveTeacherConfig, Field(discriminator="name")]


class ScribeCriticConfig(Section):
    """The exact scribe of the arithmetic task, which never errs."""

    name: Literal["scribe"] = "scribe"
    copying: Literal["partial_repetition", "full_repetition", "omission"] = "partial_repetition"
    """What it repeats of an attempt: up to the first wrong step, that step too, or nothing."""


CriticConfig = ScribeCriticConfig


class Distillation(Section):
    """What the methods that follow a self-teacher have in common."""

    group_size: PositiveInt = 8
    """Rollouts drawn for each prompt."""
    teacher: TeacherConfig = BaseTeacherConfig()
    """Whose weights the self-teacher uses."""
    loss: LossConfig = LossConfig()
    """How the student follows the teacher."""


class StepAlignMethod(Distillation):
    """StepAlignFB: the teacher sees a critique aligned step by step with the student's attempt."""

    name: Literal["stepalign"] = "stepalign"
    critic: CriticConfig = ScribeCriticConfig()
    """Who writes the critique of each rollout."""


class RefSolMethod(Distillation):
    """RefSol: the teacher sees the complete reference solution of the problem."""

    name: Literal["refsol"] = "refsol"


class PeerMethod(Distillation):
    """The teacher sees another rollout of the same prompt that got the answer right."""

    name: Literal["peer"] = "peer"
    group_size: int = Field(default=8, ge=2)
    """Rollouts drawn for each prompt."""


class EnvironmentMethod(Distillation):
    """The teacher sees what the task's checker says about the student's attempt."""

    name: Literal["environment"] = "environment"
    detail: Literal["answer", "step"] = "answer"
    """Tell whether the answer is right, or also which step is the first wrong one."""


class KLPenaltyConfig(Section):
    """Keeps the student near the model as it was before training."""

    coefficient: float = Field(default=0.04, gt=0)
    """Weight of the penalty; the default is that of arXiv 2402.03300."""


class GRPOMethod(Section):
    """GRPO: no teacher; the binary rewards of a prompt's rollouts are compared with each other."""

    name: Literal["grpo"] = "grpo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts drawn for each prompt."""
    normalize_std: bool = True
    """Divide the advantage r - mean(r) by the group's standard deviation; false: Dr. GRPO."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """A token's probability may fall to (1 - clip_low) of what it was when it was sampled."""
    clip_high: float = Field(default=0.2, gt=0)
    """It may rise to (1 + clip_high) of it. Both matter from the second update on."""
    kl: KLPenaltyConfig | None = None
    """A penalty for leaving the base model; null reads no second model."""

    @property
    def teacher(self) -> BaseTeacherConfig | None:
        """The reference model of the KL penalty."""
        return None if self.kl is None else BaseTeacherConfig()


MethodConfig = Annotated[
    StepAlignMethod | RefSolMethod | PeerMethod | EnvironmentMethod | GRPOMethod,
    Field(discriminator="name"),
]


class TransformersEngineConfig(Section):
    """Samples from the very weights that are trained; nothing to synchronise."""

    name: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = 256
    """Rows sampled at once (whole groups); bounds the memory of the key/value cache."""


EngineConfig = TransformersEngineConfig


class PromptConfig(Section):
    """How questions and contexts become prompts, through the tokenizer's chat template."""

    student_template: dict[str, Any] = {}
    """More variables for the student's chat template, such as {enable_thinking: false}."""
    teacher_template: dict[str, Any] = {}
    """The same for the teacher."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its completion; by default what the model has positions for."""


class RolloutConfig(Section):
    """How the student's attempts are sampled, in training and in evaluation alike."""

    temperature: float = Field(default=1.0, gt=0)
    """Softmax temperature of sampling."""
    max_new_tokens: PositiveInt = 128
    """Completions are cut off at this length."""
    engine: EngineConfig = TransformersEngineConfig()
    """What samples."""


class OptimizerConfig(Section):
    """AdamW with a linear warm-up to a constant learning rate."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """The rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: int = Field(default=10, ge=0)
    """Step i of the warm-up runs at i / warmup_steps of the rate."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """The global gradient norm is clipped to this."""


class EvaluationConfig(Section):
    """Held-out evaluation during training; the best checkpoint is chosen by its Avg@k."""

    every: PositiveInt = 15
    """Evaluate after every so many steps, and once before the first and after the last."""
    problems: PositiveInt = 100
    """Problems of the dev split, the same ones each time."""
    samples: PositiveInt = 4
    """Attempts per problem: the k of Pass@k, Maj@k and Avg@k."""


class CheckpointConfig(Section):
    """What is kept on disk: the last finished state and the best one."""

    every: PositiveInt = 1
    """Write `last` after every so many steps; an interrupt (Ctrl-C) always writes it."""


class Config(Section):
    """One training run."""

    model: str
    """The solver: a folder or a Hub name. In a YAML file a folder may be relative to that file."""
    output_dir: Path
    """Where metrics, checkpoints and the report go; relative to the working directory."""
    task: ArithmeticTask = ArithmeticTask()
    """Where the problems come from and who checks the answers."""
    method: MethodConfig = StepAlignMethod()
    """What the student learns from its attempts."""
    prompt: PromptConfig = PromptConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the models live; `auto` takes a GPU when there is one."""
    seed: int = Field(default=0, ge=0)
    """Chooses the training problems and every sampled token."""
    steps: PositiveInt = 60
    """Training steps: each draws new rollouts."""
    prompts_per_step: PositiveInt = 8
    """Problems per training step."""
    prompts_per_microbatch: PositiveInt = 8
    """Problems scored at once: fewer need less memory, the gradient of the step stays the same."""
    updates_per_step: PositiveInt = 1
    """Optimiser updates on the rollouts of a step; after the first the student has moved on."""
    rollout: RolloutConfig = RolloutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

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


def load_config(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not a YAML mapping, or asks for something that does not exist; the
            message names the file and every field that is wrong.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    model = data.get("model")
    if isinstance(model, str) and (path.parent / model).is_dir():
        data["model"] = str((path.parent / model).resolve())
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        wrong = "\n".join(
            f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        )
        raise ConfigError(f"{path} is not a configuration:\n{wrong}") from error


def save_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    path.write_text(text, encoding="utf-8")
