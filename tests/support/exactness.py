"""The one rule for tolerances: a result is as exact as plain torch's on this machine.

Another processor, BLAS, torch or number of threads rounds in another way. It does so for plain
torch, too, which computes the same numbers in the same dtype in the same test; both are held
against float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Values = Tensor | Mapping[str, Tensor]


def relative_error(got: Tensor, exact: Tensor, *, floor: float = 0.0) -> float:
    """Largest |got - exact| over the largest |exact|, or over `floor` where that is larger."""
    if exact.numel() == 0:
        return 0.0
    scale = exact.detach().double().abs().max().clamp(min=max(floor, 1e-30))
    return float((got.detach().double() - exact.detach().double()).abs().max() / scale)


def assert_no_worse_than_torch(
    name: str,
    ours: Values,
    torchs: Values,
    exact: Values,
    *,
    factor: float = 3.0,
    floor: float = 0.0,
    roundings: int = 8,
) -> None:
    """Largest relative error at most `factor` times that of plain torch, plus a few roundings.

    Both errors are luck on one problem (tests/selfdistill_kernels/test_loss.py compares means over
    many), hence the factor; where plain torch happens to hit the exact value, the roundings remain.

    Args:
        name: of the result, for the message.
        ours, torchs, exact: the result, plain torch's and the one in float64, each a tensor or all
            tensors of one computation by name. Of several the worst of either side counts: one
            small tensor is luck, the worst gradient of a model is less so.
        factor: how many times plain torch's error is allowed.
        floor: a size below which errors are not relative, such as 1.0 for sums of log-probs.
        roundings: of our dtype, relative to the largest value, allowed beside.
    """
    ours, torchs, exact = ({name: v} if isinstance(v, Tensor) else v for v in (ours, torchs, exact))
    assert ours.keys() == torchs.keys() == exact.keys(), f"{name}: other tensors"
    errors = {key: relative_error(ours[key], exact[key], floor=floor) for key in exact}
    theirs = [relative_error(torchs[key], exact[key], floor=floor) for key in exact]
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in ours.values())
    allowed = factor * max(theirs) + roundings * epsilon
    for key, error in errors.items():
        where = name if key == name else f"{name}, {key}"
        assert error <= allowed, f"{where}: relative error {error:.2e}, allowed {allowed:.2e}"
