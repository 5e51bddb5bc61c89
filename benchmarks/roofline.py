"""Predicted bytes, flops and times on GPUs that nobody here has measured.

    python -m benchmarks.roofline --output runs/roofline

Writes roofline.md, roofline.json and roofline.png. The formulas, and what they leave out, are in
benchmarks/cost.py; each row below names the algorithm that it stands for.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from benchmarks import arguments, cost, design
from benchmarks.cost import GPUS, Cost, Gpu, Size
from benchmarks.problems import SHAPES, Shape
from benchmarks.report import OURS, PEER, Table, markdown_table, print_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RHOS = (1.0, 0.5, 0.2, 0.05)
TRL_ROWS, TRL_COLUMNS = 4096, 32768
GIGA, TERA, MEBIBYTE, GIBIBYTE = 1e9, 1e12, float(1 << 20), float(1 << 30)
NOTE = (
    "Everything below is **predicted** by the cost model of `benchmarks/cost.py`; nothing "
    "was measured. bfloat16, forward and backward, reverse KL, student and teacher share the head."
)


@dataclass(frozen=True)
class Strategy:
    """One line of the tables: an algorithm with its parameters."""

    key: str
    label: str
    cost: Callable[[Size, Gpu], Cost]

    @property
    def is_ours(self) -> bool:
        return self.key.startswith(("sweep", "store"))

    def is_for(self, gpu: Gpu) -> bool:
        """Whether the model knows what this GPU makes of it: the design is not for all."""
        return gpu.specialised is not None or not self.key.startswith("design")


def _liger_chunked(size: Size, gpu: Gpu, *, rows: int = 1024) -> Cost:
    """Liger's chunked loss under torch.compile: two reductions, the loss and the gradient each read
    both 16-bit tiles, dz is written; a chunk's dW is written, read, and added to the total."""
    del gpu
    row_bytes = 4.0 * size.models * size.itemsize + size.itemsize
    return cost.row_chunks(size, rows=rows, row_bytes=row_bytes, add_bytes=8.0, launches=6)


def _liger_fused(size: Size, gpu: Gpu) -> Cost:
    """Liger's fused linear JSD: chunks of about N H / V rows, eager operators around one kernel.

    Bytes a logit: 16-bit logits to float32 (6 each), temperature (8 each), log_softmax (16 each,
    three reads), softmax (16), JSD kernel (16), two sums (8), the chain rule (28), cast (6). The
    addmm of dW reads and writes a 16-bit total.
    """
    del gpu
    chunks = math.ceil(size.vocabulary / size.hidden)
    rows = 1 << math.ceil(math.log2(math.ceil(size.tokens / chunks)))
    row_bytes = 2.0 * (6 + 8 + 16) + 16 + 16 + 8 + 28 + 6
    return cost.row_chunks(size, rows=rows, row_bytes=row_bytes, add_bytes=4.0, launches=14)


def _trl(size: Size, gpu: Gpu, *, trained: bool = True, sweeps: int = 1) -> Cost:
    del gpu
    return cost.tiles(size, rows=TRL_ROWS, columns=TRL_COLUMNS, trained=trained, sweeps=sweeps)


def _torch(size: Size, gpu: Gpu, *, objective: str = "reverse_kl", trained: bool = True) -> Cost:
    del gpu
    return cost.materialised(size, objective, trained=trained)


def _floor(size: Size, gpu: Gpu, *, trained: bool = True) -> Cost:
    del gpu
    return cost.floor(size, trained=trained)


def strategies() -> list[Strategy]:
    """Every line of the tables, those that train the head first."""
    found = []
    for trained, suffix, frozen in ((True, "", ""), (False, "_frozen", ", frozen")):
        gemms = 3 + trained
        found.append(
            Strategy(
                f"floor{suffix}", f"floor: {gemms} GEMMs{frozen}", partial(_floor, trained=trained)
            )
        )
        for name, label, function in (
            ("sweep", "sweep + gradient", cost.sweep_and_gradient),
            ("store", "store", cost.store),
        ):
            found += [
                Strategy(
                    f"{name}_rho_{rho:g}{suffix}",
                    f"{label}, rho {rho:g}{frozen}",
                    partial(function, rho=rho, trained=trained),
                )
                for rho in RHOS
            ]
        found += [
            Strategy(
                f"design_{way.name}{suffix}",
                f"design: specialised, {way.label}{frozen}",
                partial(way.cost, trained=trained),
            )
            for way in design.WAYS
        ]
        found.append(Strategy(f"trl{suffix}", f"TRL tiles{frozen}", partial(_trl, trained=trained)))
        if trained:  # it always computes dW
            found.append(Strategy("liger", "Liger chunks, 1024 rows", _liger_chunked))
        found.append(
            Strategy(
                f"torch{suffix}", f"materialised torch{frozen}", partial(_torch, trained=trained)
            )
        )
    return found


