"""Times tiles on the GPU at hand and keeps the fastest in a file.

    python -m selfdistill_kernels.backends.triton.autotune --hidden 4096 --vocabulary 128256
    SELFDISTILL_AUTOTUNE=1 python train.py

The second command is yours: with that variable it runs with the tiles that the file names, and with
the shipped ones where the file names none. The file is ~/.cache/selfdistill/triton.json, or the one
that SELFDISTILL_AUTOTUNE_FILE names. Training never times anything itself, so that its results stay
the same from step to step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from selfdistill_kernels.backends.interface import LinearInputs, Needs
from selfdistill_kernels.backends.triton.backend import TritonBackend
from selfdistill_kernels.backends.triton.plan import (
    HEAVY,
    SHIPPED,
    Configuration,
    Kind,
    Machine,
    key_of,
)
from selfdistill_kernels.backends.triton.tuned_tiles import Tiles, cache_file, save_tuned
from selfdistill_kernels.logits import LogitTransform
from selfdistill_kernels.objective import Objective


def candidates() -> list[Configuration]:
    """Every shipped tile, whatever GPU it was made for, with one stage less and more."""
    shipped = []
    for kinds in (*SHIPPED.values(), *HEAVY.values()):
        shipped += [tile for kind, tile in kinds.items() if kind != "product"]
    found: dict[Configuration, None] = {}
    for tile in shipped:
        for stages in (tile.stages - 1, tile.stages, tile.stages + 1):
            found[replace(tile, stages=max(stages, 1))] = None
    return list(found)


def fastest(
    tiles: Iterable[Configuration], seconds: Callable[[Configuration], float]
) -> tuple[Configuration, float]:
    """The tile with the least time; those that do not fit the GPU are passed over.

    Raises:
        RuntimeError: none fits.
    """
    timed: list[tuple[float, Configuration]] = []
    problem: Exception | None = None
    for tile in tiles:
        try:
            timed.append((seconds(tile), tile))
        except Exception as error:  # too much shared memory, or the compiler gave up
            problem = error
    if not timed:
        raise RuntimeError(f"autotune: no tile runs on this GPU; the last said: {problem}")
    best = min(timed, key=lambda pair: pair[0])
    return best[1], best[0]


def main(arguments: list[str] | None = None) -> None:
    """Tune the sweep and the gradient of the plain forward KL for one shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, required=True)
    parser.add_argument("--vocabulary", type=int, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(message="autotune: no GPU here, nothing to time\n")
    from triton.testing import do_bench

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")

    student = randn(options.tokens, options.hidden)
    inputs = LinearInputs(
        student, student + 0.1 * randn(options.tokens, options.hidden),
        randn(options.vocabulary, options.hidden) / options.hidden**0.5,
        None, None, None, None, None, LogitTransform(),
    )  # fmt: skip
    machine, objective = Machine.of(student.device), Objective("forward_kl")
    statistics = TritonBackend().statistics(inputs, objective, 0)
    weights = torch.ones(options.tokens, 3, device="cuda") / options.tokens
    kinds: tuple[Kind, ...] = ("sweep", "gradient")
    for kind in kinds:

        def seconds(tile: Configuration, kind: Kind = kind) -> float:
            backend = TritonBackend(tiles=Tiles(fixed={kind: tile}))
            if kind == "sweep":
                return do_bench(lambda: backend.statistics(inputs, objective, 0))
            needs = Needs(hidden=True, weight=False, bias=False)
            return do_bench(
                lambda: backend.gradient(inputs, objective, statistics, weights, needs, 0)
            )

        tile, time = fastest(candidates(), seconds)
        key = key_of(machine, kind, 2, heavy=options.vocabulary % 128 != 0)
        save_tuned(cache_file(), key, tile)
        print(f"{key}: {tile} ({time:.3f} ms)")


if __name__ == "__main__":
    main()
