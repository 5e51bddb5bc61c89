"""Choice of the fastest tile and its file; the times are made up."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_case

from selfdistill_kernels import AdvantageMask, fused_linear_distillation
from selfdistill_kernels.backends.triton import autotune, backend
from selfdistill_kernels.backends.triton.plan import INTERPRETER, Configuration, key_of

TILES = [Configuration(16, 32, 16, 1, 4, stages) for stages in (1, 2, 3)]


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
    path = autotune.cache_file()
    autotune.save_tuned(path, key_of(INTERPRETER, "sweep", 4, heavy=True), TILES[0])
    autotune.save_tuned(path, key_of(INTERPRETER, "sweep", 4, heavy=True), tile)
    used = []

    def record(kernel, programs, shape, arguments, constants):
        used.append((kernel.fn.__name__, constants.get("BLOCK_ROWS")))
        backend.run(kernel, programs, shape, arguments, constants)

    case = make_case(3, 16, 70, seed=1, dtype=torch.float32)

    def rows_of_the_sweep():
        used.clear()
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
        autotune.read_tuned(path)


def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        autotune.main(["--hidden", "64", "--vocabulary", "128"])
    assert stopped.value.code == 0
    assert "no GPU here" in capsys.readouterr().err