def predict(key: str, shape: Shape, objective: str, dtype: str, gpu: Gpu) -> float | None:
    """Seconds of a contender of benchmarks.peers, None where the model has no formula for it.

    Ours is `store` where every token carries a gradient, and the fused strategy behind an advantage
    mask and for per-token results; through the CUDA rows it is always `store`.
    """
    if dtype == "float32":
        return None  # the data sheets' peak is that of 16-bit products
    two_models = objective != "cross_entropy"
    size = Size(shape.tokens, shape.hidden, shape.vocabulary, models=1 + two_models)
    plain, _, rho = key.partition("_rho_")
    trained = not plain.endswith("_frozen")
    name = plain.removesuffix("_frozen")
    sweeps = 2 if objective == "jsd" else 1
    fused = partial(
        cost.sweep_and_gradient,
        rho=float(rho) if rho else 1.0,
        trained=trained,
        sweeps=sweeps,
        compacted=True,
    )
    stored = partial(cost.store, trained=trained)
    formulas: dict[str, Callable[[Size, Gpu], Cost]] = {
        "floor": partial(_floor, trained=trained),
        "ours": stored if two_models and not rho else fused,
        "ours_rows": stored,
        "torch": partial(_torch, objective=objective, trained=trained),
    }
    if two_models:
        formulas |= {
            "trl": partial(_trl, trained=trained, sweeps=sweeps),
            "liger_128": partial(_liger_chunked, rows=128),
            "liger_1024": partial(_liger_chunked, rows=1024),
        }
    formula = formulas.get(name)
    return None if formula is None else formula(size, gpu).seconds(gpu)


@dataclass(frozen=True)
class Published:
    """A time that somebody measured and published, for the check of the model."""

    label: str
    milliseconds: float
    cost: Callable[[Size, Gpu], Cost]


# Liger-Kernel's own benchmark of JSD, an H100 at N/H/V 8192/4096/128256.
PUBLISHED_SHAPE = Shape(8192, 4096, 128256)
PUBLISHED = (
    Published("torch, JSD", 195.3, partial(_torch, objective="jsd")),
    Published("Liger fused JSD", 182.6, _liger_fused),
    Published("Liger chunked JSD", 60.7, _liger_chunked),
)


@dataclass(frozen=True)
class Prediction:
    """One strategy on one GPU and shape."""

    gpu: str
    shape: str
    key: str
    label: str
    flops: float
    bytes: float
    intensity: float
    workspace_bytes: float
    predicted_seconds: float


def predictions(gpus: Sequence[Gpu], shapes: Sequence[Shape]) -> list[Prediction]:
    """Every strategy on every GPU and shape."""
    found = []
    for shape in shapes:
        size = Size(shape.tokens, shape.hidden, shape.vocabulary)
        for gpu in gpus:
            for strategy in strategies():
                if not strategy.is_for(gpu):
                    continue
                made = strategy.cost(size, gpu)
                found.append(
                    Prediction(
                        gpu.name, str(shape), strategy.key, strategy.label, made.flops,
                        made.bytes, made.intensity, made.workspace, made.seconds(gpu),
                    )
                )  # fmt: skip
    return found


def gpu_table(gpus: Sequence[Gpu]) -> Table:
    """Data sheets, and the fractions that are assumed."""
    body = [
        (
            gpu.name,
            f"{gpu.peak / TERA:.0f}",
            f"{gpu.bandwidth / TERA:.2f}",
            f"{gpu.machine.cache_bytes / MEBIBYTE:.0f}",
            f"{gpu.library:.2f}",
            f"{gpu.fused:.2f}",
            "-" if gpu.specialised is None else f"{gpu.specialised:.2f}",
            f"{gpu.streaming:.2f}",
            gpu.source,
            gpu.reached,
        )
        for gpu in gpus
    ]
    head = (
        "", "TFLOP/s", "TB/s", "usable cache MiB", "library", "fused", "specialised", "stream",
        "data sheet", "fractions of GEMMs",
    )  # fmt: skip
    return Table("GPUs: dense 16-bit peaks; fractions taken to be reached", head, body)


