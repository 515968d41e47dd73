"""A layer with a LoRA as one operation: peft's own takes several passes over all tokens.

In float32 the layer computes with W + s B A, formed at each call, which costs as much as a few
tokens. In half precision a small B A would be lost in the rounding of W, so it is added to what W
gives, in place. A and B get gradients in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

NARROW = 256
"""Up to so many inputs and outputs, the gradient of W is a cheaper way to those of A and B than
four products with matrices of their rank."""


class _Product(torch.autograd.Function):
    """x (W + s B A)^T + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Outputs [..., out] of inputs [..., in]; `down` is A [rank, in] and `up` B [out, rank]."""
        flat = x.flatten(0, -2)  # to keep: `x` can be a slice of something large
        ctx.save_for_backward(flat, weight, down, up)
        ctx.scale, ctx.shape = scale, x.shape
        if weight.dtype == torch.float32:
            y = functional.linear(flat, _formed(weight, down, up, scale), bias)
        else:
            y = functional.linear(flat, weight, bias)
            y.addmm_(functional.linear(flat, down.to(x.dtype)), (up * scale).to(x.dtype).T)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        flat, weight, down, up = ctx.saved_tensors
        g, scale, exact = gradient.flatten(0, -2), ctx.scale, weight.dtype == torch.float32
        flat, wide = flat.float(), g.float()
        back = None
        if exact and max(weight.shape) <= NARROW:
            whole = (wide.T @ flat) * scale
            of_down, of_up = up.T @ whole, whole @ down.T
        else:
            of_down, of_up = ((wide @ up) * scale).T @ flat, wide.T @ ((flat @ down.T) * scale)
        if ctx.needs_input_grad[0]:
            if exact:
                back = g @ _formed(weight, down, up, scale)
            else:
                through = g @ (up * scale).to(g.dtype)
                back = (g @ weight).addmm_(through, down.to(g.dtype))
            back = back.view(ctx.shape)
        return back, None, None, of_down, of_up, None


def _formed(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, up.float(), down.float(), alpha=scale)


class OneProduct(Linear):  # type: ignore[misc]
    """peft's layer, computed at once while one adapter is on."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Outputs [..., out] of inputs [..., in]."""
        if self.disable_adapters or len(self.active_adapters) != 1:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        base: torch.nn.Linear = self.base_layer
        down, up = (side[name].weight for side in (self.lora_A, self.lora_B))
        given = x, base.weight, base.bias, down, up, self.scaling[name]
        found: Tensor = _Product.apply(*given)  # type: ignore[no-untyped-call]
        return found


def install(network: Any, targets: Sequence[str], rank: int, alpha: float) -> None:
    """Put a LoRA on the layers of a network whose names end so.

    Raises:
        ValueError: of the names of `targets` that no layer has, or that cannot take a LoRA.
    """
    layers = "".join(f".{name}\n" for name, _ in network.named_modules())
    # peft is content where it finds one of them.
    absent = [name for name in targets if f".{name}\n" not in layers]
    if absent:
        raise ValueError(",".join(absent))
    try:
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    except ValueError as problem:
        raise ValueError(",".join(targets)) from problem
    quicken(network)


def quicken(network: torch.nn.Module) -> None:
    """Let the layers of a plain LoRA compute at once; others, such as convolutions, stay."""
    for layer in network.modules():
        kind: Any = layer
        if type(layer) is Linear and not (kind.lora_variant or any(kind.lora_bias.values())):
            kind.__class__ = OneProduct
