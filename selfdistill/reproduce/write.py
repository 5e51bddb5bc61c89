"""docs/results: README.md with tables and claims, results.json with every figure, plots as SVG."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill

import numpy
import torch
import transformers

from selfdistill.analysis.localisation import Localisation, localisation_table
from selfdistill.evaluation.intervals import Interval
from selfdistill.evaluation.tables import MISSING, TextTable, number, percent
from selfdistill.places import PlaceTakenError, try_folder
from selfdistill.reproduce.claims import Claim, Order, difference, localisation_claims, orders
from selfdistill.reproduce.figures import COLOURS, Dots, Line, dot_plot, line_chart
from selfdistill.reproduce.findings import Copying, Dose, Findings, Main, Row, Stratum
from selfdistill.reproduce.jobs import TEACHER_SAMPLES
from selfdistill.reproduce.plan import GRPO, RATES_SEED, SIDE_ARMS, Scale
from selfdistill.runlog import write_atomically

_ARM_COLOURS = dict(zip((arm.label for arm in SIDE_ARMS), COLOURS, strict=False))


@dataclass(frozen=True)
class Environment:
    """Where and how the results were made.

    Attributes:
        command: what was typed.
        workers: processes, of one thread each.
        minutes: working time of all jobs divided by the workers.
        commit: of the repository, or None outside of one.
        python, torch, transformers, numpy: versions.
        machine: processor, cores and memory.
    """

    command: str
    workers: int
    minutes: float
    commit: str | None
    python: str
    torch: str
    transformers: str
    numpy: str
    machine: str


def environment(*, command: str, workers: int, seconds: float) -> Environment:
    """Describe this machine and its software."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Environment(
        command=command,
        workers=workers,
        minutes=seconds / workers / 60,
        commit=_commit(),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        numpy=numpy.__version__,
        machine=f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}",
    )


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def refuse_foreign_results(folder: Path) -> None:
    """Make sure that the results replace nothing but earlier ones.

    Raises:
        PlaceTakenError: the folder has a README.md that `write_results` did not write.
        OSError: the folder cannot be created or written.
    """
    path = folder / "README.md"
    if path.exists() and not path.read_bytes().startswith(_HEAD.splitlines()[0].encode()):
        raise PlaceTakenError(
            f"{path} is not the page of an earlier `selfdistill reproduce`, and would be replaced: "
            "choose another folder (--results)"
        )
    try_folder(folder)


def write_results(findings: Findings, scale: Scale, where: Environment, folder: Path) -> list[Path]:
    """Write everything into a folder and return the files."""
    claims = localisation_claims(findings)
    settings = orders(findings)
    plots = make_plots(findings)
    data = {
        "environment": asdict(where),
        "scale": asdict(scale),
        "orders": [asdict(order) for order in settings],
        "localisation": [asdict(claim) for claim in claims],
        **asdict(findings),
    }
    files = {
        "README.md": readme(findings, settings, claims, scale, where, plots),
        "results.json": json.dumps(data, indent=1) + "\n",
        **plots,
    }
    for name, text in files.items():
        write_atomically(folder / name, text)
    return [folder / name for name in files]


def readme(
    findings: Findings,
    settings: Sequence[Order],
    claims: Sequence[Claim],
    scale: Scale,
    where: Environment,
    plots: dict[str, str],
) -> str:
    """Return the page."""
    parts = [_HEAD, _setting(scale, where), _claims(settings, claims)]
    if findings.main is not None:
        parts.append(_main_section(findings.main, scale))
    if findings.difficulty is not None:
        parts.append(_difficulty_section(findings.difficulty, scale))
    if findings.copying is not None:
        parts.append(_copying_section(findings.copying, scale))
    if findings.wording is not None:
        parts.append(_wording_section(findings.wording, scale))
    if findings.rates:
        parts.append(_rates_section(findings, scale))
    parts += [_BUILT_IN, _limits(scale)]
    text = "\n".join(parts)
    for name in plots:
        assert f"({name})" in text, f"{name} is not shown"
    return text


