"""The command line: `selfdistill --help` lists the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from selfdistill.errors import EXIT_INTERRUPTED, UserError
from selfdistill.predict_command import predict
from selfdistill.study_commands import demo, reproduce
from selfdistill.visible import say, visible

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-distillation of language models, on one machine.",
)

UNTRAINED = (
    "These are the weights from before training: no later evaluation was better. Those after the "
    "last step are checkpoints/last (--checkpoint last)."
)


def _version(asked: bool) -> None:
    if not asked:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        print(f"selfdistill {version('selfdistill')}")
    except PackageNotFoundError:
        print("selfdistill, from a clone that is not installed")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Self-distillation of language models, on one machine."""


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings in place of the file's: steps=10 method.group_size=4."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check data, prompts, memory and time; train nothing."),
    ] = False,
    ask_critic: Annotated[
        bool, typer.Option("--ask-critic", help="With --dry-run: show the critic's first answer.")
    ] = False,
) -> None:
    """Train a solver as a YAML file says."""
    from selfdistill.config import load_config

    if ask_critic and not dry_run:
        raise typer.BadParameter("it belongs to --dry-run: give both", param_hint="--ask-critic")
    # Of several processes (torchrun), one speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    run = load_config(config, settings or ())
    if dry_run:
        from selfdistill.planning.dry_run import dry_run as show_plan

        show_plan(run, console, ask_critic=ask_critic)
        return
    from selfdistill.training.loop import train as run_training

    result = run_training(run, resume=resume, console=console)
    if result.interrupted:
        say(console, f"Stopped after step {result.step}; go on with --resume.")
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.step < run.steps:
        say(console, f"Ended after step {result.step}: evaluation.patience is used up.")
    measure = "mean reward" if run.task.name == "python" else f"Avg@{run.evaluation.samples}"
    best = run.output_dir / "checkpoints" / "best"
    say(
        console,
        f"Best held-out {measure}: {result.best_metric:.3f} at step {result.best_step}, in {best}",
    )
    if result.best_step == 0:
        say(console, UNTRAINED)
    if run.report and os.environ.get("RANK", "0") == "0":
        from selfdistill.analysis.comparison import compare as compare_runs
        from selfdistill.analysis.comparison import read_run_curve
        from selfdistill.analysis.report.comparison_page import write_comparison

        page = write_comparison(
            compare_runs([read_run_curve(run.output_dir)]), run.output_dir / "report"
        )
        say(console, f"Page: {page.resolve()}")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="The folder of a run that keeps `completions`.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which; the last by default.")] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="At most so many.")] = 8,
) -> None:
    """Show what the student wrote at a step, and what the teacher thought of each token."""
    from selfdistill.analysis.completions import read_step
    from selfdistill.analysis.completions import show as shown

    console = Console()
    for text in shown(read_step(run, step), most=rollouts):
        console.print(text, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A training run's folder.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    checkpoint: Annotated[Literal["best", "last"], typer.Option(help="Which weights.")] = "best",
    form: Annotated[
        Literal["merged", "adapter"], typer.Option(help="A whole model, or the adapter alone.")
    ] = "merged",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="By default the run's precision.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Also upload it to the Hub, as owner/name (private).")
    ] = None,
) -> None:
    """Write a run's weights as a folder that transformers and vLLM load, with a card."""
    from selfdistill.export import export as write
    from selfdistill.export import push as upload

    console = Console()
    step = write(run, output, checkpoint=checkpoint, form=form, dtype=dtype)
    say(console, f"The model is in {output.resolve()}, with the weights after step {step}.")
    if step == 0 and checkpoint == "best":
        say(console, UNTRAINED)
    if push is not None:
        say(console, f"Pushed: {upload(output, push)}")


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run's folder; a run's YAML file (its model before training, on its task); a "
            "model folder or a Hub name (on the arithmetic task)."
        ),
    ],
    split: Annotated[Literal["dev", "test"], typer.Option(help="Which problems.")] = "test",
    problems: Annotated[int, typer.Option(min=1, help="At most so many of them.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Attempts per problem: the k of @k.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled tokens.")] = 0,
    checkpoint: Annotated[
        Literal["best", "last"], typer.Option(help="Which weights of a run.")
    ] = "best",
    output: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure Pass@k, Maj@k and Avg@k with 95 % intervals."""
    from selfdistill.config import Config, load_config
    from selfdistill.evaluation.scores import summarize
    from selfdistill.evaluation.tables import evaluation_table
    from selfdistill.places import try_files
    from selfdistill.progress import progress_bars
    from selfdistill.runlog import write_atomically
    from selfdistill.seeds import derive_seed
    from selfdistill.tasks.build import held_out_problems
    from selfdistill.training.solver import load_solver
    from selfdistill.training.state_file import read_state

    if output is not None:
        try_files([output], overwrite=overwrite)
    console = Console()
    if (Path(model) / "config.yaml").is_file():
        settings = load_config(Path(model) / "config.yaml")
        weights = Path(model) / "checkpoints" / checkpoint
        solver = load_solver(settings, weights)
        if checkpoint == "best" and read_state(weights).step == 0:
            say(console, UNTRAINED)
    elif model.endswith((".yaml", ".yml")):
        solver = load_solver(load_config(Path(model)))
    else:
        solver = load_solver(Config(model=model, output_dir=Path(".")))
    asked, left_out = solver.with_room(held_out_problems(solver.task, split=split, count=problems))
    with progress_bars(console) as bars:
        bar = bars.add_task("evaluate", total=len(asked), note=split)
        attempts = solver.attempt(
            split=split,
            problems=problems,
            samples=samples,
            seed=derive_seed(seed, "evaluate"),
            progress=lambda count: bars.advance(bar, count),
        )
    result = summarize(attempts, solver.task, split=split, too_long=left_out)
    console.print(evaluation_table({model: result}))
    if output is not None:
        write_atomically(output, result.to_json())


@app.command(name="filter")
def filter_(
    config: Annotated[Path, typer.Argument(help="A StepAlign run's YAML file.")],
    output: Annotated[Path, typer.Option(help="The JSONL file of the problems that are kept.")],
    samples: Annotated[int, typer.Option(min=1, help="Attempts at each problem.")] = 16,
    below: Annotated[str, typer.Option(help="Keep problems with a smaller share right.")] = "5/16",
    critic_samples: Annotated[
        int, typer.Option(min=1, help="Attempts the critic rewrites; one right one is enough.")
    ] = 1,
    split: Annotated[Literal["train", "dev", "test", "all"], typer.Option(help="Which.")] = "all",
    problems: Annotated[
        int | None, typer.Option(min=1, help="At most so many of each split.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled tokens.")] = 0,
) -> None:
    """Keep the problems that the model rarely solves and the critic does; go on if interrupted."""
    from fractions import Fraction

    from selfdistill.config import load_config
    from selfdistill.filtering import FilterSettings, filter_problems

    try:
        threshold = Fraction(below)
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            f"got {below!r}, expected a share such as 5/16", param_hint="--below"
        ) from error
    settings = FilterSettings(samples, threshold, critic_samples, split, problems, seed)
    console = Console()
    report = filter_problems(load_config(config), output, settings, console=console)
    console.print(report.table())
    say(console, f"{report.count('kept')} problems are in {output}.")


@app.command()
def analyze(
    run: Annotated[Path, typer.Argument(help="A training run's folder.")],
    checkpoint: Annotated[
        Literal["best", "last", "base"],
        typer.Option(help="Whose weights write the attempts; base: before training."),
    ] = "best",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Whose contexts to try on the same attempts: names or YAML mappings with commas "
            "between them, such as stepalign,refsol; by default the run's own."
        ),
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts that went wrong.")] = 500,
    problems: Annotated[
        int, typer.Option(min=1, help="Problems to go through, again where once is too little.")
    ] = 1000,
    samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Attempts per problem at a time; more than 1 for contexts made from a group.",
        ),
    ] = 1,
    split: Annotated[Literal["dev", "test"], typer.Option(help="Which problems.")] = "test",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampled tokens.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes; by default RUN/analysis-CHECKPOINT.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show where the teacher disagrees with attempts, by method, and what masks would keep."""
    from selfdistill.analysis.report.analysis_page import FILES, write_analysis
    from selfdistill.analysis.report.analysis_tables import (
        analysis_tables,
        missing_note,
        summary_line,
    )
    from selfdistill.analysis.run import analyze_run
    from selfdistill.places import try_files

    folder = output or run / f"analysis-{checkpoint}"
    try_files([folder / name for name in FILES], overwrite=overwrite)
    console = Console()
    analysis = analyze_run(
        run,
        checkpoint=checkpoint,
        methods=methods,
        attempts=attempts,
        problems=problems,
        samples=samples,
        split=split,
        seed=seed,
        console=console,
    )
    page = write_analysis(analysis, folder)
    say(console, summary_line(analysis))
    for table in analysis_tables(analysis):
        console.print(table.rich())
    if note := missing_note(analysis):
        say(console, note)
    say(console, f"Page: {page.resolve()}")


