"""The gated feed-forward block over Phi-3's fused ``gate_up_proj``."""

import torch.nn.functional as F
from torch import Tensor, nn


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
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * F.silu(gate))  # type: ignore[no-any-return]