_HEAD = """# The paper's question in miniature

Written by `selfdistill reproduce`; every figure and every answer below follows from the runs.
What is compared: GRPO, RefSol (the teacher sees a reference solution) and StepAlignFB (it sees a
critique aligned with the attempt), trained from the shipped arithmetic solver, 2.2 M parameters
(examples/arithmetic). The paper (arXiv 2606.11173) used Qwen3-1.7B on competition mathematics. All
intervals are 95 % bootstrap intervals that resample test problems and training seeds.
"""


def _setting(scale: Scale, where: Environment) -> str:
    seeds = ", ".join(map(str, scale.seeds))
    side = ", ".join(map(str, scale.side_seeds))
    wording = ", ".join(map(str, scale.wording_seeds))
    milestones = " and ".join(map(str, scale.milestones))
    items = f"""- {where.minutes:.0f} minutes with {where.workers} worker(s) of one thread each.
- {where.machine}. Python {where.python}, torch {where.torch}, transformers {where.transformers},
  numpy {where.numpy}; commit {where.commit or "unknown"}.
- {scale.milestones[-1]} steps, AdamW, fixed base teacher, forward KL over all completion tokens,
  temperature 1. "8 x 1" means 8 prompts a step with one rollout each. 8 x 1 against GRPO's 8 x 8 is
  equal prompts, as in the paper (GRPO then has eight times the rollouts); 8 x 8 against 8 x 8 and
  8 x 1 against 1 x 8 are equal rollouts, many and few.
- Learning rates: for each row the best of {", ".join(f"{r:g}" for r in scale.rates)} on the dev
  split, {scale.rate_steps} steps, training seed {RATES_SEED}, which no other run has. Checkpoint:
  the best of every {scale.evaluate_every} steps on {scale.dev_problems} dev problems x
  {scale.dev_samples}. Accuracy is that of the checkpoint chosen so far, on test problems, after
  {milestones} steps: {scale.problems} problems x {scale.samples} samples, {scale.side_problems}
  problems in each stratum.
- Training seeds {seeds} in the main table, {side} in the other studies, {wording} for the dialects
  between the usual and the rarest. Train, dev and test questions are
  disjoint by the hash of their text.
"""
    return f"## How\n\n    {where.command}\n\n{_wrap(items)}\n"