def time_table(found: Sequence[Prediction], shape: str) -> Table:
    """Predicted milliseconds, a column a GPU."""
    here = [one for one in found if one.shape == shape]
    gpus = list(dict.fromkeys(one.gpu for one in here))
    times = {(one.label, one.gpu): one.predicted_seconds for one in here}
    body = [
        (
            label,
            *(f"{times[label, gpu] * 1e3:.1f}" if (label, gpu) in times else "-" for gpu in gpus),
        )
        for label in dict.fromkeys(one.label for one in here)
    ]
    return Table(f"Predicted ms, N/H/V {shape}", ("", *gpus), body)


def detail_table(found: Sequence[Prediction], gpu: str, shape: str) -> Table:
    body = [
        (
            one.label,
            f"{one.flops / TERA:.1f}",
            f"{one.bytes / GIGA:.1f}",
            f"{one.intensity:.0f}",
            f"{one.workspace_bytes / GIBIBYTE:.2f}",
            f"{one.predicted_seconds * 1e3:.1f}",
        )
        for one in found
        if (one.gpu, one.shape) == (gpu, shape)
    ]
    head = ("", "TFLOP", "DRAM GB", "flop/byte", "extra GiB", "predicted ms")
    return Table(f"Predicted, {gpu}, N/H/V {shape}", head, body)


def traffic_table(gpus: Sequence[Gpu], shapes: Sequence[Shape]) -> Table:
    """The sweep's DRAM traffic beside its minimum."""
    body = []
    for shape in shapes:
        size = Size(shape.tokens, shape.hidden, shape.vocabulary)
        for gpu in gpus:
            rows, moved = cost.group_rows(size, gpu), cost.sweep(size, gpu).bytes
            least = cost.least_sweep_bytes(size, gpu)
            body.append(
                (
                    f"{gpu.name}, {shape}",
                    str(rows),
                    str(math.ceil(size.tokens / rows)),
                    str(cost.pieces(size, gpu)),
                    f"{moved / GIGA:.3f}",
                    f"{least / GIGA:.3f}",
                    f"{moved / least:.3f}",
                )
            )
    head = ("", "group rows", "head reads", "pieces", "GB", "least GB", "ratio")
    return Table("Predicted DRAM traffic of the sweep", head, body)


def break_even_table(gpus: Sequence[Gpu], shapes: Sequence[Shape]) -> Table:
    """The fraction of the peak that the fused kernels must reach to be as fast as `store`."""
    body = []
    for shape in shapes:
        size = Size(shape.tokens, shape.hidden, shape.vocabulary)
        for gpu in gpus:
            shares = [cost.break_even(size, gpu, rho=rho) for rho in RHOS]
            cells = [f"{share:.2f}" if share <= 1.0 else "never" for share in shares]
            body.append((f"{gpu.name}, {shape}", f"{gpu.fused:.2f}", *cells))
    head = ("", "assumed", *(f"rho {rho:g}" for rho in RHOS))
    return Table("Fraction of the peak at which sweep + gradient equals store", head, body)


def published_table() -> Table:
    """The model beside published times: how far to trust it."""
    shape, gpu = PUBLISHED_SHAPE, GPUS["H100"]
    size = Size(shape.tokens, shape.hidden, shape.vocabulary)
    body = []
    for one in PUBLISHED:
        predicted = one.cost(size, gpu).seconds(gpu) * 1e3
        body.append(
            (
                one.label,
                f"{one.milliseconds:.1f}",
                f"{predicted:.1f}",
                f"{predicted / one.milliseconds:.2f}",
            )
        )
    head = ("", "published ms", "predicted ms", "ratio")
    return Table(f"The model against published H100 times, N/H/V {shape}", head, body)


