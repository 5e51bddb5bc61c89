"""How local the teacher's disagreement is, and what an advantage mask would keep: figures only.

Every figure is a ratio of sums over tokens (or attempts) with a 95 % bootstrap interval that
resamples problems, because the tokens of an attempt and the attempts at a problem belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from selfdistill.analysis.tokens import TokenAnalysis
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.resampling import quotient_interval, ratio_intervals
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent
from selfdistill_kernels import AdvantageMask

# A token counts as negative when the teacher finds it less likely by more than this (nats).
NEGATIVE = -0.1
# The masks that are tried: |A| > threshold (nats), of these signs.
THRESHOLDS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
SIGNS: tuple[Sign, ...] = ("any", "negative", "positive")
# How much of the sum of |A| the suggested mask must keep.
KEPT = 0.9

Sign = Literal["any", "negative", "positive"]


@dataclass(frozen=True)
class Localisation:
    """How the advantage lies around the first wrong step, over attempts that have one.

    Attributes:
        attempts: how many attempts were looked at.
        problems: how many problems they belong to; what the intervals resample.
        mean_before, mean_at, mean_after: mean advantage of the tokens before, in and after the
            first wrong step (nats); None when there are no such tokens.
        lowest_at: mean over attempts of the lowest advantage within the wrong step (nats).
        share_at: share of the sum of |A| that lies on the wrong step.
        kl_share_at: share of the divergence that lies on the wrong step.
        tokens_at: share of the tokens that lie on the wrong step: what `share_at` would be if the
            advantage lay evenly.
        negative_before: share of the tokens before the wrong step, which are right, with A < -0.1.
    """

    attempts: int
    problems: int
    mean_before: Interval | None
    mean_at: Interval | None
    mean_after: Interval | None
    lowest_at: Interval | None
    share_at: Interval | None
    kl_share_at: Interval | None
    tokens_at: Interval | None
    negative_before: Interval | None


@dataclass(frozen=True)
class Overall:
    """The advantage over whole attempts; needs no steps.

    Attributes:
        attempts, problems: how many.
        mean: mean advantage of a token (nats).
        magnitude: mean |A| of a token (nats).
        kl: mean divergence of a token (nats).
        negative: share of the tokens with A < -0.1.
    """

    attempts: int
    problems: int
    mean: Interval | None
    magnitude: Interval | None
    kl: Interval | None
    negative: Interval | None


@dataclass(frozen=True)
class ProfilePoint:
    """The mean advantage (nats) at one place, counted in tokens from the wrong step's first."""

    offset: int
    tokens: int
    mean: float


@dataclass(frozen=True)
class MaskEffect:
    """What one advantage mask does to the tokens of attempts.

    Attributes:
        threshold, sign: of the mask (`selfdistill_kernels.AdvantageMask`).
        rho: share of the tokens that stay active.
        advantage_kept: their share of the sum of |A|.
        kl_kept: their share of the divergence.
        gemms: GEMMs of the loss at this rho, by strategy; see `gemm_count`.
        saved: share of the GEMM time that they save, arithmetic and no measurement; 0 at rho = 1.
    """

    threshold: float
    sign: Sign
    rho: Interval
    advantage_kept: Interval | None
    kl_kept: Interval | None
    gemms: dict[str, float]
    saved: dict[str, float]


def localise(records: Sequence[TokenAnalysis]) -> Localisation:
    """Aggregate the attempts that have a wrong step; the others are left out."""
    wrong = [r for r in records if r.wrong_tokens is not None]

    def parts(record: TokenAnalysis) -> list[tuple[float, float]]:
        assert record.wrong_tokens is not None
        start, stop = record.wrong_tokens
        advantage, kl = record.advantage, record.kl
        before, at, after = advantage[:start], advantage[start:stop], advantage[stop:]
        return [
            (sum(before), len(before)),
            (sum(at), len(at)),
            (sum(after), len(after)),
            (min(at), 1),
            (_magnitude(at), _magnitude(advantage)),
            (sum(kl[start:stop]), sum(kl)),
            (len(at), len(advantage)),
            (_negative(before), len(before)),
        ]

    return Localisation(len(wrong), _problems(wrong), *_ratios(wrong, parts, count=8))