app.command()(predict)
app.command()(demo)
app.command()(reproduce)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of training runs.")],
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = Path("comparison"),
    overwrite: Overwrite = False,
) -> None:
    """Put runs beside each other: curves, final accuracy, paired differences, on one page."""
    from selfdistill.analysis.comparison import compare as compare_runs
    from selfdistill.analysis.comparison import read_run_curve
    from selfdistill.analysis.report.comparison_page import FILES, write_comparison
    from selfdistill.analysis.report.comparison_tables import difference_table, final_table
    from selfdistill.places import try_files

    try_files([output / name for name in FILES], overwrite=overwrite)
    console = Console()
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    comparison = compare_runs(
        [read_run_curve(run, name=name) for run, name in zip(runs, names, strict=True)]
    )
    page = write_comparison(comparison, output)
    console.print(final_table(comparison.finals).rich())
    if comparison.differences:
        console.print(difference_table(comparison.differences).rich())
    say(console, f"Page: {page.resolve()}")


@app.command()
def doctor(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch.")] = 8192,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 4096,
    vocabulary: Annotated[int, typer.Option(min=1, help="Vocabulary size.")] = 128256,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32", "float64"],
        typer.Option(help="Of hidden states and head."),
    ] = "bfloat16",
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Where; a GPU if there is one.")
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="The head gets no gradient.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Check and time the kernels on the GPU.")
    ] = False,
) -> None:
    """Say what is installed, what is missing and what would run for a shape."""
    import torch

    from selfdistill.model.attention.backend import describe
    from selfdistill_kernels.tools.doctor import DTYPES, run

    status = run(
        tokens=tokens,
        hidden=hidden,
        vocabulary=vocabulary,
        dtype=dtype,
        device=device,
        frozen=frozen,
        gpu=gpu,
    )
    print()
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for line in describe(device=on, dtype=DTYPES[dtype]):
        print(line)
    raise typer.Exit(status)


def main() -> None:
    """Run the command line; what a user can mend ends in one message, without a traceback."""
    try:
        app()
    except (UserError, OSError) as error:
        line = Text.assemble(("error:", "red"), f" {visible(str(error))}")
        Console(stderr=True).print(line, soft_wrap=True)
        sys.exit(1)
