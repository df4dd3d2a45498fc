"""RMSNorm with the order of operations of Hugging Face's Phi-3."""

from typing import Any

import torch
from torch import Tensor, nn


# Shapes: D model
class RMSNorm(nn.Module):
    """Root mean square norm: computed in fp32, cast back, then multiplied by the scale.

    torchtune's own RMSNorm multiplies before it casts, which differs in bf16.

    Source: transformers 5.23 ``Phi3RMSNorm``.
    """

    def __init__(self, dim: int, eps: float) -> None:
        """Start as the identity scale.

        Args:
            dim: Width of the last axis.
            eps: Added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis of ``x [..., D]``."""
        if torch.compiler.is_compiling():  # which fuses this into one pass by itself
            wide = x.float()
            return self.scale * (wide * _inverse(wide, self.eps)).to(x.dtype)
        out: Tensor = _RMSNorm.apply(x, self.scale, self.eps)  # type: ignore[no-untyped-call]
        return out


def _inverse(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input as it is, where autograd keeps it twice more in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = _inverse(wide, eps)
        ctx.save_for_backward(x, inverse, scale)
        return scale * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, scale = ctx.saved_tensors
        normed, g = x * inverse, grads[0].float()  # fp32: the inverse is
        gx = gscale = None
        if ctx.needs_input_grad[1]:
            gscale = (g * normed).flatten(0, -2).sum(0).to(scale.dtype)
        if ctx.needs_input_grad[0]:
            g = g * scale
            mean = (g * normed).mean(-1, keepdim=True)
            gx = g.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype)
        return gx, gscale, None
