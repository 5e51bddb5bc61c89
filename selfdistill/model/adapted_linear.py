"""A linear layer with a LoRA adapter as one function: y = x W^T + s (x A^T) B^T.

peft writes it as two layers, a product with the scale and a sum, each of them a pass over [tokens,
out] forward and again backward. Here the adapter's part is added where the layer's own product
lies, and the scale multiplies [tokens, r]. The same sums in another order: results differ by
rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


def compute_adapters_at_once(model: nn.Module) -> None:
    """Let every linear layer that peft has adapted compute as one function.

    Their class changes to a subclass of peft's, so adapters are still saved, switched off and
    merged as before. What is not a plain LoRA of one adapter is left to peft, call by call.
    """
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = AdaptedLinear


class AdaptedLinear(Linear):
    """peft's layer; see the module."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] gives [..., out]."""
        if args or kwargs or not self._is_plain(x):
            return cast(Tensor, super().forward(x, *args, **kwargs))
        (name,) = self.active_adapters
        weight, bias, scaling = self.base_layer.weight, self.base_layer.bias, self.scaling[name]
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        y = _AdaptedProduct.apply(x.reshape(-1, x.shape[-1]), weight, bias, down, up, scaling)
        return cast(Tensor, y).view(*x.shape[:-1], -1)

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the layer computes what the module says, with a frozen weight, in one dtype."""
        base, names = self.base_layer, self.active_adapters
        if self.disable_adapters or self.merged or type(base) is not nn.Linear or len(names) != 1:
            return False
        name = names[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return False
        down, up = self.lora_A[name], self.lora_B[name]
        parameters = [p for p in (base.weight, base.bias) if p is not None]
        return (
            type(down) is type(up) is nn.Linear
            and x.dtype == base.weight.dtype == down.weight.dtype == up.weight.dtype
            and not any(p.requires_grad for p in parameters)
            and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
            and not torch.is_autocast_enabled(x.device.type)
        )


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        inner = x @ down.t()
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.scaling = scaling
        return linear(x, weight, bias).addmm_(inner, up.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        inner_gradient = (gradient @ up).mul_(ctx.scaling)
        down_gradient = inner_gradient.t() @ x
        up_gradient = (gradient.t() @ inner).mul_(ctx.scaling)
        x_gradient = None
        # The first layer reads embeddings, which are frozen.
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ weight).addmm_(inner_gradient, down)
        return x_gradient, None, None, down_gradient, up_gradient, None
