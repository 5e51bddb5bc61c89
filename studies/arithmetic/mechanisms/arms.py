"""What is compared: each arm is a few settings on top of StepAlignFB's, at equal rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        steps: of every run, those that choose a learning rate too: schedules end with a run.
        first_steps: of the first of two runs that follow each other, out of `steps`.
        returns_every: steps after which a student goes back to the best, a multiple of
            `evaluate_every`.
        rates: the learning rates that are tried.
        seeds: training seeds.
        problems, samples: test problems, and attempts at each.
        outside: other numbers of operations than those trained on, by name.
        outside_problems, outside_samples: of each.
        dev_problems, dev_samples, evaluate_every: of what chooses a checkpoint or a rate.
    """

    steps: int = 50
    first_steps: int = 20
    returns_every: int = 20
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    problems: int = 200
    samples: int = 12
    outside: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"shorter": (3,), "longer": (7,)}, hash=False
    )
    outside_problems: int = 60
    outside_samples: int = 4
    dev_problems: int = 64
    dev_samples: int = 4
    evaluate_every: int = 10


FULL = Scale()

QUICK = Scale(
    steps=10,
    first_steps=5,
    returns_every=5,
    rates=(3e-4, 1e-3),
    seeds=(0,),
    problems=40,
    samples=4,
    outside_problems=10,
    outside_samples=2,
    dev_problems=32,
    dev_samples=2,
    evaluate_every=5,
)

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        key: its folder's name.
        label: its name in tables.
        settings: of a configuration, on top of `common`; sections are merged, a method, teacher or
            anything else with a name replaces another one.
        first: settings of a run that comes before, from whose best checkpoint this one starts;
            both together take the steps of the others.
        returns: the student goes back to the best, as often as the scale says.
    """

    key: str
    label: str
    settings: Settings = field(default_factory=dict, hash=False)
    first: Settings | None = field(default=None, hash=False)
    returns: bool = False

    def settings_at(self, scale: Scale) -> Settings:
        """Return the settings with what depends on how much is computed."""
        if not self.returns:
            return self.settings
        return merged(self.settings, _teacher(every=scale.returns_every))


def merged(base: Settings, changes: Settings) -> dict[str, Any]:
    """Return settings with others on top.

    Sections are merged; one that names another choice (another method) replaces the old one.
    """
    result = dict(base)
    for name, value in changes.items():
        old = result.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            is_other = "name" in value and value["name"] != old.get("name")
            result[name] = dict(value) if is_other else merged(old, value)
        else:
            result[name] = value
    return result


def _loss(**settings: Any) -> Settings:
    return {"method": {"loss": settings}}


def _teacher(**settings: Any) -> Settings:
    return {"method": {"teacher": settings}}


def _grpo(**settings: Any) -> Settings:
    return {"method": {"name": "grpo", "group_size": 8, **settings}}


def _critic(rate: float) -> Settings:
    return {"method": {"critic": {"name": "scribe", "error_rate": rate}}}


COSINE: Settings = {"optimizer": {"schedule": "cosine"}}

STEPALIGN = Arm("stepalign", "StepAlignFB")
# The control of those who go back to the best or restart from it, under a falling rate.
STEPALIGN_COSINE = Arm("stepalign-cosine", "StepAlignFB, cosine schedule", COSINE)
REFSOL = Arm("refsol", "RefSol", {"method": {"name": "refsol", "group_size": 1}})
GRPO = Arm("grpo", "GRPO", {**_grpo(), "prompts_per_step": 1})
GRPO_MANY = Arm("grpo-many", "GRPO, 64 rollouts a step", _grpo())

REFERENCES = (STEPALIGN, STEPALIGN_COSINE, REFSOL, GRPO, GRPO_MANY)

OTHER_PATH = Arm(
    "refsol-other-path",
    "RefSol, another path",
    {"task": {"reference_order": "reversed"}, "method": {"name": "refsol", "group_size": 1}},
)

STOP = Arm("stop-at-error", "nothing behind the error", _loss(stop_after_first_wrong_step=True))
ABOVE = Arm("advantage-above-0.1", "|A| > 0.1", _loss(advantage_mask={"threshold": 0.1}))
TOP = Arm("advantage-top-20", "20 % by |A|", _loss(advantage_mask={"top_fraction": 0.2}))
ENTROPY = Arm(
    "entropy-top-20",
    "20 % by entropy",
    _loss(token_selection={"rule": "entropy", "share": 0.2}),
)
CONFIDENT = Arm(
    "confident-top-10",
    "10 %, sure and diverging",
    _loss(token_selection={"rule": "confident", "share": 0.1}),
)

ENTRY_CLIP = Arm("entry-clip", "entries clipped at 0.05", _loss(entry_clip=0.05))
TOKEN_CLIP = Arm("token-clip", "tokens clipped at 0.05", _loss(divergence_clip=0.05))

LIVE = Arm("teacher-live", "live teacher", _teacher(name="live"))
EMA = Arm("teacher-ema", "EMA teacher (0.9)", _teacher(name="ema", decay=0.9))
REFRESHED = Arm("teacher-refreshed", "refreshed teacher", _teacher(name="refreshed"))
RETURNING = Arm(
    "teacher-returning",
    "refreshed, back to the best",
    {**_teacher(name="refreshed", from_best=True), **COSINE},
    returns=True,
)
RETURNING_STOP = Arm(
    "teacher-returning-stop",
    "back to the best, up to the error",
    merged(RETURNING.settings, STOP.settings),
    returns=True,
)
RETURNING_THRICE = Arm(
    "teacher-returning-thrice",
    "up to the error, 3 updates a step",
    merged(RETURNING_STOP.settings, {"updates_per_step": 3}),
    returns=True,
)
RESTARTED = Arm(
    "teacher-restarted",
    "restarted from the best",
    COSINE,
    first={},
)

SHARPER = Arm("teacher-sharper", "sharper teacher (0.5)", _loss(teacher_temperature=0.5))
SHARPER_STOP = Arm(
    "teacher-sharper-stop",
    "sharper, up to the error, cosine",
    {
        "optimizer": {"schedule": "cosine"},
        **_loss(teacher_temperature=0.5, stop_after_first_wrong_step=True),
    },
)

CRITICS = {
    rate: Arm(f"critic-errs-{rate:g}", f"critic errs at {100 * rate:g} %", _critic(rate))
    for rate in (0.05, 0.2, 0.4)
}

THEN_GRPO = Arm(
    "then-grpo",
    "StepAlignFB, then GRPO",
    {**_grpo(), "prompts_per_step": 1},
    first={},
)

WITH_GRPO = Arm(
    "with-grpo",
    "StepAlignFB and GRPO in one loss",
    {"method": {"group_size": 4, "reward": {}}, "prompts_per_step": 2},
)
CONTRASTS = tuple(
    Arm(
        f"contrast-{against}",
        f"contrast with {what}",
        {"method": {"name": "contrast", "group_size": 1, "against": against}},
    )
    for against, what in (("wrong", "a wrong critique"), ("other", "another problem's"))
)
THEN_CONTRAST = Arm("then-contrast", "StepAlignFB, then contrast", CONTRASTS[0].settings, first={})
EARLY = Arm(
    "early-tokens",
    "early tokens count more",
    _loss(position_weight={"name": "linear", "over": 50}),
)
WRONG_STEP = Arm(
    "wrong-step",
    "a constant on the wrong step",
    {"method": {"name": "wrong_step", "group_size": 1}},
)

ARMS: tuple[Arm, ...] = (
    *REFERENCES,
    RETURNING,
    RETURNING_STOP,
    RETURNING_THRICE,
    RESTARTED,
    SHARPER,
    SHARPER_STOP,
    REFRESHED,
    EMA,
    LIVE,
    WITH_GRPO,
    THEN_GRPO,
    *CONTRASTS,
    THEN_CONTRAST,
    WRONG_STEP,
    EARLY,
    STOP,
    ABOVE,
    TOP,
    ENTROPY,
    CONFIDENT,
    ENTRY_CLIP,
    TOKEN_CLIP,
    OTHER_PATH,
    *CRITICS.values(),
)

BY_KEY = {arm.key: arm for arm in ARMS}
