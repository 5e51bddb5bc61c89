"""One typed configuration for a run: YAML in, YAML out.

Every section refuses unknown keys, and what belongs to one choice only (the critic of StepAlign,
the mixing weight of the Jensen-Shannon divergence) lives inside that choice, so that a combination
which means nothing cannot be written down.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from selfdistill.config_errors import describe_error
from selfdistill.runlog import write_atomically
from selfdistill.tasks.steps import STEP_INSTRUCTION
from selfdistill.yaml_text import YAMLTextError, read_yaml


class ConfigError(ValueError):
    """A configuration file that asks for something that does not exist."""


class Section(BaseModel):
    """A frozen group of settings; the string under a field says what the field does."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


def _no_boolean(value: Any) -> Any:
    """YAML reads yes, no, on and off as booleans, and Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("expected a number; yes, no, on and off are true and false")
    return value


# Every number of a configuration is one of these.
Int = Annotated[int, BeforeValidator(_no_boolean)]
Float = Annotated[float, BeforeValidator(_no_boolean)]
PositiveInt = Annotated[Int, Field(gt=0)]
Rate = Annotated[Float, Field(ge=0, le=1)]


def _next_to_file(name: str, info: ValidationInfo) -> str:
    """A name that exists next to the YAML file means that; every other stays as it is."""
    folder = (info.context or {}).get("folder")
    if folder is None or not (folder / name).exists():
        return name
    return str((folder / name).resolve())


def _a_path(name: str) -> str:
    if not name.strip() or "\0" in name:
        raise ValueError("expected a name or a path")
    return name


NearbyName = Annotated[str, AfterValidator(_a_path), AfterValidator(_next_to_file)]
OutputPath = Annotated[
    Path, BeforeValidator(lambda path: _a_path(path) if isinstance(path, str) else path)
]
# What a server and a chat template can be told; a date, say, would come back as a text.
JsonObject: TypeAlias = dict[str, JsonValue]


class ArithmeticTaskConfig(Section):
    """Chained arithmetic with an exact checker (embedded, needs no download)."""

    name: Literal["arithmetic"] = "arithmetic"
    step_counts: tuple[Annotated[Int, Field(ge=1, le=9)], ...] = Field(
        default=(4, 5, 6), min_length=1
    )
    """The numbers of operations that a question may have."""
    reference_dialect: Int = Field(default=0, ge=0, le=5)
    """The wording of the reference solutions; 0 is the shipped solver's usual one."""
    reference_order: Literal["question", "reversed"] = "question"
    """The order in which the reference solutions apply the operations; reversed is another path to
    the same answer."""
    predicted_success: tuple[Rate, Rate] | None = None
    """Only questions that the shipped solver is predicted to solve at a rate in [first, second)."""


class Shares(Section):
    """How large the splits are; a hash of its id decides where a problem belongs."""

    train: Float = Field(default=0.8, ge=0, le=1)
    """Share of the problems that are trained on."""
    dev: Float = Field(default=0.1, ge=0, le=1)
    """Share that chooses the checkpoint."""
    test: Float = Field(default=0.1, ge=0, le=1)
    """Share that is only looked at in the end."""

    @model_validator(mode="after")
    def _whole(self) -> Shares:
        total = self.train + self.dev + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, dev and test must sum to 1, got {total:g}")
        return self


Source = TypeVar("Source")


class NamedSplits(Section, Generic[Source]):
    """One source for each split; a problem that is in two of them is refused."""

    train: Source | None = None
    """What is trained on."""
    dev: Source | None = None
    """What chooses the checkpoint."""
    test: Source | None = None
    """What is only looked at in the end."""

    @model_validator(mode="after")
    def _some(self) -> NamedSplits[Source]:
        if self.train is None and self.dev is None and self.test is None:
            raise ValueError("expected at least one of train, dev and test")
        return self


class HashedSplits(Section, Generic[Source]):
    """One source, cut by a hash of the problems' ids."""

    all: Source
    """Where all problems are."""
    shares: Shares = Shares()


