"""Which loss is computed per token, and what it needs (math.md: gradient table)."""

from __future__ import annotations

from dataclasses import dataclass

# The numbers are shared with csrc/divergence.h.
DIVERGENCES: dict[str, int] = {
    "none": 0,
    "forward_kl": 1,
    "reverse_kl": 2,
    "jsd": 3,
    "skew_kl": 4,
    "skew_reverse_kl": 5,
}


@dataclass(frozen=True)
class Objective:
    """The loss of one token, a sum of terms (T = teacher, S = student, y = sampled token).

        divergence + policy_gradient * (-A log S(y)) + cross_entropy * (-log S(y)) + entropy * H(S)

    with the advantage A = log T(y) - log S(y) taken as a constant (arXiv 2606.11173). With
    `importance_clip` the sum is multiplied by min(S(y) / S_old(y), importance_clip), also constant.

    Attributes:
        divergence: one of
            "forward_kl" KL(T||S), "reverse_kl" KL(S||T),
            "jsd" beta KL(T||m) + (1-beta) KL(S||m) with m = (1-beta) S + beta T, where beta = 0 is
            defined as forward KL and beta = 1 as reverse KL (GKD, arXiv 2306.13649),
            "skew_kl" KL(T||m) and "skew_reverse_kl" KL(S||m) with m = beta T + (1-beta) S
            (DistiLLM, arXiv 2402.03898), or "none".
        beta: interpolation of the last three, in [0, 1].
        policy_gradient: weight of the sampled-token policy gradient term.
        cross_entropy: weight of the negative log-likelihood of the target.
        entropy: weight of the student's entropy in the loss; negative for an entropy bonus.
        divergence_clip: a token's divergence counts at most this much (nats); clipped tokens get no
            gradient from it. None: no limit.
        entry_clip: each vocabulary entry's part of a token's divergence counts at most this much
            (nats), before the parts are summed: sum_v min(f_v, entry_clip), as in OPSD (its
            jsd_token_clip). Unlike `divergence_clip`, which drops a whole token, it takes single
            entries out of the gradient and keeps the others; the sum may be negative, and its
            gradient may point away from the teacher (docs/objectives.md). None: no limit.
        top_k: compare the distributions on the k most likely entries only, the others summed up in
            one bucket; None: on the whole vocabulary. Statistics besides the divergence stay exact.
        top_k_of: whose most likely entries, "student" or "teacher".
        tail: False leaves the bucket of the others out and normalises the k entries instead.
        importance_clip: largest importance weight of tokens that an older policy sampled; needs
            `old_logprobs`. None: no weight.

    Raises:
        ValueError: unknown divergence, beta outside [0, 1], a clip <= 0, top_k < 1, entry_clip or
            top_k without a divergence, or no term at all.
    """

    divergence: str = "forward_kl"
    beta: float = 0.5
    policy_gradient: float = 0.0
    cross_entropy: float = 0.0
    entropy: float = 0.0
    divergence_clip: float | None = None
    importance_clip: float | None = None
    top_k: int | None = None
    top_k_of: str = "student"
    tail: bool = True
    entry_clip: float | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"objective: unknown divergence {self.divergence!r}; "
                f"expected one of {', '.join(DIVERGENCES)}"
            )
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"objective: beta must lie in [0, 1], got {self.beta}")
        for name in ("divergence_clip", "entry_clip", "importance_clip"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"objective: {name} must be > 0 or None, got {value}")
        if self.top_k_of not in ("student", "teacher"):
            raise ValueError(
                f"objective: top_k_of must be 'student' or 'teacher', got {self.top_k_of!r}"
            )
        if self.top_k is not None and (self.top_k < 1 or self.divergence == "none"):
            raise ValueError(
                "objective: top_k must be at least 1 and needs a divergence, got "
                f"{self.top_k} with divergence {self.divergence!r}"
            )
        if self.entry_clip is not None and self.divergence == "none":
            raise ValueError(
                "objective: entry_clip limits the entries of a divergence, got divergence 'none'; "
                "name one, or leave entry_clip out"
            )
        if self.divergence == "none" and not (
            self.policy_gradient or self.cross_entropy or self.entropy
        ):
            raise ValueError(
                'objective: divergence "none" needs a non-zero policy_gradient, cross_entropy '
                "or entropy weight"
            )

    @classmethod
    def of(cls, objective: str | Objective) -> Objective:
        """Accept a divergence name, "policy_gradient", "cross_entropy", or an Objective.

        Raises:
            ValueError: unknown name.
            TypeError: neither a string nor an Objective.
        """
        if isinstance(objective, Objective):
            return objective
        if not isinstance(objective, str):
            raise TypeError(
                f"objective: expected a str or an Objective, got {type(objective).__name__}"
            )
        if objective == "policy_gradient":
            return cls(divergence="none", policy_gradient=1.0)
        if objective == "cross_entropy":
            return cls(divergence="none", cross_entropy=1.0)
        if objective not in DIVERGENCES or objective == "none":
            names = [name for name in DIVERGENCES if name != "none"]
            raise ValueError(
                f"objective: unknown name {objective!r}; expected one of "
                f"{', '.join([*names, 'policy_gradient', 'cross_entropy'])} or an Objective"
            )
        return cls(divergence=objective)

    @property
    def kernel_divergence(self) -> str:
        """The divergence with the end points of beta replaced by what they are.

        jsd: by definition (GKD). skew: m = S at beta = 0 and m = T at beta = 1, so that one end is
        a plain KL and the other compares a distribution with itself.
        """
        ends = {
            "jsd": ("forward_kl", "reverse_kl"),
            "skew_kl": ("forward_kl", "none"),
            "skew_reverse_kl": ("none", "reverse_kl"),
        }
        if self.divergence in ends and self.beta in (0.0, 1.0):
            return ends[self.divergence][int(self.beta)]
        return self.divergence

    @property
    def terms(self) -> tuple[bool, bool, bool]:
        """Whether the loss has a divergence, a multiple of log S(y), the student's entropy."""
        likelihood = bool(self.policy_gradient or self.cross_entropy)
        return self.divergence != "none", likelihood, bool(self.entropy)

    @property
    def needs_targets(self) -> bool:
        """True when a term is defined by the sampled token."""
        return bool(self.policy_gradient or self.cross_entropy or self.importance_clip)

    @property
    def needs_statistics_first(self) -> bool:
        """True when a token's weight depends on its own statistics."""
        return self.divergence_clip is not None or self.importance_clip is not None
