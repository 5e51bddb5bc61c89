"""Which backend runs where, from facts of machines that are not this one."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

from selfdistill.cli import app
from selfdistill.model.attention import Facts, UnavailableBackendError, backend, choose_backend
from selfdistill.model.attention.backend import INSTALL_FLASH, INSTALL_TRITON, Obstacle, describe

ALL = Facts(flash=None, flex=None)
NO_FLASH = Facts(flash=Obstacle("flash-attn is not installed", INSTALL_FLASH), flex=None)
NOTHING = Facts(flash=NO_FLASH.flash, flex=Obstacle("no triton", INSTALL_TRITON))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "found", "name", "mend"),
    [
        ("cuda", torch.bfloat16, 128, ALL, "flash", None),
        ("cuda", torch.float16, 64, ALL, "flash", None),
        ("cuda", torch.float32, 64, ALL, "flex", "precision: bfloat16"),
        ("cuda", torch.bfloat16, 512, ALL, "flex", None),
        ("cuda", torch.bfloat16, 36, ALL, "flex", None),
        ("cuda", torch.bfloat16, None, NO_FLASH, "flex", INSTALL_FLASH),
        ("cuda", torch.bfloat16, None, NOTHING, "loop", f"{INSTALL_FLASH} or {INSTALL_TRITON}"),
        ("cuda", torch.float64, None, NO_FLASH, "loop", INSTALL_FLASH),
        ("cuda", torch.float32, 8, ALL, "loop", "precision: bfloat16"),
        ("cpu", torch.bfloat16, 64, ALL, "loop", None),
        ("mps", torch.float16, 64, ALL, "loop", None),
    ],
)
def test_auto_takes_the_fastest_that_runs(
    device: str,
    dtype: torch.dtype,
    head_dim: int | None,
    found: Facts,
    name: str,
    mend: str | None,
) -> None:
    choice = choose_backend("auto", device=device, dtype=dtype, head_dim=head_dim, found=found)
    assert (choice.name, choice.mend) == (name, mend)
    assert choice.reason


def test_one_can_be_asked_for_by_name() -> None:
    on_gpu = {"device": "cuda", "dtype": torch.bfloat16, "found": ALL}
    for name in ("loop", "flash", "flex"):
        assert choose_backend(name, **on_gpu).name == name
    with pytest.raises(ValueError, match=r"attention is 'sdpa', expected one of \['auto', 'loop'"):
        choose_backend("sdpa", **on_gpu)


@pytest.mark.parametrize(
    ("requested", "options", "message"),
    [
        ("flash", {"device": "cpu", "found": ALL}, "flash cannot run: .* need a GPU, not cpu"),
        ("flex", {"device": "cpu", "found": ALL}, "flex cannot run: .* need a GPU, not cpu"),
        ("flash", {"device": "cuda", "found": NO_FLASH}, "to mend it: pip install --no-build"),
        (
            "flash",
            {"device": "cuda", "found": ALL, "dtype": torch.float32},
            "not in float32; to mend it: precision: bfloat16",
        ),
    ],
)
def test_what_cannot_run_says_why(requested: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UnavailableBackendError, match=message):
        choose_backend(requested, **({"dtype": torch.bfloat16} | options))


def test_a_broken_flash_attn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert "needs compute capability 8.0, this GPU has 7.5" in backend._flash_obstacle().reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    obstacle = backend._flash_obstacle()
    assert "flash-attn cannot be imported (cannot import name" in obstacle.reason
    assert "--force-reinstall" in obstacle.mend
    sys.modules["flash_attn"].flash_attn_varlen_func = None
    assert backend._flash_obstacle() is None


def test_the_doctor_prints_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "facts", lambda: NO_FLASH)
    assert describe(device="cuda", dtype=torch.bfloat16)[:3] == [
        "Attention of the trainer, bfloat16 on cuda",
        "  flex, because: flash-attn is not installed",
        f"  for a faster one: {INSTALL_FLASH}",
    ]
    monkeypatch.setattr(backend, "facts", lambda: ALL)
    assert describe(device="cuda", dtype=torch.bfloat16)[1] == (
        "  flash: one call of flash-attn for the whole row"
    )
    printed = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--dtype", "float32"]).output
    assert "Attention of the trainer, float32 on cpu" in printed
    assert "  loop, because: flash and flex need a GPU, not cpu" in printed
