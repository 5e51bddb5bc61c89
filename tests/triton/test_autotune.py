"""Choice of the fastest tile and its file; the times are made up."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import AdvantageMask, fused_linear_distillation
from selfdistill_kernels.backends.triton import autotune, backend
from selfdistill_kernels.backends.triton.plan import INTERPRETER, Configuration, key_of
from selfdistill_kernels.backends.triton.tuned_tiles import (
    cache_file,
    read_tuned,
    save_tuned,
    tiles_in_use,
)

TILES = [Configuration(16, 32, 16, 1, 4, stages) for stages in (1, 2, 3)]


@pytest.fixture(autouse=True)
def settle_tiles_anew():
    tiles_in_use.cache_clear()
    yield
    tiles_in_use.cache_clear()


def test_fastest_passes_over_tiles_that_do_not_run():
    def seconds(tile):
        if tile.stages == 1:
            raise RuntimeError("out of shared memory")
        return {2: 0.5, 3: 0.25}[tile.stages]

    assert autotune.fastest(TILES, seconds) == (TILES[2], 0.25)
    with pytest.raises(RuntimeError, match="out of shared memory"):
        autotune.fastest(TILES[:1], seconds)


def test_tuned_tiles_are_used_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFDISTILL_AUTOTUNE_FILE", str(tmp_path / "deep" / "triton.json"))
    tile = Configuration(32, 32, 16, 1, 4, 2)
    path = cache_file()
    save_tuned(path, key_of(INTERPRETER, "sweep", 4, heavy=True), TILES[0])
    save_tuned(path, key_of(INTERPRETER, "sweep", 4, heavy=True), tile)
    used = []

    def record(kernel, programs, shape, arguments, constants):
        used.append((kernel.fn.__name__, constants.get("BLOCK_ROWS")))
        backend.run(kernel, programs, shape, arguments, constants)

    case = make_case(3, 16, 70, seed=1, dtype=torch.float32)

    def rows_of_the_sweep():
        used.clear()
        tiles_in_use.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(backend.TritonBackend.__init__, "__defaults__", (None, record, None))
            case.call(
                fused_linear_distillation, backend="triton", advantage_mask=AdvantageMask(0.0)
            )
        return dict(used)["sweep_kernel"]

    assert rows_of_the_sweep() == 16
    monkeypatch.setenv("SELFDISTILL_AUTOTUNE", "1")
    assert rows_of_the_sweep() == 32


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "triton.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"triton\.json.*tune again"):
        read_tuned(path)


def test_a_launch_asks_neither_the_environment_nor_a_file(tmp_path, monkeypatch):
    case = make_case(3, 16, 70, seed=1, dtype=torch.float32)
    case.call(fused_linear_distillation, backend="triton")
    monkeypatch.setenv("SELFDISTILL_AUTOTUNE", "1")
    monkeypatch.setenv("SELFDISTILL_AUTOTUNE_FILE", str(tmp_path / "triton.json"))
    (tmp_path / "triton.json").write_text("no table")
    case.call(fused_linear_distillation, backend="triton")
    tiles_in_use.cache_clear()  # as in a new process
    with pytest.raises(ValueError, match="tune again"):
        case.call(fused_linear_distillation, backend="triton")


def test_help_is_whole_and_without_a_warning():
    module = "selfdistill_kernels.backends.triton.autotune"
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
    assert "~/.cache/selfdistill/triton.json" in run.stdout
    assert "SELFDISTILL_AUTOTUNE_FILE" in run.stdout


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        autotune.main(["--hidden", "64", "--vocabulary", "128"])
    assert stopped.value.code == 0
    assert "no GPU here" in capsys.readouterr().err