class DatasetTaskConfig(Section):
    """Problems with known final answers, of a file or a data set."""

    question: str = "question"
    """The field that holds the question."""
    answer: str = "answer"
    """The field that holds the final answer, alone."""
    reference: str | None = None
    """The field that holds a complete solution; only what shows it to the teacher needs one."""
    id: str | None = None
    """The field that holds a unique identifier; by default the hash of the question is one."""
    where: dict[str, str | int | float | bool] = {}
    """Keeps the rows whose fields have these values, such as {problem_type: algebra}."""
    limit: PositiveInt | None = None
    """Reads at most so many distinct problems from each source."""
    instruction: str = STEP_INSTRUCTION
    """Said after each question, to student and teacher alike: how to write steps and answer."""
    checker: Literal["auto", "math-verify", "plain"] = "auto"
    """Compares answers: math-verify, or plain numbers and strings; auto takes what is there."""
    checker_seconds: Float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Most time for comparing the answers of one step, or of 16 problems of an evaluation. What is
    not decided by then counts as wrong (`undecided` in the metrics)."""


class JsonlTaskConfig(DatasetTaskConfig):
    """Problems in files with one JSON object a line."""

    name: Literal["jsonl"] = "jsonl"
    splits: NamedSplits[NearbyName] | HashedSplits[NearbyName]
    """The files, one for each split (train, dev, test) or one for `all`; in a YAML file they may be
    relative to that file."""


class HubTaskConfig(DatasetTaskConfig):
    """Problems of a data set of the Hugging Face Hub, or of one in a local folder."""

    name: Literal["hub"] = "hub"
    path: NearbyName
    """The data set's name on the Hub, or a folder: one that `save_to_disk` wrote, or of data files
    that the datasets library reads."""
    config: str | None = None
    """Which configuration of the data set, where it has several."""
    revision: str | None = None
    """Which commit or tag; name one, and the problems can never change."""
    streaming: bool = False
    """Reads rows over the network as they are needed (see `limit`) and keeps nothing on disk."""
    splits: NamedSplits[str] | HashedSplits[str]
    """Splits of the data set: one for each of train, dev, test, or one for `all`."""


def _arithmetic_unless_named(task: Any) -> Any:
    return {"name": "arithmetic", **task} if isinstance(task, dict) else task


TaskConfig = Annotated[
    Annotated[ArithmeticTaskConfig | JsonlTaskConfig | HubTaskConfig, Field(discriminator="name")],
    BeforeValidator(_arithmetic_unless_named),
]


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
    beta: Float = Field(default=0.5, ge=0, le=1)
    """The teacher's share of the mixture m; 0 is defined as forward KL and 1 as reverse KL."""


class SkewKL(Section):
    """KL(teacher || m), m = beta teacher + (1 - beta) student: bounded where the student has none.

    DistiLLM (arXiv 2402.03898).
    """

    name: Literal["skew_kl"] = "skew_kl"
    beta: Float = Field(default=0.1, gt=0, lt=1)
    """The teacher's share of the mixture m."""


class SkewReverseKL(Section):
    """KL(student || m), m = beta teacher + (1 - beta) student."""

    name: Literal["skew_reverse_kl"] = "skew_reverse_kl"
    beta: Float = Field(default=0.9, gt=0, lt=1)
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

    threshold: Float = Field(default=0.0, ge=0)
    """Tokens with |A| at or below it get no gradient."""
    sign: Literal["any", "positive", "negative"] = "any"
    """Keep both signs, only tokens the teacher prefers, or only tokens the teacher rejects."""
    top_fraction: Float | None = Field(default=None, gt=0, le=1)
    """Of the tokens left, keep those with the largest |A|: this share of each rollout's tokens."""
    per_step: bool = False
    """Judge whole steps by their mean A; tokens of no step are dropped. Needs a task with steps."""


class LossConfig(Section):
    """The loss on the completion tokens, averaged over the training step."""

    objective: ObjectiveConfig = ForwardKL()
    """Which divergence between the teacher's and the student's next-token distributions."""
    advantage_mask: AdvantageMaskConfig | None = None
    """Restricts the gradient to some tokens; the dropped ones stay in the denominator."""
    temperature: Float = Field(default=1.0, gt=0)
    """Divides both models' logits before the divergence."""
    reduction: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every token counts the same, or every rollout (the mean of its tokens) does."""
    top_k: TopKConfig | None = None
    """Restricts the divergence to the most likely tokens; null compares the whole vocabulary."""
    token_clip: Float | None = Field(default=None, gt=0)
    """A token's divergence counts at most this much (nats); beyond it has no gradient."""
    importance_clip: Float | None = Field(default=None, gt=0)
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


class EmaTeacherConfig(Section):
    """The exponential moving average of the trained weights, moved after every optimiser step."""

    name: Literal["ema"] = "ema"
    decay: Float = Field(default=0.99, gt=0, lt=1)
    """How much of the average stays in one step."""


TeacherConfig = Annotated[
    BaseTeacherConfig | LiveTeacherConfig | EmaTeacherConfig, Field(discriminator="name")
]


class ScribeCriticConfig(Section):
    """The exact scribe of the arithmetic task, which never errs."""

    name: Literal["scribe"] = "scribe"
    copying: Literal["partial_repetition", "full_repetition", "omission"] = "partial_repetition"
    """What it repeats of an attempt: up to the first wrong step, that step too, or nothing."""


