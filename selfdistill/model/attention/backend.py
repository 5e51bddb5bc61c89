"""Who computes the scores of a prefix tree, and why.

    loop   `scaled_dot_product_attention`, batch of segments after batch: any device, the oracle
    flash  flash-attn's variable-length kernel: CUDA, 16 bits
    flex   FlexAttention, compiled for the row's mask: CUDA

All three compute the same numbers, rounding aside. The choice is a pure function of the device, the
dtype and `Facts`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, TypeAlias, get_args

import torch

from selfdistill.errors import UserError
from selfdistill.model.layout import PackedRow

INSTALL_FLASH = "pip install --no-build-isolation 'flash-attn>=2.4.1'"
REINSTALL_FLASH = "pip install --no-build-isolation --no-deps --force-reinstall flash-attn"
INSTALL_TRITON = "pip install 'triton>=3.5,<3.10'"

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLEX_DTYPES = (*_FLASH_DTYPES, torch.float32)
_FLASH_HEAD_DIM = 256
_FLEX_HEAD_DIM = 16


class Backend(Protocol):
    """Attention over the one row that it was made for."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attend within one layer; differentiable.

        Args:
            query: [1, heads, L, head_dim] of the whole row.
            key, value: [1, kv_heads, borrowed + L, head_dim], the borrowed ones first; the same
                dtype as `query`, and `value` may be narrower.
            scaling: of the scores; None: 1 / sqrt(head_dim).
            sliding_window: most keys that one query sees, itself included; None: all.

        Returns:
            [1, L, heads, head_dim of value].
        """
        ...


BackendName: TypeAlias = Literal["loop", "flash", "flex"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


def build_backend(name: BackendName, row: PackedRow, device: torch.device) -> Backend:
    """Return a backend for one row; the others are not loaded.

    Args:
        name: which one, as `choose_backend` chose.
        row: the packed row.
        device: where the model computes.

    Raises:
        ImportError: flash-attn was asked for and is not installed.
    """
    match name:
        case "loop":
            from selfdistill.model.attention.loop import LoopAttention

            return LoopAttention(row, device)
        case "flash":
            from selfdistill.model.attention.flash import FlashAttention

            return FlashAttention(row, device)
        case "flex":
            from selfdistill.model.attention.flex import FlexAttention

            return FlexAttention(row, device)


class UnavailableBackendError(UserError):
    """An attention backend was asked for by name and cannot run here."""


@dataclass(frozen=True)
class Obstacle:
    """Why a backend cannot run.

    Attributes:
        reason: for a person.
        mend: the command or setting that mends it; None where nothing does.
    """

    reason: str
    mend: str | None = None


@dataclass(frozen=True)
class Facts:
    """What this machine lacks; None where nothing is missing."""

    flash: Obstacle | None
    flex: Obstacle | None


@dataclass(frozen=True)
class Choice:
    """The backend that computes.

    Attributes:
        name: one of BACKENDS.
        reason: why this one.
        mend: what would bring a faster one, if anything.
    """

    name: BackendName
    reason: str
    mend: str | None = None


@cache
def facts() -> Facts:
    """Look at this machine, once; flash-attn is imported only where there is a GPU for it."""
    triton = importlib.util.find_spec("triton")
    return Facts(
        flash=_flash_obstacle(),
        flex=None
        if triton is not None
        else Obstacle(
            "triton, which FlexAttention needs on a GPU, is not installed", INSTALL_TRITON
        ),
    )


def _flash_obstacle() -> Obstacle | None:
    if importlib.util.find_spec("flash_attn") is None:
        return Obstacle("flash-attn is not installed", INSTALL_FLASH)
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return Obstacle(f"flash-attn needs compute capability 8.0, this GPU has {major}.{minor}")
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401  (only whether it can be)
    except Exception as error:  # what a binary built for another torch raises is not one type
        return Obstacle(f"flash-attn cannot be imported ({error})", REINSTALL_FLASH)
    return None


def choose_backend(
    requested: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: int | None = None,
    found: Facts | None = None,
) -> Choice:
    """Choose the backend: flash where it runs, else flex where it runs, else loop.

    Args:
        requested: "auto" or one of BACKENDS.
        device: type of device, such as "cpu" or "cuda".
        dtype: in which the attention computes (that of autocast, where it is on).
        head_dim: of queries and keys; None: unknown, taken to fit.
        found: what the machine lacks; None looks.

    Raises:
        ValueError: there is no such backend.
        UnavailableBackendError: the requested one cannot run, with the reason and what mends it.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"attention is {requested!r}, expected one of {['auto', *BACKENDS]}")
    obstacles = _obstacles(device, dtype, head_dim, found or facts())
    if requested in obstacles:
        obstacle = obstacles[requested]
        mend = f"; to mend it: {obstacle.mend}" if obstacle.mend else "; use attention: auto"
        raise UnavailableBackendError(f"attention: {requested} cannot run: {obstacle.reason}{mend}")
    for name in BACKENDS:
        if requested == name:
            return Choice(name, "asked for")
    if "flash" not in obstacles:
        return Choice("flash", "one call of flash-attn for the whole row")
    flash = obstacles["flash"]
    if "flex" not in obstacles:
        return Choice("flex", flash.reason, flash.mend)
    flex = obstacles["flex"]
    if flash == flex:
        return Choice("loop", flash.reason, flash.mend)
    mends = " or ".join(mend for mend in (flash.mend, flex.mend) if mend is not None)
    return Choice("loop", f"{flash.reason}; {flex.reason}", mends or None)


def _obstacles(
    device: str, dtype: torch.dtype, head_dim: int | None, found: Facts
) -> dict[str, Obstacle]:
    """Return why each backend cannot run; backends that can run are left out."""
    if device != "cuda":
        return dict.fromkeys(
            ("flash", "flex"), Obstacle(f"flash and flex need a GPU, not {device}")
        )
    name = str(dtype).removeprefix("torch.")
    obstacles = {}
    if found.flash is not None:
        obstacles["flash"] = found.flash
    elif dtype not in _FLASH_DTYPES:
        obstacles["flash"] = Obstacle(
            f"flash-attn computes in float16 and bfloat16, not in {name}", "precision: bfloat16"
        )
    elif head_dim is not None and (head_dim > _FLASH_HEAD_DIM or head_dim % 8):
        obstacles["flash"] = Obstacle(
            f"flash-attn takes a head_dim up to {_FLASH_HEAD_DIM} in steps of 8, not {head_dim}"
        )
    if found.flex is not None:
        obstacles["flex"] = found.flex
    elif dtype not in _FLEX_DTYPES:
        obstacles["flex"] = Obstacle(f"FlexAttention does not compute in {name}")
    elif head_dim is not None and head_dim < _FLEX_HEAD_DIM:
        obstacles["flex"] = Obstacle(
            f"FlexAttention takes a head_dim from {_FLEX_HEAD_DIM}, not {head_dim}"
        )
    return obstacles


def describe(*, device: str, dtype: torch.dtype) -> list[str]:
    """Lines for the doctor: what "auto" takes, why, and what would bring a faster one."""
    name = str(dtype).removeprefix("torch.")
    choice = choose_backend("auto", device=device, dtype=dtype)
    lines = [
        f"Attention of the trainer, {name} on {device}",
        f"  {choice.name}, because: {choice.reason}"
        if choice.mend or choice.name == "loop"
        else f"  {choice.name}: {choice.reason}",
    ]
    if choice.mend is not None:
        lines.append(f"  for a faster one: {choice.mend}")
    if device == "cuda" and not torch.cuda.is_available():
        lines.append("  on a machine with a GPU: this one has none that torch can use")
    return lines
