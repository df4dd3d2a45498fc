"""The gated feed-forward block over Phi-3's fused ``gate_up_proj``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# Shapes: D model, I intermediate
class Phi3MLP(nn.Module):
    """``down(up * silu(gate))`` with gate and up in one matrix, gate first.

    Source: transformers 5.23 ``Phi3MLP``.
    """

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module) -> None:
        """Take the two projections as built, with or without adapters.

        Args:
            gate_up_proj: D to twice the intermediate size.
            down_proj: Intermediate size to D.
        """
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [..., D]`` to ``[..., D]``."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))  # type: ignore[no-any-return]


def swiglu(gate_up: Tensor) -> Tensor:
    """Return ``up * silu(gate)``.

    Args:
        gate_up: Gate, then up, ``[..., 2 I]``.

    Returns:
        ``[..., I]``.
    """
    if torch.compiler.is_compiling():  # which fuses this into one pass by itself
        gate, up = gate_up.chunk(2, dim=-1)
        return up * F.silu(gate)
    out: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, where autograd keeps silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,), (g,) = ctx.saved_tensors, grads
        gate, up = gate_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_up)
        to_gate, to_up = both.chunk(2, dim=-1)  # written in place: no concatenation
        torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=to_gate)
        torch.mul(F.silu(gate), g, out=to_up)
        return both
