"""Sections of the distillation loss: which divergence, on which tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfdistill.config.section import Float, PositiveInt, Rate, Section


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


class TokenSelectionConfig(Section):
    """Which tokens learn, chosen by what the student is unsure of (TIP, arXiv 2604.14084)."""

    rule: Literal["entropy", "confident"]
    """`entropy`: where the student's entropy is highest; the others are not compared with the
    teacher. `confident`: of the half where it is lowest, where the divergence is largest."""
    share: Float = Field(gt=0, le=1)
    """This share of each rollout's tokens."""


class LinearWeight(Section):
    """From one weight to another in a straight line, then constant."""

    name: Literal["linear"] = "linear"
    first: Float = Field(default=1.0, ge=0)
    """Weight of a rollout's first token."""
    last: Float = Field(default=0.0, ge=0)
    """Weight from the token number `over` on."""
    over: PositiveInt
    """Tokens from the one to the other."""


class ExponentialWeight(Section):
    """1 for the first token, and falling towards a floor."""

    name: Literal["exponential"] = "exponential"
    half_life: Float = Field(gt=0)
    """Tokens over which what lies above the floor halves."""
    floor: Rate = 0.0
    """What it falls towards."""


class TableWeight(Section):
    """Weights from a table, such as how often the teacher was right at that place before."""

    name: Literal["table"] = "table"
    weights: tuple[Annotated[Float, Field(ge=0)], ...] = Field(min_length=1)
    """One for each stretch of tokens; the last one is for all tokens behind, too."""
    every: PositiveInt
    """Tokens of a stretch."""


PositionWeightConfig = Annotated[
    LinearWeight | ExponentialWeight | TableWeight, Field(discriminator="name")
]


class LossConfig(Section):
    """The loss on the completion tokens, averaged over the training step."""

    objective: ObjectiveConfig = ForwardKL()
    """Which divergence between the teacher's and the student's next-token distributions."""
    advantage_mask: AdvantageMaskConfig | None = None
    """Restricts the gradient to some tokens; the dropped ones stay in the denominator."""
    token_selection: TokenSelectionConfig | None = None
    """Restricts loss and gradient to some tokens; the dropped ones stay in the denominator."""
    position_weight: PositionWeightConfig | None = None
    """Weighs each token by its place in its rollout; the denominator still counts tokens."""
    temperature: Float = Field(default=1.0, gt=0)
    """Divides both models' logits before the divergence."""
    teacher_temperature: Float = Field(default=1.0, gt=0)
    """Divides the teacher's logits besides: below 1 the teacher is surer than the solver is, and a
    student that answers at temperature 1 learns to answer as if sampled at a lower one."""
    reduction: Literal["mean", "sequence_mean"] = "mean"
    """Every token counts the same, or every rollout (the mean of its tokens) does."""
    top_k: TopKConfig | None = None
    """Restricts the divergence to the most likely tokens; null compares the whole vocabulary."""
    divergence_clip: Float | None = Field(default=None, gt=0)
    """A token's divergence counts at most this much (nats); beyond it has no gradient."""
    entry_clip: Float | None = Field(default=None, gt=0)
    """A single vocabulary entry's part of a token's divergence counts at most this much (nats).

    OPSD's 0.05. Clipped entries get no gradient of their own, the token's others keep theirs; the
    loss may be negative, and its gradient may turn round (docs/objectives.md).
    """
    importance_clip: Float | None = Field(default=None, gt=0)
    """Weighs each token by how much likelier it has become since it was sampled, at most by this.

    Matters from the second update on (`updates_per_step`) or with an engine that samples from other
    numbers. Needs `temperature` to be that of the rollouts.
    """
    gradient_tolerance: Annotated[Float, Field(gt=0, lt=1)] | Literal["rounding"] | None = None
    """Relative standard error that a token's gradient may have, on a CPU; null: an exact one."""
    stop_after_first_wrong_step: bool = False
    """Cut a rollout behind its first wrong step: what follows stands on a false result.

    The rest is neither read nor counted. Needs a task that knows steps.
    """

    @model_validator(mode="after")
    def _some_place_has_a_weight(self) -> LossConfig:
        weight = self.position_weight
        linear = isinstance(weight, LinearWeight) and not (weight.first or weight.last)
        if linear or (isinstance(weight, TableWeight) and not any(weight.weights)):
            raise ValueError("position_weight: all weights are 0, so that nothing would be learned")
        return self

    @model_validator(mode="after")
    def _the_tolerance_is_of_whole_vocabularies(self) -> LossConfig:
        if self.top_k is not None and self.gradient_tolerance is not None:
            raise ValueError(
                "gradient_tolerance: the most likely tokens alone (top_k) have the exact gradient "
                "only: set one of the two to null"
            )
        if self.token_selection is not None and self.advantage_mask is not None:
            raise ValueError(
                "token_selection chooses tokens, and so does advantage_mask: set one of the two to "
                "null"
            )
        if self.entry_clip is not None and self.gradient_tolerance is not None:
            raise ValueError(
                "gradient_tolerance: clipped entries (entry_clip) have the exact gradient only: "
                "set one of the two to null"
            )
        return self
