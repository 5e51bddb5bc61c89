"""What is trained, and which conditions the fit never sees.

A condition is a context, its wording, a difficulty and a shape of the step; a run of it gives a
cell at each milestone. The rule, stated before anything was fitted: whole conditions are kept out,
namely every run in the middle stratum of difficulty, of dialects 2 and 4, by a reference with
another path, with a peer's answer as context, and all but one of the runs with two rollouts a step
or another learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfdistill.config import Config

RATE = 3e-4
STEPS = 50
MILESTONES = (10, 20, 30, 50)
HARD, MIDDLE, EASY = (0.0, 0.045), (0.08, 0.14), (0.3, 0.5)
DIFFICULTIES = {None: "", HARD: "hard", MIDDLE: "middle", EASY: "easy"}
HELD_OUT_DIALECTS = (2, 4)

LABELS = {"stepalign": "StepAlignFB", "refsol": "RefSol", "peer": "a peer", "grpo": "GRPO"}
STEPALIGN = {"name": "stepalign"}
REFSOL = {"name": "refsol"}
PEER = {"name": "peer"}
GRPO = {"name": "grpo"}


@dataclass(frozen=True)
class Condition:
    """One way of training.

    Attributes:
        name: unique; its folder.
        method: as in a configuration, without the size of a group.
        shape: prompts a step, and rollouts of each.
        dialect: the wording of the reference.
        order: in which the reference applies the operations.
        stratum: range of the predicted success of the shipped solver; None: all problems.
        rate: the learning rate.
        seed: of the run.
        kept_out: True when the fit must not see it.
    """

    name: str
    method: dict[str, Any] = field(hash=False)
    shape: tuple[int, int] = (8, 1)
    dialect: int = 0
    order: str = "question"
    stratum: tuple[float, float] | None = None
    rate: float = RATE
    seed: int = 0
    kept_out: bool = False

    def config(self, model: str, output: Path) -> Config:
        """Return the run's configuration; 64 dev problems x 8 are asked at every milestone."""
        prompts, group = self.shape
        task: dict[str, Any] = {
            "name": "arithmetic",
            "reference_dialect": self.dialect,
            "reference_order": self.order,
        }
        if self.stratum is not None:
            task["predicted_success"] = self.stratum
        return Config.model_validate(
            {
                "model": model,
                "output_dir": output,
                "device": "cpu",
                "seed": self.seed,
                "task": task,
                "method": {**self.method, "group_size": group},
                "steps": STEPS,
                "prompts_per_step": prompts,
                "rollout": {"max_new_tokens": 96},
                "optimizer": {"learning_rate": self.rate},
                "evaluation": {"every": 10, "problems": 64, "samples": 8},
                "checkpoint": {"every": 10},
                "max_empty_steps": None,
                "completions": None,
                "report": False,
            }
        )

    @property
    def label(self) -> str:
        """Its name in tables."""
        method = self.method["name"]
        copying = self.method.get("critic", {}).get("copying", "").replace("_", " ")
        words = [LABELS[method] + (f" with {copying}" if copying else "")]
        words += [f"dialect {self.dialect}"] if method == "refsol" else []
        words += ["another path"] if self.order == "reversed" else []
        words += [f"{DIFFICULTIES[self.stratum]} problems"] if self.stratum else []
        words += [f"learning rate {self.rate:g}"] if self.rate != RATE else []
        return ", ".join([*words, f"{self.shape[0]} x {self.shape[1]}"])

    @property
    def probe_name(self) -> str:
        """What a probe of it is called: conditions that differ in the budget alone share one."""
        copying = self.method.get("critic", {}).get("copying", "")
        parts = [self.method["name"], copying, f"dialect-{self.dialect}" if self.dialect else ""]
        parts += ["reversed" if self.order == "reversed" else ""]
        parts += [DIFFICULTIES[self.stratum]]
        return "-".join(filter(None, parts)).replace("_", "-")


def _copying(way: str) -> dict[str, Any]:
    return {"name": "stepalign", "critic": {"name": "scribe", "copying": way}}


# Trained by `selfdistill reproduce`: docs/results/results.json has their accuracy.
STUDY = (
    *(
        Condition(f"{method['name']}-{dialect}-8x{size}", method, (8, size), dialect)
        for size in (1, 8)
        for method, dialect in ((STEPALIGN, 0), (REFSOL, 0), (REFSOL, 5))
    ),
    *(
        Condition(f"refsol-{d}-8x1", REFSOL, dialect=d, kept_out=d in HELD_OUT_DIALECTS)
        for d in (1, 2, 3, 4)
    ),
    *(Condition(f"{way}-8x1", _copying(way)) for way in ("full_repetition", "omission")),
    *(
        Condition(
            f"{method['name']}-{dialect}-8x1-{DIFFICULTIES[stratum]}",
            method,
            dialect=dialect,
            stratum=stratum,
            kept_out=stratum == MIDDLE,
        )
        for stratum in (HARD, MIDDLE, EASY)
        for method, dialect in ((STEPALIGN, 0), (REFSOL, 0), (REFSOL, 5))
    ),
    *(
        Condition(
            f"grpo-{prompts}x8{'-' if stratum else ''}{DIFFICULTIES[stratum]}",
            GRPO,
            (prompts, 8),
            stratum=stratum,
            kept_out=stratum == MIDDLE,
        )
        for stratum in (None, HARD, MIDDLE, EASY)
        for prompts in (8, 1)
    ),
)

# Trained by this study: what docs/results does not have.
OWN = (
    Condition("refsol-reversed-8x1", REFSOL, order="reversed", kept_out=True),
    Condition("refsol-2x1", REFSOL, (2, 1)),
    Condition("stepalign-2x1", STEPALIGN, (2, 1), kept_out=True),
    Condition("stepalign-slow-8x1", STEPALIGN, rate=1e-4),
    Condition("refsol-slow-8x1", REFSOL, rate=1e-4, kept_out=True),
    Condition("peer-4x4", PEER, (4, 4), kept_out=True),
    Condition("refsol-dialect-2-middle-8x1", REFSOL, dialect=2, stratum=MIDDLE, kept_out=True),
    Condition("refsol-dialect-5-2x1", REFSOL, (2, 1), dialect=5, kept_out=True),
)

# Added when the reference by another path had turned out to teach nothing, as omission had among
# the conditions of the fit: is a teacher that disputes right steps refused rightly elsewhere, too?
AFTERWARDS = (
    Condition("refsol-reversed-easy-8x1", REFSOL, order="reversed", stratum=EASY, kept_out=True),
)