# Ranks that vLLM makes room for; an adapter may have any up to the last.
VLLM_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class VLLMSettings(Section):
    """What any vLLM engine needs to know; it runs in the trainer's own process, on its device."""

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of its weights and its cache."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its completion, which must fit into the cache; by default what
    the model has positions for."""
    kv_cache_gib: Float = Field(default=4.0, gt=0)
    """Memory for keys and values, shared by all sequences that are sampled at once."""
    block_size: Int = Field(default=32, gt=0, multiple_of=32)
    """Tokens of a cache block, a multiple of 32 (smaller ones run on GPUs only): only whole blocks
    of a prompt are shared between its rollouts."""
    enforce_eager: bool = False
    """No compilation and no CUDA graphs: starts in seconds, samples more slowly on a GPU."""


class TextEngine(Section):
    """What all engines that answer prompts have in common."""

    model: str
    """A folder or a Hub name; for a server, what it calls the model."""
    max_new_tokens: PositiveInt = 4096
    """Answers are cut off at this length, think part included."""
    cache: Path | None = None
    """A folder that keeps the answers, so that nothing is asked twice; runs may share it."""


class LocalTextEngine(TextEngine):
    """What the engines of the trainer's own process have in common."""

    chat_template: NearbyName | None = None
    """A file with the Jinja template to use instead of the tokenizer's own."""
    template: JsonObject = {}
    """More variables for the chat template, such as {enable_thinking: true}."""


class TransformersTextEngine(LocalTextEngine):
    """A model in the trainer's process, read by transformers."""

    name: Literal["transformers"] = "transformers"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of its weights."""
    batch_size: PositiveInt = 16
    """Prompts answered at once."""


class VLLMTextEngine(VLLMSettings, LocalTextEngine):
    """A model in the trainer's process, read by vLLM."""

    name: Literal["vllm"] = "vllm"


class ServerTextEngine(TextEngine):
    """A model behind an OpenAI-compatible server."""

    name: Literal["server"] = "server"
    base_url: str = Field(pattern=r"^https?://[^/]")
    """Up to and with /v1, such as http://localhost:8000/v1; a redirect is not followed."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable that holds the key, if the server wants one."""
    timeout: Float = Field(default=600.0, gt=0)
    """Seconds without a byte from the server before a request counts as failed."""
    total_timeout: Float = Field(default=3600.0, gt=0)
    """Seconds that a request may take in all, whatever trickles in."""
    retries: Int = Field(default=5, ge=0)
    """How often a request is sent again when the server is busy, away or silent."""
    backoff: Float = Field(default=1.0, ge=0)
    """Seconds before the first retry; each further one waits twice as long, at most a minute."""
    concurrency: PositiveInt = 16
    """Requests under way at once."""
    extra_body: JsonObject = {}
    """More fields of the request, such as {chat_template_kwargs: {enable_thinking: true}}, or for
    vLLM {skip_special_tokens: false}, where the tags of its answer are special tokens."""


TextEngineConfig = Annotated[
    TransformersTextEngine | VLLMTextEngine | ServerTextEngine, Field(discriminator="name")
]


class LLMCriticConfig(Section):
    """A frozen language model as the scribe, for any task."""

    name: Literal["llm"] = "llm"
    engine: TextEngineConfig
    """Which model, and where it runs."""
    show_reference: bool = False
    """Show the critic the reference solution, where the problem has one."""
    check_answer: bool = True
    """Refuse a critique whose own final answer the task's checker finds wrong."""
    fallback: Literal["drop", "reference"] = "drop"
    """For a rollout without a usable critique: leave it out, or show the teacher the reference."""


CriticConfig = Annotated[ScribeCriticConfig | LLMCriticConfig, Field(discriminator="name")]


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
    group_size: Int = Field(default=8, ge=2)
    """Rollouts drawn for each prompt."""


class EnvironmentMethod(Distillation):
    """The teacher sees what the task's checker says about the student's attempt."""

    name: Literal["environment"] = "environment"
    detail: Literal["answer", "step"] = "answer"
    """Tell whether the answer is right, or also which step is the first wrong one."""


class KLPenaltyConfig(Section):
    """Keeps the student near the model as it was before training."""

    coefficient: Float = Field(default=0.04, gt=0)
    """Weight of the penalty; the default is that of arXiv 2402.03300."""


class GRPOMethod(Section):
    """GRPO: no teacher; the binary rewards of a prompt's rollouts are compared with each other."""

    name: Literal["grpo"] = "grpo"
    group_size: Int = Field(default=8, ge=2)
    """Rollouts drawn for each prompt."""
    normalize_std: bool = True
    """Divide the advantage r - mean(r) by the group's standard deviation; false: Dr. GRPO."""
    clip_low: Float = Field(default=0.2, gt=0, lt=1)
    """A token's probability may fall to (1 - clip_low) of what it was when it was sampled."""
    clip_high: Float = Field(default=0.2, gt=0)
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
    """Samples from the weights that are trained; with `shard` from a copy that follows them."""

    name: Literal["transformers"] = "transformers"
    batch_size: PositiveInt = 256
    """Rows sampled at once (whole groups); bounds the memory of the key/value cache."""


