"""The steps that are timed give the same gradients, and the bound counts what they do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_step, step
from benchmarks.bench_step import check, main, measure_peak
from benchmarks.memory import MEBIBYTE
from benchmarks.step import CONTENDERS, ModelSize, StepProblem, StepShape, row_pairs, step_flops
from selfdistill.model.attention.flex import FlexAttention
from selfdistill.model.layout import pack_groups

SIZE = ModelSize(
    layers=2, hidden=32, intermediate=48, heads=2, kv_heads=1, head_dim=16, vocabulary=97
)
SHAPE = StepShape(12, 7, 5, 3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_all_steps_have_the_same_gradients(family: str) -> None:
    pytest.importorskip("trl", reason="pip install trl==1.16.0")
    size = ModelSize(family, 2, 32, 48, 2, 1, 16, 97)
    errors = check(StepProblem(SHAPE, size), list(CONTENDERS))
    assert errors["naive"] == 0
    # 1e-4, of which two steps in float32 need a tenth; another gradient differs by percents.
    assert max(errors.values()) < bench_step.TOLERANCE


def test_a_different_step_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(problem: StepProblem) -> step.Step:
        whole = CONTENDERS["naive"](problem)

        def run() -> torch.Tensor:
            loss = whole()
            problem.model.get_input_embeddings().weight.grad.mul_(0.5)
            return loss

        return run

    monkeypatch.setitem(CONTENDERS, "shared", half)
    with pytest.raises(RuntimeError, match="shared at 12/7/5/3: gradients differ"):
        check(StepProblem(SHAPE, SIZE), ["shared"])


def test_pairs_are_those_of_the_mask() -> None:
    group = StepProblem(SHAPE, SIZE).group
    pack = pack_groups([group], share_student_prefix=True)
    for row in (pack.student, pack.teacher):
        queries = torch.arange(row.input_ids.shape[1])[:, None]
        keys = torch.arange(len(row.borrowed_index) + len(queries))[None]
        zero = torch.tensor(0)
        mask = FlexAttention(row, torch.device("cpu")).mask_mod(None)(zero, zero, queries, keys)
        assert row_pairs(row) == mask.sum()


def test_the_bound_by_hand() -> None:
    problem = StepProblem(SHAPE, SIZE)
    flops = step_flops(problem, share=False)
    # Rows of 18 and 23 tokens; a layer has 2 x 32 x 32 (q, o), 2 x 32 x 16 (k, v), 3 x 32 x 48.
    maps = 2048 + 1024 + 4608
    assert flops.linear == 2 * 2 * maps * (3 * 3 * 18 + 3 * 23)
    pairs = 3 * 18 * 19 // 2, 3 * 23 * 24 // 2
    assert flops.attention == 2 * 32 * (14 * pairs[0] + 4 * pairs[1])
    assert flops.head == 8 * 21 * 32 * 97
    less = step_flops(problem, share=True)
    # Student 12 + 3 x 6; the teacher borrows 8 and reads 5 + 4 + 6 for each rollout.
    assert less.linear == 2 * 2 * maps * (3 * 30 + 45)
    assert less.head == flops.head
    assert less.attention < flops.attention


def test_the_bounds_of_the_default_shapes() -> None:
    bounds = []
    for shape in step.SHAPES:
        problem = StepProblem(shape, ModelSize())
        flops = [step_flops(problem, share=share).total for share in (False, True)]
        bounds.append(flops[0] / flops[1])
    assert bounds == pytest.approx([2.798, 1.152], abs=1e-3)


@pytest.mark.parametrize("text", ["512/128/128", "a/1/1/1", "4/1/1/1"])
def test_bad_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shape: expected"):
        StepShape.parse(text)


def test_the_command_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "ModelSize", lambda **changes: SIZE)
    threads = str(torch.get_num_threads())
    options = ["--rounds", "1", "--no-memory", "--contenders", "shared", "--threads", threads]
    main(["--shapes", "12/7/5/3", *options, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "step.json").read_text())
    assert [entry["key"] for entry in found["entries"]] == ["naive", "shared"]
    assert found["entries"][1]["bound"] > 1
    assert "| shared prefix, fused loss | 12/7/5/3 |" in (tmp_path / "step.md").read_text()


def test_the_peak_counts_what_a_step_holds() -> None:
    size = ModelSize(layers=1, hidden=64, intermediate=4096, heads=2, head_dim=32, kv_heads=1)
    # The three activations of the wide layer alone.
    held = 3 * 4 * 8 * 127 * 4096
    assert measure_peak("naive", StepProblem(StepShape(64, 64, 8, 8), size)) > held > 40 * MEBIBYTE