def share_times(
    records: Sequence[TokenAnalysis], others: Sequence[TokenAnalysis]
) -> Interval | None:
    """Return share_at of some records / share_at of others, paired.

    Args:
        records: attempts under one context; those without a wrong step are left out.
        others: the same attempts in the same order under another context.

    Returns:
        The quotient; its interval resamples problems for both at once. None where one of them is
        unknown or the divisor is 0.

    Raises:
        ValueError: the attempts are not the same.
    """
    sums: dict[str, list[list[float]]] = {}
    for record, other in zip(records, others, strict=True):
        if (record.problem_id, record.wrong_tokens) != (other.problem_id, other.wrong_tokens):
            raise ValueError(
                f"records and others must hold the same attempts, got one at {record.problem_id} "
                f"beside one at {other.problem_id}"
            )
        if record.wrong_tokens is not None:
            total = sums.setdefault(record.problem_id, [[0.0, 0.0], [0.0, 0.0]])
            wrong = slice(*record.wrong_tokens)
            for i, advantage in enumerate((other.advantage, record.advantage)):
                total[0][i] += _magnitude(advantage[wrong])
                total[1][i] += _magnitude(advantage)
    if not sums:
        return None
    return quotient_interval([s[0] for s in sums.values()], [s[1] for s in sums.values()])


def first_step_wrong(record: TokenAnalysis) -> bool:
    """True when step 1 is the wrong one, so that no right step comes before it."""
    return record.first_wrong_step == 1


def overall(records: Sequence[TokenAnalysis]) -> Overall:
    """Aggregate whole attempts."""

    def parts(record: TokenAnalysis) -> list[tuple[float, float]]:
        count = len(record.advantage)
        return [
            (sum(record.advantage), count),
            (_magnitude(record.advantage), count),
            (sum(record.kl), count),
            (_negative(record.advantage), count),
        ]

    return Overall(len(records), _problems(records), *_ratios(records, parts, count=4))


def profile(records: Sequence[TokenAnalysis], *, reach: int = 20) -> list[ProfilePoint]:
    """Return the mean advantage `reach` tokens up to and from the start of the wrong step.

    Places that no attempt has are left out.
    """
    at: dict[int, list[float]] = {}
    for record in records:
        if record.wrong_tokens is not None:
            start = record.wrong_tokens[0]
            for i in range(max(0, start - reach), min(len(record.advantage), start + reach + 1)):
                at.setdefault(i - start, []).append(record.advantage[i])
    return [ProfilePoint(o, len(at[o]), sum(at[o]) / len(at[o])) for o in sorted(at)]


