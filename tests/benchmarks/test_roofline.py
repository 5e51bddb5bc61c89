"""The predictions for GPUs; eager torch moves what the model counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import cost, roofline
from benchmarks.cost import GPUS, Size
from benchmarks.peers import contenders, materialised
from benchmarks.problems import OBJECTIVES, SHAPES, Shape, make_problem

SHAPE = SHAPES["cuda"][0]


class Traffic(TorchDispatchMode):
    """Bytes that operators other than GEMMs read and write, tensors of [N, V] only."""

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.logits = logits
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in (
            torch.ops.aten.mm.default,
            torch.ops.aten.detach.default,
        ):
            self.bytes += sum(map(self._size, tree_leaves((args, kwargs, result))))
        return result

    def _size(self, leaf: object) -> int:
        # An expanded scalar is no traffic.
        is_logits = (
            isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() >= self.logits
        )
        return leaf.numel() * leaf.element_size() if is_logits else 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_eager_torch_moves_what_the_model_counts(objective):
    shape = Shape(64, 8, 1024)
    step = materialised(make_problem(shape, torch.bfloat16, objective=objective))
    logits = shape.tokens * shape.vocabulary
    with Traffic(logits) as traffic:
        step()
    assert traffic.bytes / logits == pytest.approx(cost.EAGER_BYTES[objective], rel=1e-3)


def test_each_contender_of_the_divergences_has_a_prediction():
    gpu = GPUS["H100"]
    for key, contender in contenders(device="cuda").items():
        seconds = roofline.predict(key, SHAPE, "reverse_kl", "bfloat16", gpu)
        assert (seconds is None) == contender.compiled, key
        assert roofline.predict(key, SHAPE, "reverse_kl", "float32", gpu) is None


def test_predictions_of_cross_entropy_score_one_model():
    gpu = GPUS["H100"]
    made = {
        key: roofline.predict(key, SHAPE, "cross_entropy", "bfloat16", gpu)
        for key in contenders(objective="cross_entropy")
    }
    assert {key for key, seconds in made.items() if seconds is not None} == {
        "floor", "ours", "torch"
    }  # fmt: skip
    four = roofline.predict("floor", SHAPE, "reverse_kl", "bfloat16", gpu)
    assert made["floor"] == pytest.approx(four * 3 / 4, rel=0.01)


def test_a_mask_and_a_frozen_head_cost_less():
    gpu = GPUS["A100"]

    def seconds(key):
        return roofline.predict(key, SHAPE, "reverse_kl", "bfloat16", gpu)

    assert seconds("ours_rho_0.05") < seconds("ours_rho_0.2") < seconds("ours_rho_0.5")
    assert seconds("ours_frozen") < seconds("ours")
    assert seconds("trl_frozen") < seconds("trl")


def test_the_model_is_held_against_published_times():
    """Within a factor of two; the table says how far off."""
    table = roofline.published_table()
    assert [line[0] for line in table.body] == [
        "torch, JSD",
        "Liger fused JSD",
        "Liger chunked JSD",
    ]
    for _, published, predicted, ratio in table.body:
        assert float(ratio) == pytest.approx(float(predicted) / float(published), abs=0.01)
        assert 0.5 < float(ratio) < 2.0


def test_command_line(tmp_path, capsys):
    roofline.main(
        ["--gpus", "H100", "MI300X", "--shapes", "512/256/4096", "--output", str(tmp_path)]
    )
    record = json.loads((tmp_path / "roofline.json").read_text())
    lines = {(one["gpu"], one["key"]): one for one in record["predictions"]}
    of_the_design = [s for s in roofline.strategies() if s.key.startswith("design")]
    assert len(of_the_design) == 8
    assert len(lines) == 2 * len(roofline.strategies()) - len(of_the_design)  # not on an MI300X
    assert ("H100", "design_dense") in lines
    one, size = lines["H100", "sweep_rho_0.2"], Size(512, 256, 4096)
    made = cost.sweep_and_gradient(size, GPUS["H100"], rho=0.2)
    assert one["flops"] == made.flops
    assert one["bytes"] == made.bytes
    assert one["predicted_seconds"] == made.seconds(GPUS["H100"])
    assert len(record["published"]) == 3
    text = (tmp_path / "roofline.md").read_text()
    assert "**predicted**" in text
    assert "### Predicted ms, N/H/V 512/256/4096" in text
    assert "| store, rho 0.05, frozen |" in text
    table = text.split("### Predicted ms, N/H/V 512/256/4096")[1].split("###")[0]
    line = next(one for one in table.splitlines() if "specialised, dense |" in one)
    assert line.rstrip(" |").endswith("-")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Predicted DRAM traffic of the sweep" in printed
    assert "published" in printed


def test_every_strategy_is_there_for_every_rho_and_head():
    keys = {strategy.key for strategy in roofline.strategies()}
    for name in ("sweep", "store"):
        for rho in ("1", "0.5", "0.2", "0.05"):
            assert {f"{name}_rho_{rho}", f"{name}_rho_{rho}_frozen"} <= keys
    assert {"trl", "trl_frozen", "liger", "torch", "torch_frozen"} <= keys
    assert set(roofline.PLOTTED) <= keys
