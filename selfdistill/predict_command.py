"""The command `selfdistill predict`; typer reads it at every start, so it imports late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from selfdistill.visible import say


def predict(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings in place of the file's: steps=10 method.group_size=4."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Whose teachers to try: names or YAML mappings with commas between them, such as "
            "stepalign,refsol; by default the run's own. GRPO is forecast in any case."
        ),
    ] = None,
    attempts: Annotated[
        int,
        typer.Option(
            min=2,
            help="Of the student, two at each problem (with peer, group_size at each); each "
            "teacher writes one at each problem.",
        ),
    ] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON instead of tables.")
    ] = False,
) -> None:
    """Say before training what it should bring, from a few hundred rollouts."""
    from selfdistill.config import load_config
    from selfdistill.prediction.forecast import predict as run_prediction
    from selfdistill.prediction.tables import cost_line, prediction_tables
    from selfdistill.progress import progress_bars

    console = Console(stderr=as_json)
    with progress_bars(console) as bars:
        bar = bars.add_task("predict", total=None, note="rollouts")
        prediction = run_prediction(
            load_config(config, settings or ()),
            methods=methods,
            attempts=attempts,
            progress=lambda count: bars.advance(bar, count),
        )
    if as_json:
        print(prediction.to_json())
        return
    for table in prediction_tables(prediction):
        console.print(table.rich())
    say(console, cost_line(prediction))
    say(console, f"Begin with: {prediction.advice.method or 'neither'}.")
    for reason in prediction.advice.reasons:
        say(console, f"- {reason}")
