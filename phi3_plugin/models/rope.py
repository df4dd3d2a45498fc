"""Rotary position embedding, halves style, with fp32 angles."""

import torch
from torch import Tensor, nn


# Shapes: B batch, S sequence, H heads, F head dim, P positions
class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their position.

    The tables are fp32 whatever the default dtype is: recipes build models under bf16,
    and a bf16 ``arange`` cannot tell position 257 from 256.

    Source: Su et al. 2021, RoFormer, section 3.4; transformers 5.23 ``Phi3RotaryEmbedding``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float) -> None:
        """Build the tables on the current default device.

        Args:
            head_dim: F, width of one head.
            max_seq_len: P, number of positions in the tables.
            theta: Base of the frequencies.
        """
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self.rope_init()

    def rope_init(self, device: torch.device | str | None = None) -> None:
        """Compute the tables ``cos, sin [P, F]``; recipes call it after leaving the meta device."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        inv_freq = 1.0 / (self.theta ** (pairs / self.head_dim))
        positions = torch.arange(self.max_seq_len, dtype=torch.float32, device=device)
        angles = (positions[:, None] * inv_freq).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """Rotate ``x [B, S, H, F]``.

        Args:
            x: Queries or keys.
            input_pos: Position of each token ``[B, S]`` or ``[S]``; None counts from 0.
        """
        rows = slice(x.shape[1]) if input_pos is None else input_pos
        cos, sin = self.cos[rows].to(x.dtype), self.sin[rows].to(x.dtype)
        low, high = x.chunk(2, dim=-1)
        rotated = torch.cat((-high, low), dim=-1)
        return x * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)
