"""What is compared: ways of training, how much is computed, and which arms make a fair pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Part: TypeAlias = Literal["rates", "main", "copy", "difficulty", "wording", "mechanisms"]


USUAL_DIALECT, RARE_DIALECT = 0, 5


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        milestones: steps after which a run is measured on test problems; the last one ends it.
        rate_steps: of the runs that choose a learning rate.
        rates: the learning rates that are tried.
        seeds: training seeds of the main table.
        side_seeds: of the copy and difficulty studies.
        wording_seeds: of the dialects between the usual and the rarest one.
        problems: held-out test problems of the main table.
        side_problems: of the other studies.
        samples: attempts at each of them.
        dev_problems, dev_samples: of the evaluations that choose a checkpoint or a rate.
        evaluate_every: steps between those.
        strata: ranges of the predicted success of the shipped solver.
        dialects: wordings of the reference between the usual and the rarest one.
        analysed: test problems and attempts at each whose wrong attempts are scored by token.
    """

    milestones: tuple[int, ...] = (20, 50)
    rate_steps: int = 30
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    side_seeds: tuple[int, ...] = (0, 1)
    wording_seeds: tuple[int, ...] = (0,)
    problems: int = 200
    side_problems: int = 100
    samples: int = 12
    dev_problems: int = 64
    dev_samples: int = 4
    evaluate_every: int = 10
    strata: tuple[tuple[float, float], ...] = ((0.0, 0.045), (0.08, 0.14), (0.3, 0.5))
    dialects: tuple[int, ...] = (1, 2, 3, 4)
    analysed: tuple[int, int] = (200, 6)


FULL = Scale()


QUICK = Scale(
    milestones=(10, 20),
    rate_steps=10,
    rates=(3e-4, 1e-3),
    seeds=(0,),
    side_seeds=(0,),
    problems=40,
    side_problems=30,
    samples=4,
    dev_problems=32,
    dev_samples=2,
    evaluate_every=5,
    strata=((0.0, 0.045), (0.3, 0.5)),
    dialects=(2,),
    analysed=(30, 2),
)


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        key: its folder's name.
        label: its name in tables.
        method: as in a configuration.
        dialect: the wording of the reference.
        prompts: a step.
    """

    key: str
    label: str
    method: dict[str, Any]
    dialect: int = USUAL_DIALECT
    prompts: int = 8

    @property
    def rollouts(self) -> int:
        """Attempts that one step learns from."""
        return self.prompts * int(self.method["group_size"])


def _stepalign(group_size: int, copying: str = "partial_repetition") -> dict[str, Any]:
    critic = {"name": "scribe", "copying": copying}
    return {"name": "stepalign", "group_size": group_size, "critic": critic}


def _refsol(group_size: int) -> dict[str, Any]:
    return {"name": "refsol", "group_size": group_size}


GRPO = Arm("grpo-8x8", "GRPO, 8 x 8", {"name": "grpo", "group_size": 8})


GRPO_FEW = Arm("grpo-1x8", "GRPO, 1 x 8", {"name": "grpo", "group_size": 8}, prompts=1)


_DISTILLATION = tuple(
    arm
    for size in (1, 8)
    for arm in (
        Arm(f"refsol-8x{size}", f"RefSol, usual wording, 8 x {size}", _refsol(size)),
        Arm(
            f"refsol-rare-8x{size}",
            f"RefSol, rare wording, 8 x {size}",
            _refsol(size),
            RARE_DIALECT,
        ),
        Arm(f"stepalign-8x{size}", f"StepAlignFB, 8 x {size}", _stepalign(size)),
    )
)


MAIN_ARMS: tuple[Arm, ...] = (GRPO, GRPO_FEW, *_DISTILLATION)


ARMS = {arm.key: arm for arm in MAIN_ARMS}


# What the other studies compare: self-distillation with one rollout a prompt, as in the paper.
SIDE_ARMS = (
    GRPO,
    GRPO_FEW,
    ARMS["refsol-8x1"],
    ARMS["refsol-rare-8x1"],
    ARMS["stepalign-8x1"],
)


@dataclass(frozen=True)
class Regime:
    """Which arms make a fair comparison, and what is equal between them."""

    name: str
    grpo: Arm
    refsol: Arm
    refsol_rare: Arm
    stepalign: Arm


REGIMES = tuple(
    Regime(
        name,
        grpo,
        ARMS[f"refsol-8x{size}"],
        ARMS[f"refsol-rare-8x{size}"],
        ARMS[f"stepalign-8x{size}"],
    )
    for name, grpo, size in (
        ("equal prompts, as in the paper", GRPO, 1),
        ("equal rollouts, 64 a step", GRPO, 8),
        ("equal rollouts, 8 a step", GRPO_FEW, 1),
    )
)


COPYING = {
    "partial_repetition": "partial repetition (StepAlignFB)",
    "full_repetition": "full repetition",
    "omission": "omission",
}


OTHER_PATH = "RefSol, usual wording, another path"


def dialect_arm(dialect: int) -> Arm:
    """Return RefSol with one rollout a prompt and references in a dialect."""
    return Arm(f"refsol-dialect-{dialect}-8x1", f"RefSol, dialect {dialect}", _refsol(1), dialect)


def copying_arm(copying: str) -> Arm:
    """Return StepAlignFB with one rollout a prompt and another way of copying the attempt."""
    return Arm(f"{copying.replace('_', '-')}-8x1", COPYING[copying], _stepalign(1, copying))
