"""Sections of methods, with their teachers and critics."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from selfdistill.config.engines import TextEngineConfig
from selfdistill.config.losses import LossConfig
from selfdistill.config.section import Float, Int, PositiveInt, Rate, Section


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


class RefreshedTeacherConfig(Section):
    """The student as it was at the last refresh, at first the base model; fixed in between."""

    name: Literal["refreshed"] = "refreshed"
    every: PositiveInt | None = None
    """Steps between refreshes; null refreshes after an evaluation that was no better than the best
    one before it: then the student has learned what this teacher knows. Those count for
    `evaluation.patience` all the same."""
    from_best: bool = False
    """At a refresh the student, too, goes back to the best checkpoint so far, with its optimiser's
    moments, and that one teaches. The step, and with it the learning rate, goes on."""


TeacherConfig = Annotated[
    BaseTeacherConfig | LiveTeacherConfig | EmaTeacherConfig | RefreshedTeacherConfig,
    Field(discriminator="name"),
]


class ScribeCriticConfig(Section):
    """The exact scribe of the arithmetic task."""

    name: Literal["scribe"] = "scribe"
    copying: Literal["partial_repetition", "full_repetition", "omission"] = "partial_repetition"
    """What it repeats of an attempt: up to the first wrong step, that step too, or nothing."""
    error_rate: Rate = 0.0
    """The share of critiques with a wrong step, from whose result they go on; 0 never errs."""

    @model_validator(mode="after")
    def _errors_are_of_whole_critiques(self) -> ScribeCriticConfig:
        if self.error_rate and self.copying != "partial_repetition":
            raise ValueError(
                "error_rate is for critiques that repeat partially, and copying is "
                f"{self.copying}: set one of the two to its default"
            )
        return self


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


class KLPenaltyConfig(Section):
    """Keeps the student near the model as it was before training."""

    coefficient: Float = Field(default=0.04, gt=0)
    """Weight of the penalty; the default is that of arXiv 2402.03300."""


class ClippedRatio(Section):
    """What every policy gradient has: bounds on how far one step's rollouts move a token."""

    clip_low: Float = Field(default=0.2, gt=0, lt=1)
    """A token's probability may fall to (1 - clip_low) of what it was when it was sampled."""
    clip_high: Float = Field(default=0.2, gt=0)
    """It may rise to (1 + clip_high) of it. Both matter from the second update on."""


class GroupRewards(ClippedRatio):
    """GRPO's policy gradient of the group's rewards, beside the divergence from the teacher."""

    coefficient: Float = Field(default=1.0, gt=0)
    """Weight of the policy gradient; the divergence has the weight 1."""
    normalize_std: bool = True
    """Divide the advantage r - mean(r) by the group's standard deviation; false: Dr. GRPO."""


class Distillation(Section):
    """What the methods that follow a self-teacher have in common."""

    name: str = "distillation"
    """Which method; each has its own."""
    group_size: PositiveInt = 8
    """Rollouts drawn for each prompt."""
    teacher: TeacherConfig = BaseTeacherConfig()
    """Whose weights the self-teacher uses."""
    loss: LossConfig = LossConfig()
    """How the student follows the teacher."""
    reward: GroupRewards | None = None
    """Learns from rewards as well, from the same rollouts: GRPO and self-distillation in one loss.

    A rollout that the teacher has no context for then learns from its reward alone.
    """

    @model_validator(mode="after")
    def _rewards_are_compared_within_a_group(self) -> Distillation:
        if self.reward is not None and self.group_size < 2:
            raise ValueError(
                "reward: rewards are compared within a group, and group_size is 1: set group_size "
                "to 2 or more, or reward to null"
            )
        if self.reward is not None and self.loss.reduction != "mean":
            raise ValueError(
                "reward: the policy gradient is a mean over tokens, and loss.reduction is "
                f"{self.loss.reduction}: set it to mean, or reward to null"
            )
        return self


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


class PolicyGradient(ClippedRatio):
    """What the methods without a self-teacher have in common: tokens are weighed, not compared."""

    kl: KLPenaltyConfig | None = None
    """A penalty for leaving the base model; null reads no second model."""

    @property
    def teacher(self) -> BaseTeacherConfig | None:
        """Whose distance the KL penalty measures: the base model."""
        return None if self.kl is None else BaseTeacherConfig()


class GRPOMethod(PolicyGradient):
    """GRPO: no teacher; the binary rewards of a prompt's rollouts are compared with each other."""

    name: Literal["grpo"] = "grpo"
    group_size: Int = Field(default=8, ge=2)
    """Rollouts drawn for each prompt."""
    normalize_std: bool = True
    """Divide the advantage r - mean(r) by the group's standard deviation; false: Dr. GRPO."""


class WrongStepMethod(PolicyGradient):
    """No teacher: the tokens of the first wrong step, as a critic finds it, become less likely.

    All of them by one constant; right attempts, right steps and what follows teach nothing.
    """

    name: Literal["wrong_step"] = "wrong_step"
    group_size: PositiveInt = 8
    """Rollouts drawn for each prompt."""
    penalty: Float = Field(default=1.0, gt=0)
    """The advantage of these tokens is minus this. Of all other tokens it is 0."""
    critic: CriticConfig = ScribeCriticConfig()
    """Who says which step is the first wrong one."""

    @model_validator(mode="after")
    def _nobody_reads_the_critique(self) -> WrongStepMethod:
        _refuse_fallback(self.critic, "nobody reads a solution there")
        if isinstance(self.critic, ScribeCriticConfig) and (
            self.critic.copying != "partial_repetition"
        ):
            raise ValueError(
                f"critic.copying: only the place of the wrong step counts, not what is written: "
                f"leave {self.critic.copying} out"
            )
        if isinstance(self.critic, ScribeCriticConfig) and self.critic.error_rate:
            raise ValueError(
                "critic.error_rate: only the place of the wrong step counts, and the scribe errs "
                "in what it writes, never there: leave it out"
            )
        return self


class ContrastMethod(ClippedRatio):
    """Sampled tokens are weighed by what a critique says beyond a critique that is of no use.

    A token's advantage is its log-prob under the teacher with the right critique, less that under
    the teacher with the other one.
    """

    name: Literal["contrast"] = "contrast"
    group_size: PositiveInt = 8
    """Rollouts drawn for each prompt."""
    teacher: TeacherConfig = BaseTeacherConfig()
    """Whose weights the self-teacher uses, with either critique."""
    critic: CriticConfig = ScribeCriticConfig()
    """Who writes the right critique of each rollout."""
    against: Literal["wrong", "other"] = "wrong"
    """The other critique: a wrong one of the same attempt, or that of an attempt at another problem
    of the step, which then needs two (`prompts_per_step`)."""
    weight: Float = Field(default=1.0, gt=0, le=1)
    """How much of the other's log-prob is subtracted; the rest to 1 is the student's own."""

    @model_validator(mode="after")
    def _critiques_are_compared_with_critiques(self) -> ContrastMethod:
        _refuse_fallback(self.critic, "a critique is compared with another one")
        return self


def _refuse_fallback(critic: LLMCriticConfig | ScribeCriticConfig, why: str) -> None:
    if isinstance(critic, LLMCriticConfig) and critic.fallback != "drop":
        raise ValueError(f"critic.fallback: {why}, so set it to drop")


DistillationMethod: TypeAlias = StepAlignMethod | RefSolMethod | PeerMethod | EnvironmentMethod
MethodConfig = Annotated[
    DistillationMethod | GRPOMethod | WrongStepMethod | ContrastMethod,
    Field(discriminator="name"),
]
