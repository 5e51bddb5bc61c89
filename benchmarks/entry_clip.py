"""Where `Objective.entry_clip` turns the gradient round, and what it costs.

    python -m benchmarks.entry_clip [--clip 0.05] [--plot FILE] [--rounds 6]

--plot draws, for two entries, which steps a clip leaves alone, stops, or turns round. --rounds
times a loss with a trained head, exact, with and without the clip in turns, on one thread in the
time of the process, so that other work counts little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.problems import Shape, make_problem
from selfdistill_kernels import Objective, distillation_from_logits, fused_linear_distillation

SHAPE = Shape(256, 576, 49152)
NAMES = ("forward_kl", "reverse_kl", "jsd")
UNCHANGED, SHORTER, STOPPED, TURNED = range(4)
LABELS = ("unchanged", "other length", "no step", "turned round")


def kinds_of_step(divergence: str, clip: float, points: int) -> Tensor:
    """[points, points] what the clip does to the step of two entries: the teacher's probability of
    the first from left to right, the student's from the first row to the last."""
    share = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1]
    teacher, student = torch.meshgrid(share, share, indexing="xy")
    log_s, log_t = (torch.stack([p, 1 - p], dim=-1).flatten(0, 1).log() for p in (student, teacher))
    steps = []
    for limit in (None, clip):
        leaf = log_s.clone().requires_grad_()
        out = distillation_from_logits(
            leaf, log_t, objective=Objective(divergence, entry_clip=limit), reduction="sum"
        )
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        steps.append(-gradient[:, 0])
    whole, clipped = steps
    kinds = torch.full_like(whole, SHORTER, dtype=torch.int64)
    kinds[whole == clipped] = UNCHANGED
    kinds[(clipped.abs() < 1e-12) & (whole.abs() >= 1e-12)] = STOPPED
    kinds[whole * clipped < -1e-24] = TURNED
    return kinds.view(points, points)


def draw(clip: float, to: Path, points: int = 199) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "entry_clip"  # the same file each time
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ("white", "#9ecae1", "#969696", "#d6604d")
    figure, panels = plt.subplots(1, len(NAMES), figsize=(10, 4.3), sharey=True)
    for panel, name in zip(panels, NAMES, strict=True):
        panel.imshow(
            kinds_of_step(name, clip, points).numpy(), origin="lower", extent=(0, 1, 0, 1),
            cmap=ListedColormap(colours), vmin=-0.5, vmax=3.5, interpolation="nearest",
        )  # fmt: skip
        panel.plot([0, 1], [0, 1], color="black", linewidth=0.8)
        panel.set_title(name)
        panel.set_xlabel("teacher's probability of entry 1")
    panels[0].set_ylabel("student's probability of entry 1")
    patches = [
        Patch(facecolor=colour, edgecolor="black", label=label)
        for colour, label in zip(colours, LABELS, strict=True)
    ]
    figure.legend(handles=patches, loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"The step of two entries with entry_clip = {clip:g}")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(to, metadata={"Date": None} if to.suffix == ".svg" else None)
    plt.close(figure)


def ratio(divergence: str, clip: float, rounds: int, shape: Shape = SHAPE) -> tuple[float, float]:
    """Time with the clip over time without, of medians, and the share of tokens that it changes."""
    torch.set_num_threads(1)
    problem = make_problem(shape, torch.float32, objective=divergence)
    leaves = [problem.student_hidden, problem.head(True)]
    times: dict[float | None, list[float]] = {None: [], clip: []}
    divergences = {}
    for index in range(rounds + 1):  # the first is not counted
        for limit in random.sample(list(times), len(times)):
            start = time.process_time()
            out = fused_linear_distillation(
                leaves[0], problem.teacher_hidden, leaves[1],
                objective=Objective(divergence, entry_clip=limit),
            )  # fmt: skip
            torch.autograd.grad(out.loss, leaves)
            if index:
                times[limit].append(time.process_time() - start)
            divergences[limit] = out.divergence.detach()
    changed = (divergences[None] != divergences[clip]).float().mean()
    return statistics.median(times[clip]) / statistics.median(times[None]), float(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clip", type=float, default=0.05)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    if options.plot is not None:
        draw(options.clip, options.plot)
    if options.rounds:
        print(environment("cpu"))
        for name in ("forward_kl", "jsd"):
            made, changed = ratio(name, options.clip, options.rounds)
            print(f"{name}: {made:.3f} of the time without, {changed:.0%} of the tokens clipped")


if __name__ == "__main__":
    main()
