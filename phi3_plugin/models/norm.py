"""RMSNorm with the order of operations of Hugging Face's Phi-3."""

import torch
from torch import Tensor, nn


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
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.scale * wide.to(x.dtype)
