"""Instructions that one wave of a sweep executes for one tile.

PYTHONPATH=tests/support:. python -m amd_machine.count    both GPUs, tiles in 4 parts and whole
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from amd_machine.launch import Machine
from selfdistill_kernels import Objective
from selfdistill_kernels.backends.interface import LinearInputs
from selfdistill_kernels.backends.triton import TritonBackend
from selfdistill_kernels.backends.triton.plan import Kind, configuration
from selfdistill_kernels.backends.triton.tuned_tiles import Tiles
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.tools.audit.record import MACHINES

HIDDEN = 192
FEW, MANY = 4, 8  # tiles; the difference leaves out what happens once


def executed(
    architecture: str, objective: Objective, parts: int | None = None
) -> dict[str, Counter]:
    """Kernel -> operations of one wave for one tile of both models, bfloat16, H = 192.

    Args:
        architecture: "gfx942" or "gfx950".
        parts: of the accumulators (plan.Configuration.parts); None takes the shipped ones.
    """
    few, many = (_operations(architecture, objective, parts, tiles) for tiles in (FEW, MANY))
    return {
        name: Counter({op: n - few[name][op] for op, n in many[name].items() if n > few[name][op]})
        for name in few
    }


def _operations(
    architecture: str, objective: Objective, parts: int | None, tiles: int
) -> dict[str, Counter]:
    machine = replace(MACHINES[architecture], multiprocessors=1)
    kinds: tuple[Kind, ...] = ("sweep", "mixture")
    shipped = {kind: configuration(machine, kind, 2) for kind in kinds}
    fixed = {k: replace(t, parts=t.parts if parts is None else parts) for k, t in shipped.items()}
    launch = Machine(architecture)
    rows, columns = shipped["sweep"].rows, shipped["sweep"].columns
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    inputs = LinearInputs(
        randn(rows, HIDDEN), randn(rows, HIDDEN), randn(tiles * columns, HIDDEN) / HIDDEN**0.5,
        None, None, None, None, torch.ones(rows, dtype=torch.bool), LogitTransform(),
    )  # fmt: skip
    TritonBackend(machine, launch, Tiles(fixed=fixed)).statistics(inputs, objective, 0)
    found = {}
    for launched in launch.launched:
        name, program = launched.compiled.job.name, launched.compiled.program
        if name in kinds:
            # Each tile is visited once by every wave of one program.
            warps = launched.compiled.job.shape.warps * (MANY - FEW)
            counts: Counter = Counter()
            for at, operation in enumerate(program.names):
                if program.hits[at]:
                    counts["all"] += int(program.hits[at]) / warps
                    counts[operation] += int(program.hits[at]) / warps
                    if program.table[at]["cross"] >= 0:
                        counts["DPP"] += int(program.hits[at]) / warps
            found[name] = counts
        program.hits[:] = 0
    return found


def main() -> None:
    """Print a table."""
    shown = ("all", "S_BARRIER", "DPP", "S_NOP", "MFMA")
    print(f"| GPU | kernel | parts | {' | '.join(shown)} |")
    print("|---" * (3 + len(shown)) + "|")
    for architecture in ("gfx942", "gfx950"):
        for divergence in ("forward_kl", "skew_kl"):
            for parts in (4, 1):
                for name, counts in executed(architecture, Objective(divergence), parts).items():
                    cells = [f"{counts[kind]:.0f}" for kind in shown]
                    print(
                        f"| {architecture} | {divergence}, {name} | {parts} | {' | '.join(cells)} |"
                    )


if __name__ == "__main__":
    main()