def markdown(found: Sequence[Prediction], gpus: Sequence[Gpu], shapes: Sequence[Shape]) -> str:
    """The whole report."""
    lines = ["# Predicted costs on GPUs", "", NOTE]
    tables = [gpu_table(gpus), *(time_table(found, str(shape)) for shape in shapes)]
    tables += [traffic_table(gpus, shapes), break_even_table(gpus, shapes), published_table()]
    tables += [detail_table(found, gpu.name, str(shape)) for shape in shapes for gpu in gpus]
    for table in tables:
        lines += markdown_table(table)
    return "\n".join(lines) + "\n"


def record(found: Sequence[Prediction], gpus: Sequence[Gpu]) -> dict[str, Any]:
    """For JSON."""
    size = Size(PUBLISHED_SHAPE.tokens, PUBLISHED_SHAPE.hidden, PUBLISHED_SHAPE.vocabulary)
    h100 = GPUS["H100"]
    return {
        "note": NOTE,
        "launch_seconds": cost.LAUNCH_SECONDS,
        "gpus": [asdict(gpu) for gpu in gpus],
        "predictions": [asdict(one) for one in found],
        "published": [
            {
                "label": one.label,
                "published_seconds": one.milliseconds / 1e3,
                "predicted_seconds": one.cost(size, h100).seconds(h100),
            }
            for one in PUBLISHED
        ],
    }


PLOTTED = (
    "floor", "sweep_rho_1", "store_rho_1", "sweep_rho_0.2", "store_rho_0.2", "trl", "liger", "torch"
)  # fmt: skip


def plot(found: Sequence[Prediction], path: Path) -> None:
    """One panel a GPU and shape, one bar a strategy, head trained; the floor as a line."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(one.shape for one in found))
    gpus = list(dict.fromkeys(one.gpu for one in found))
    figure = Figure(figsize=(2.2 + 2.6 * len(gpus), 1.0 + 2.2 * len(shapes)), layout="constrained")
    axes = figure.subplots(len(shapes), len(gpus), squeeze=False, sharey=True)
    for row, shape in enumerate(shapes):
        for column, gpu in enumerate(gpus):
            here = {one.key: one for one in found if (one.gpu, one.shape) == (gpu, shape)}
            _bars(axes[row, column], [here[key] for key in PLOTTED])
            axes[row, column].set_title(f"{gpu}, {shape}", fontsize=8.5)
    figure.suptitle(
        "Predicted (not measured) time of forward + backward in ms, bfloat16, head trained; "
        "line: the bare GEMMs",
        fontsize=11,
    )
    figure.savefig(path, dpi=140)


def _bars(panel: Axes, here: Sequence[Prediction]) -> None:
    floor, *shown = here
    times = [one.predicted_seconds * 1e3 for one in shown]
    colours = [OURS if one.key.startswith(("sweep", "store")) else PEER for one in shown]
    heights = list(range(len(shown)))
    panel.axvline(floor.predicted_seconds * 1e3, color="black", linewidth=0.9, zorder=0)
    bars = panel.barh(heights, times, color=colours, height=0.72)
    for text in panel.bar_label(bars, fmt="%.1f", padding=2, fontsize=7.5):
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    panel.set_yticks(heights, [one.label for one in shown])
    panel.set_xlim(0, 1.2 * max(times))
    panel.tick_params(labelsize=7.5)
    panel.spines[["top", "right"]].set_visible(False)
    if not panel.yaxis_inverted():
        panel.invert_yaxis()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--gpus", nargs="+", choices=GPUS, default=list(GPUS), metavar="NAME", help=", ".join(GPUS))
    add("--shapes", nargs="+", type=arguments.shape, default=SHAPES["cuda"], metavar="N/H/V")
    add("--output", type=Path, default=Path("runs/roofline"), metavar="DIR")
    args = parser.parse_args(argv)
    gpus = [GPUS[name] for name in args.gpus]
    found = predictions(gpus, args.shapes)
    console = Console()
    for shape in args.shapes:
        print_table(console, time_table(found, str(shape)))
    print_table(console, traffic_table(gpus, args.shapes))
    print_table(console, break_even_table(gpus, args.shapes))
    print_table(console, published_table())
    args.output.mkdir(parents=True, exist_ok=True)
    paths = [args.output / f"roofline.{kind}" for kind in ("md", "json", "png")]
    paths[0].write_text(markdown(found, gpus, args.shapes))
    paths[1].write_text(json.dumps(record(found, gpus), indent=1) + "\n")
    plot(found, paths[2])
    for path in paths:
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    main()