class VLLMEngineConfig(VLLMSettings):
    """vLLM with weights of its own, which follow the student's after every step."""

    name: Literal["vllm"] = "vllm"
    check_every: PositiveInt = 1
    """Compare the engine's log-probs with the trainer's own float32 ones every so many steps."""
    tolerance: Float | None = Field(default=None, gt=0)
    """Largest difference that is allowed, in nats; by default 1e-4 in float32, 1 in bfloat16."""


EngineConfig = Annotated[TransformersEngineConfig | VLLMEngineConfig, Field(discriminator="name")]


class PromptConfig(Section):
    """How questions and contexts become prompts, through the tokenizer's chat template."""

    chat_template: NearbyName | None = None
    """A file with the Jinja template to use instead of the tokenizer's own, which a base model does
    not have; in a YAML file it may be relative to that file."""
    date: datetime.date | None = None
    """The day that chat templates write which write one; by default that of the run's first start,
    which it keeps, so that its prompts stay the same."""
    student_template: JsonObject = {}
    """More variables for the student's chat template, such as {enable_thinking: false}."""
    teacher_template: JsonObject = {}
    """The same for the teacher."""
    max_length: PositiveInt | None = None
    """Most tokens of a prompt and its completion; by default what the model has positions for."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a rollout whose prompts do not fit: stop, or leave it out and count it."""


class RolloutConfig(Section):
    """How the student's attempts are sampled, in training and in evaluation alike."""

    temperature: Float = Field(default=1.0, gt=0)
    """Softmax temperature of sampling."""
    max_new_tokens: PositiveInt = 128
    """Completions are cut off at this length."""
    engine: EngineConfig = TransformersEngineConfig()
    """What samples."""


class AdapterConfig(Section):
    """LoRA adapters (peft) on a frozen model; no dropout, which would make the teacher disagree."""

    r: PositiveInt = 16
    """The rank."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = (
        "all-linear"
    )
    """Names of the layers; by default every linear one but the lm_head, which stays frozen."""


Decay = Annotated[Float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW with a linear warm-up to a constant learning rate."""

    learning_rate: Float = Field(default=1e-4, gt=0)
    """The rate after warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of AdamW's running means of the gradient and of its square."""
    weight_decay: Float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    warmup_steps: Int = Field(default=10, ge=0)
    """Step i of the warm-up runs at i / warmup_steps of the rate."""
    max_grad_norm: Float = Field(default=1.0, gt=0)
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

    model: NearbyName
    """The solver: a folder or a Hub name. In a YAML file a folder may be relative to that file."""
    output_dir: OutputPath
    """Where metrics, checkpoints and the report go; relative to the working directory."""
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
        if isinstance(self.rollout.engine, VLLMEngineConfig) and self.adapter is not None:
            most = VLLM_ADAPTER_RANKS[-1]
            if self.adapter.r > most:
                raise ValueError(
                    f"adapter.r: got {self.adapter.r}, but vLLM takes adapters up to rank {most}: "
                    "set a smaller one, or rollout.engine.name: transformers"
                )
        return self

    @model_validator(mode="after")
    def _task_has_what_the_method_needs(self) -> Config:
        method, task = self.method, self.task
        if isinstance(task, ArithmeticTaskConfig):
            return self
        if isinstance(method, StepAlignMethod) and isinstance(method.critic, ScribeCriticConfig):
            raise ValueError(
                "method.critic: the scribe writes steps of the arithmetic task only, and the task "
                f"is {task.name}: choose another critic or another method"
            )
        if isinstance(method, RefSolMethod) and task.reference is None:
            raise ValueError(
                "task.reference: refsol shows the teacher the reference solutions, so name the "
                f"field of the {task.name} data that holds them"
            )
        return self


def load_config(path: Path) -> Config:
    """Read a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not a YAML mapping, or asks for something that does not exist; the
            message has a line for every setting that is wrong, which names file and line.
    """
    try:
        document = read_yaml(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    except YAMLTextError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document.data, dict):
        raise ConfigError(
            f"{path} must hold a mapping of settings, got {type(document.data).__name__}"
        )
    try:
        return Config.model_validate(document.data, context={"folder": path.parent})
    except ValidationError as error:
        wrong = []
        for each in error.errors():
            line = document.line(each["loc"])
            place = f"{path}, line {line}" if line else f"{path}"
            wrong.append(f"{place}: {describe_error(each, Config)}")
        raise ConfigError("\n".join(wrong)) from error


def save_config(config: Config, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, text)