def _wrap(text: str) -> str:
    """Break the lines of a list anew; an item starts with "- "."""
    items = " ".join(text.split()).split(" - ")
    return "\n".join(
        fill(item if i == 0 else f"- {item}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for i, item in enumerate(items)
    )


def _claims(settings: Sequence[Order], claims: Sequence[Claim]) -> str:
    note = (
        "Differences of Avg in points, paired by problem. yes: every interval lies on the claimed "
        "side of 0; no: one lies on the other side; not separated: neither."
    )
    tables = []
    if settings:
        rows = [
            [
                order.problems,
                order.regime,
                str(order.steps),
                order.wording,
                percent(order.stepalign_refsol, sign=True),
                percent(order.refsol_grpo, sign=True),
                percent(order.stepalign_grpo, sign=True),
                order.above_refsol,
                order.whole,
            ]
            for order in settings
        ]
        head = [
            "problems",
            "equal",
            "steps",
            "RefSol's wording",
            "StepAlignFB - RefSol",
            "RefSol - GRPO",
            "StepAlignFB - GRPO",
            "StepAlignFB > RefSol",
            "StepAlignFB > RefSol > GRPO",
        ]
        tables += [_where_it_holds(settings), TextTable("Accuracy", head, rows, note).markdown()]
    if claims:
        cells = [[claim.text, claim.measured, claim.holds] for claim in claims]
        title = "Advantage by token, base solver, first wrong step 2 or later"
        tables.append(TextTable(title, ["", "measured", "holds"], cells).markdown())
    return "\n\n".join(["## The paper's claims", *tables])


def _where_it_holds(settings: Sequence[Order]) -> str:
    """Count the answers to the two claims about accuracy, and list where the whole order holds."""

    def counts(answers: Sequence[str]) -> str:
        return ", ".join(
            f"{answer}: {answers.count(answer)}" for answer in ("yes", "no", "not separated")
        )

    distinct = [order.above_refsol for order in settings if not order.repeated]
    lines = [
        f"- StepAlignFB > RefSol, {len(distinct)} comparisons (problems, rollouts, steps, "
        f"wording): {counts(distinct)}.",
        f"- StepAlignFB > RefSol > GRPO, {len(settings)} settings (with what is equal to GRPO): "
        f"{counts([order.whole for order in settings])}.",
    ]
    lines += [
        f"  - yes: {o.problems} problems, {o.regime}, {o.steps} steps, {o.wording} wording"
        for o in settings
        if o.whole == "yes"
    ]
    return "\n".join(lines)


def _row_cells(row: Row) -> list[str]:
    tokens = row.metrics["mean_tokens"]
    return [
        row.label,
        str(row.steps),
        percent(row.metrics["avg_at_k"]),
        percent(row.metrics["maj_at_k"]),
        percent(row.metrics["pass_at_k"]),
        number(tokens, ".1f"),
        f"{100 * row.strict:.1f} %",
        MISSING if row.learning_rate is None else f"{row.learning_rate:g}",
        ", ".join(f"{100 * value:.1f}" for value in row.per_seed) or MISSING,
        ", ".join(map(str, row.best_steps)) or MISSING,
    ]


def _row_table(title: str, rows: Sequence[Row], *, samples: int, note: str = "") -> TextTable:
    diverged = [f"{row.diverged} run(s) of {row.label} diverged." for row in rows if row.diverged]
    k = samples
    return TextTable(
        title,
        [
            "",
            "steps",
            f"Avg@{k}",
            f"Maj@{k}",
            f"Pass@{k}",
            "tokens an answer",
            "every step right",
            "learning rate",
            "Avg by seed",
            "best step",
        ],
        [_row_cells(row) for row in rows],
        " ".join([note, *diverged]).strip(),
    )


def _main_section(main: Main, scale: Scale) -> str:
    table = _row_table(
        f"{scale.problems} test problems x {scale.samples}, {len(scale.seeds)} training seeds",
        [main.base, main.teacher, *main.rows],
        samples=scale.samples,
        note="Usual wording: the dialect that the solver writes itself (86 %); rare: one that it "
        f"writes 1 % of the time. With a critique: k = {TEACHER_SAMPLES}. Paired differences are "
        "among the claims above, all of them in results.json.",
    )
    return f"""## The table

{table.markdown()}
![Avg by method](main.svg)

![Dev accuracy over training](curves.svg)
"""


def _difficulty_section(strata: Sequence[Stratum], scale: Scale) -> str:
    labels = [arm.label for arm in SIDE_ARMS]
    rows = [
        [
            f"{s.predicted[0]:g} to {s.predicted[1]:g}",
            percent(s.base.metrics["avg_at_k"]),
            percent(s.teacher.metrics["avg_at_k"]),
            str(steps),
            *(percent(_avg(_row_of(s.rows, label, steps))) for label in labels),
        ]
        for s in strata
        for steps in scale.milestones
    ]
    table = TextTable(
        f"Avg@{scale.samples} by difficulty, {scale.side_problems} test problems a stratum, "
        f"{len(scale.side_seeds)} training seeds",
        ["predicted", "base success", "teacher", "steps", *labels],
        rows,
        "Each stratum has its own training, dev and test problems: those whose predicted base "
        "success lies in the range. Predicted from the rates at which the solver was taught to "
        "forget carries. Teacher: the base solver with a critique of its own attempt. Learning "
        "rates are those of the main table; differences are among the claims above.",
    )
    plots = "\n\n".join(
        f"![Difference to GRPO after {steps} steps]({_gap_plot_name(steps)})"
        for steps in scale.milestones
    )
    return f"""## Difficulty

{table.markdown()}
{plots}
"""


def _gap_plot_name(steps: int) -> str:
    return f"difficulty-step-{steps}.svg"


def _row_of(rows: Sequence[Row], label: str, steps: int) -> Row:
    return next(row for row in rows if (row.label, row.steps) == (label, steps))


def _copying_section(copying: Copying, scale: Scale) -> str:
    tokens = {label: figures.later_wrong for label, figures in copying.tokens.items()}
    first = {label: figures.first_wrong for label, figures in copying.tokens.items()}
    later_table = localisation_table("Step 2 or later is the first wrong one", tokens)
    first_table = localisation_table("Step 1 is wrong already", first)
    trained = _row_table(
        f"Training with each, 8 x 1, {scale.problems} test problems",
        copying.rows,
        samples=scale.samples,
        note="All at the learning rate that was chosen for StepAlignFB.",
    )
    return f"""## What the critique copies

The advantage A = log p(token | context) - log p(token) of the base solver's wrong attempts, before
any training.

{later_table.markdown()}
{first_table.markdown()}
![Advantage around the wrong step](copying.svg)

{trained.markdown()}"""


def _wording_section(doses: Sequence[Dose], scale: Scale) -> str:
    def cells(dose: Dose) -> list[str]:
        figures = dose.tokens.later_wrong
        return [
            str(dose.dialect),
            f"{100 * dose.share:.0f} %",
            *(percent(_avg(row)) for row in dose.rows),
            str(dose.rows[0].seeds),
            number(figures.mean_before, "+.2f"),
            number(figures.mean_at, "+.2f"),
            percent(figures.share_at),
            number(dose.tokens.share_times, ".2f"),
            percent(figures.negative_before),
        ]

    table = TextTable(
        f"RefSol, 8 x 1, {scale.problems} test problems, by the wording of the reference",
        [
            "dialect",
            "the solver writes it",
            *(f"Avg@{scale.samples}, {steps} steps" for steps in scale.milestones),
            "seeds",
            "A before",
            "A within",
            "|A| on the wrong step",
            "times this share with StepAlignFB",
            "right tokens with A < -0.1",
        ],
        [cells(dose) for dose in doses],
        "Advantages before training, where step 2 or later is the first wrong one. Dialects "
        "between the ends have the learning rate that was chosen for the rarest.",
    )
    return f"""## How rare the reference's words are

{table.markdown()}
![RefSol by wording](wording.svg)
"""


def _rates_section(findings: Findings, scale: Scale) -> str:
    rows = [
        [
            rates.label,
            *(MISSING if value is None else f"{100 * value:.1f} %" for value in rates.dev.values()),
            f"{rates.chosen:g}{' (edge)' if rates.at_edge else ''}",
        ]
        for rates in findings.rates
    ]
    table = TextTable(
        f"Best dev Avg@{scale.dev_samples} by learning rate",
        ["", *(f"{rate:g}" for rate in scale.rates), "chosen"],
        rows,
        "edge: the lowest or highest that was tried, so that a better one may lie outside.",
    )
    return f"""## Learning rates

{table.markdown()}"""


_BUILT_IN = """## Built in by construction

None of this was discovered by the solver; it was trained to write it (examples/arithmetic/README.md
has the whole list). A result that follows from one of these is no finding.

- **Its errors.** A carry or borrow is forgotten at a rate fixed for each (operation, digit). The
  skills are few and shared between problems, so what is learned on one helps on all.
- **Its wording.** Six dialects with shares .86 .07 .03 .02 .01 .01. That a reference in rare words
  has a negative advantage on right tokens follows from these shares, and from the next line.
- **Following a context.** The corpus holds critiques and references with targets that follow them,
  also after a forced wrong step, and wrong contexts that are copied: that full repetition turns
  positive and that partial repetition is sharp at the error was trained.
- **The scribe never errs.** The critique comes from an exact checker; a language model's would not
  always be right. A right critique is the full solution in the attempt's own words: beside a
  reference in the usual wording it has little to add here.
- **Teacher ceiling.** The fixed teacher, which is the base solver with a critique, is itself not
  always right (the tables have its accuracy), and cannot lift a student far above that. GRPO has
  no such ceiling.
"""


def _limits(scale: Scale) -> str:
    items = f"""- One pretrained solver and one task: the intervals say nothing about another model.
- {len(scale.side_seeds)} training seed(s) in the copy and difficulty studies,
  {len(scale.wording_seeds)} for the dialects in between, {len(scale.seeds)} in the main table: with
  so few, the bootstrap over seeds is rough and tends to be narrow.
- Learning rates were chosen on problems of all difficulties, once, and kept in every stratum, for
  other wordings and for other ways of copying.
- {len(scale.rates)} rates, one seed each: the choice itself is noisy.
- The earlier measuring point was set after pilot runs on dev problems had shown that all methods
  level off later.
- Chains of more than six steps would be harder still, but the solver never saw one and cannot
  follow a critique of one either; the hardest stratum is the hardest that it can be taught from.
"""
    return f"## Limits\n\n{_wrap(items)}\n"


def make_plots(findings: Findings) -> dict[str, str]:
    """Return the plots of the finished studies by file name."""
    plots: dict[str, str] = {}
    if findings.main is not None:
        plots["main.svg"] = _main_plot(findings.main)
        plots["curves.svg"] = _curves_plot(findings.main)
    if findings.difficulty is not None:
        for steps in sorted({row.steps for row in findings.difficulty[0].rows}):
            plots[_gap_plot_name(steps)] = _gap_plot(findings.difficulty, steps)
    if findings.copying is not None:
        plots["copying.svg"] = _copying_plot(findings.copying)
    if findings.wording is not None:
        plots["wording.svg"] = _wording_plot(findings.wording)
    return plots


def _avg(row: Row) -> Interval:
    interval = row.metrics["avg_at_k"]
    assert interval is not None
    return interval


def _main_plot(main: Main) -> str:
    milestones = sorted({row.steps for row in main.rows})
    labels = dict.fromkeys(row.label for row in main.rows)
    rows = [Dots(main.base.label, [_avg(main.base)] + [None] * (len(milestones) - 1))]
    rows += [
        Dots(label, [_avg(_row_of(main.rows, label, steps)) for steps in milestones])
        for label in labels
    ]
    return dot_plot(
        "Accuracy on held-out problems",
        rows,
        [(f"{steps} steps", COLOURS[i]) for i, steps in enumerate(milestones)],
        x_label="right answers (%)",
        scale=100,
        note="Avg with 95 % intervals over problems and training seeds; prompts x rollouts a step",
    )


def _curves_plot(main: Main) -> str:
    """Self-distillation with one rollout a prompt, and GRPO: as the paper compares them."""
    return line_chart(
        "Accuracy on dev problems while training",
        [
            Line(
                arm.label,
                _ARM_COLOURS[arm.label],
                [(point.step, point.avg) for point in main.curves[arm.label]],
            )
            for arm in SIDE_ARMS
        ],
        x_label="training steps",
        y_label="right answers (%)",
        scale=100,
        note="mean over training seeds; prompts x rollouts a step",
    )


def _gap_plot(strata: Sequence[Stratum], steps: int) -> str:
    lines = []
    for arm in SIDE_ARMS:
        points = [
            (100 * _avg(s.base).value, gap)
            for s in strata
            if (gap := difference(s.gaps, GRPO.label, arm.label, steps)) is not None
        ]
        if points:
            lines.append(Line(f"{arm.label}", _ARM_COLOURS[arm.label], points))
    return line_chart(
        f"Difference to {GRPO.label}, by difficulty, after {steps} steps",
        lines,
        x_label="base success before training (%)",
        y_label="points of Avg",
        scale=100,
        note="above 0: better than it; paired by problem; prompts x rollouts a step",
    )


def _copying_plot(copying: Copying) -> str:
    def values(figures: Localisation) -> list[Interval | None]:
        return [figures.mean_before, figures.mean_at, figures.mean_after]

    return dot_plot(
        "Advantage around the first wrong step",
        [Dots(label, values(f.later_wrong)) for label, f in copying.tokens.items()],
        [("before it", COLOURS[2]), ("within it", COLOURS[1]), ("after it", COLOURS[0])],
        x_label="mean advantage (nats a token)",
        note="base solver, wrong attempts whose first wrong step is 2 or later",
    )


def _wording_plot(doses: Sequence[Dose]) -> str:
    milestones = [row.steps for row in doses[0].rows]
    return line_chart(
        "RefSol by the wording of its reference",
        [
            Line(
                f"{steps} steps",
                COLOURS[i],
                [(float(x), _avg(dose.rows[i])) for x, dose in enumerate(doses)],
            )
            for i, steps in enumerate(milestones)
        ],
        x_label="how often the solver writes the reference's dialect of its own accord",
        y_label="right answers (%)",
        x_names=[(float(x), f"{100 * dose.share:.0f} %") for x, dose in enumerate(doses)],
        scale=100,
        note="one rollout a prompt, 8 prompts a step",
    )