def mask_effects(
    records: Sequence[TokenAnalysis],
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    signs: Sequence[Sign] = SIGNS,
) -> list[MaskEffect]:
    """Try advantage masks on attempts, which should be a sample of what training sees.

    Args:
        records: right and wrong attempts alike: training learns from all of them.
        thresholds: nats.
        signs: which side of the threshold stays.
    """
    masks = [AdvantageMask(threshold=t, sign=s) for s in signs for t in thresholds]

    def parts(record: TokenAnalysis) -> list[tuple[float, float]]:
        advantage = torch.tensor(record.advantage, dtype=torch.float64)
        kl = torch.tensor(record.kl, dtype=torch.float64)
        exists = torch.ones_like(advantage, dtype=torch.bool)
        sums = []
        for mask in masks:
            kept = mask.select(advantage, exists)
            for values in (exists.double(), advantage.abs(), kl):
                sums.append((values[kept].sum().item(), values.sum().item()))
        return sums

    found = _ratios(records, parts, count=3 * len(masks))
    effects = []
    for i, mask in enumerate(masks):
        rho, advantage_kept, kl_kept = found[3 * i : 3 * i + 3]
        if rho is None:
            continue
        counts = {name: gemm_count(name, rho.value) for name in GEMMS}
        effects.append(
            MaskEffect(
                threshold=mask.threshold,
                sign=signs[i // len(thresholds)],
                rho=rho,
                advantage_kept=advantage_kept,
                kl_kept=kl_kept,
                gemms=counts,
                saved={name: 1 - n / gemm_count(name, 1.0) for name, n in counts.items()},
            )
        )
    return effects


def suggest(effects: Sequence[MaskEffect], *, kept: float = KEPT) -> MaskEffect | None:
    """Return the mask with the fewest tokens that keeps the share `kept` of the sum of |A|."""
    enough = [e for e in effects if e.advantage_kept and e.advantage_kept.value >= kept]
    return min(enough, key=lambda e: e.rho.value, default=None)


def localisation_table(
    title: str,
    figures: Mapping[str, Localisation],
    *,
    times: Mapping[str, Interval | None] | None = None,
    note: str = "",
) -> TextTable:
    """Return a table with one column for each named Localisation.

    Args:
        title: of the table.
        figures: the columns.
        times: `share_times` of the first column over each of the others, if they are to be shown.
        note: below the table.
    """
    rows: list[tuple[str, Callable[[Localisation], str]]] = [
        ("wrong attempts (problems)", lambda f: f"{f.attempts} ({f.problems})"),
        ("mean A before the first wrong step (nats)", lambda f: number(f.mean_before)),
        ("mean A within it", lambda f: number(f.mean_at)),
        ("mean A after it", lambda f: number(f.mean_after)),
        ("lowest A within it, mean over attempts", lambda f: number(f.lowest_at, "+.2f")),
        ("share of all |A| on it", lambda f: percent(f.share_at)),
        ("share of the KL on it", lambda f: percent(f.kl_share_at)),
        ("share of the tokens on it", lambda f: percent(f.tokens_at)),
        (f"right tokens before it with A < {NEGATIVE:g}", lambda f: percent(f.negative_before)),
    ]
    lines = [[label, *map(show, figures.values())] for label, show in rows]
    if times:
        first, *others = figures
        cells = [number(times[name], ".2f") for name in others]
        lines.append([f"times this share of |A| with {first}, same attempts", MISSING, *cells])
    return TextTable(title, ["", *figures], lines, note)


# GEMMs of 2 N H V flop by strategy: (for every token, for every active token); docs/math.md.
GEMMS = {
    "store": (2, 2),
    "store, head frozen": (2, 1),
    "recompute": (2, 4),
    "recompute, head frozen": (2, 3),
}


def gemm_count(strategy: str, rho: float) -> float:
    """Return the GEMMs of a strategy when the share `rho` of the tokens is active."""
    always, active = GEMMS[strategy]
    return always + active * rho


def _ratios(
    records: Sequence[TokenAnalysis],
    parts: Callable[[TokenAnalysis], list[tuple[float, float]]],
    *,
    count: int,
) -> list[Interval | None]:
    """Add up (numerator, denominator) pairs for each problem, and return their ratios."""
    sums: dict[str, list[list[float]]] = {}
    for record in records:
        total = sums.setdefault(record.problem_id, [[0.0] * count, [0.0] * count])
        for i, (top, bottom) in enumerate(parts(record)):
            total[0][i] += top
            total[1][i] += bottom
    if not sums:
        return [None] * count
    return ratio_intervals([s[0] for s in sums.values()], [s[1] for s in sums.values()])


def _problems(records: Sequence[TokenAnalysis]) -> int:
    return len({record.problem_id for record in records})


def _magnitude(values: Sequence[float]) -> float:
    return sum(map(abs, values))


def _negative(advantage: Sequence[float]) -> int:
    return sum(a < NEGATIVE for a in advantage)
