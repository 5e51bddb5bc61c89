"""Measure, fit, and write the law's numbers and the page's table: `python -m studies...predict`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from pydantic import TypeAdapter
from rich.console import Console

import selfdistill.prediction
from selfdistill.checkout import EXAMPLE, find_checkout
from selfdistill.config import Config
from selfdistill.model.weights import load_model
from selfdistill.prediction.law import FILE, Laws, distillation_gain, effort, grpo_gain
from selfdistill.runlog import write_atomically
from selfdistill.training.checkpoint import fingerprint
from studies.arithmetic.predict.cells import Cell, own_cells, study_cells
from studies.arithmetic.predict.conditions import Condition
from studies.arithmetic.predict.fit import Observed, fit
from studies.arithmetic.predict.measure import probe_all, read_probe, train_all
from studies.arithmetic.predict.page import is_refused, write_page

COMMAND = "python -m studies.arithmetic.predict"


def main() -> None:
    """Do what is left, then fit and write."""
    arguments = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    arguments.add_argument("--output", type=Path, default=Path("runs/predict"))
    output = arguments.parse_args().output
    torch.set_num_threads(1)
    console = Console()
    clone = find_checkout()
    model = str(clone / EXAMPLE / "solver")
    if not train_all(output, model, console):
        console.print("Stopped; the same command goes on from there.")
        return
    probe_all(output, model, console)
    cells = [*study_cells(clone / "docs" / "results" / "results.json"), *own_cells(output)]
    seen = [
        cell
        for cell in cells
        if not (cell.condition.kept_out or is_refused(output, cell.condition))
    ]
    laws = Laws(
        command=COMMAND,
        solver_sha256=fingerprint(load_model(Config(model=model, output_dir=output))),
        distillation=fit(
            distillation_gain,
            [observed(output, cell) for cell in seen if not is_grpo(cell.condition)],
            names=("reached", "stronger", "time", "slope", "shape"),
            known=("gap", "student", "elsewhere", "effort"),
            start=(1.0, 0.0, 3.0, 1.0, 0.5),
        ),
        grpo=fit(
            grpo_gain,
            [observed(output, cell) for cell in seen if is_grpo(cell.condition)],
            names=("groups", "time", "shape"),
            known=("student", "groups", "effort"),
            start=(0.5, 3.0, 0.0),
        ),
    )
    path = Path(selfdistill.prediction.__path__[0]) / FILE
    write_atomically(path, TypeAdapter(Laws).dump_json(laws).decode() + "\n")
    kept_out = [cell for cell in cells if cell.condition.kept_out]
    write_page(clone / "docs", laws, kept_out, output)


def is_grpo(condition: Condition) -> bool:
    """Tell which law a condition belongs to."""
    return bool(condition.method["name"] == "grpo")


def observed(output: Path, cell: Cell) -> Observed:
    """Return a cell of the fit as its law sees it.

    The student's share is that of the evaluation before training, which has more attempts than any
    probe, at the very problems that the gain is of: the fit should not bend to a probe's chance.
    """
    condition = cell.condition
    spent = effort(condition.config("any", output), cell.steps)
    if is_grpo(condition):
        known: tuple[float, ...] = (cell.before, float(condition.shape[0]), spent)
    else:
        (context,) = read_probe(output, condition).contexts
        assert context.localisation.share_at is not None
        gap = context.teacher.value - cell.before
        known = (gap, cell.before, 1 - context.localisation.share_at.value, spent)
    return Observed(condition.name, cell.steps, cell.gain, known)


if __name__ == "__main__":
    main()
