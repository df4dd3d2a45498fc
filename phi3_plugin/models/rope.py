"""Rotary position embedding, halves style, with fp32 angles and LongRoPE's two sets of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phi3_plugin.config import Rope
from phi3_plugin.device import sent
from phi3_plugin.errors import ConfigError

FACTORS = ("auto", "short", "long")
"""Which of LongRoPE's sets turns a batch: the longest position decides, or always the one."""


# Shapes: B batch, S sequence, T tokens of all rows, F head dim, R rotated dims, P positions
class RotaryEmbedding(nn.Module):
    """Knows by which angle a position turns queries and keys.

    The tables are fp32 whatever the default dtype is: recipes build models under bf16,
    and a bf16 ``arange`` cannot tell position 257 from 256.

    With LongRoPE a batch whose longest position is below the original length turns by the short
    factors, any other by the long ones, all of its tokens alike.

    Source: Su et al. 2021, RoFormer, section 3.4; Ding et al. 2024, LongRoPE, section 3;
    transformers 5.23 ``Phi3RotaryEmbedding``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, rope: Rope, max_seq_len: int, factors: str = "auto") -> None:
        """Build the tables on the current default device.

        Args:
            rope: Frequencies, and how many dimensions of a head rotate.
            max_seq_len: P, number of positions.
            factors: One of `FACTORS`; without LongRoPE there is nothing to choose.

        Raises:
            ConfigError: There is no such choice.
        """
        super().__init__()
        if factors not in FACTORS or (factors != "auto" and not rope.scaling):
            raise ConfigError(
                f"rope_factors: {factors!r} must be auto"
                + (", short or long." if rope.scaling else ": this checkpoint has no LongRoPE.")
            )
        self.rope = rope
        self.max_seq_len = max_seq_len
        self.factors = factors
        self.switch: int | None = None  # the length that the short factors are for
        if rope.scaling is not None and factors == "auto":
            self.switch = rope.scaling.original_max_position_embeddings
        self.rope_init()

    def rope_init(self, device: torch.device | str | None = None) -> None:
        """Compute the tables ``cos, sin``; recipes call it after leaving the meta device.

        They are ``[P, R / 2]``, or with both sets the rows up to the original length by the short
        factors and then P rows by the long ones.
        """
        scaling, size = self.rope.scaling, self.max_seq_len
        if scaling is None:
            angles, scale = self._angles(None, size, device), 1.0
        else:
            sets = {
                "short": (scaling.short_factor, self.switch or size),
                "long": (scaling.long_factor, size),
            }
            chosen = sets.values() if self.factors == "auto" else [sets[self.factors]]
            angles = torch.cat([self._angles(f, length, device) for f, length in chosen])
            scale = scaling.attention_factor
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    def _angles(
        self, factors: tuple[float, ...] | None, length: int, device: torch.device | str | None
    ) -> Tensor:
        exact: Any = {"dtype": torch.float32, "device": device}
        share = torch.arange(0, self.rope.rotary_dim, 2, **exact) / self.rope.rotary_dim
        stretch = torch.tensor(factors, **exact) if factors else 1.0
        inv_freq = 1.0 / (stretch * self.rope.theta**share)
        angles: Tensor = torch.arange(length, **exact)[:, None] * inv_freq
        return angles

    def turns(
        self, length: int, input_pos: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for heads at these positions, ``[B, S, 1, R / 2]``.

        Args:
            length: S.
            input_pos: Position of each token ``[B, S]`` or ``[S]``; None counts from 0. The result
                has no B then.
            dtype: Of the heads.
        """
        places: slice | Tensor
        if input_pos is None:
            start = self.switch if self.switch is not None and length > self.switch else 0
            places = slice(start, start + length)
        elif self.switch is None:
            places = input_pos
        else:  # without asking the GPU for a number
            places = input_pos + self.switch * (input_pos.max() >= self.switch)
        return self._at(places, dtype)

    def turns_by_row(
        self, positions: Tensor, ends: Sequence[int], lengths: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines for rows side by side, each turned by its own length.

        Args:
            positions: Of the tokens of all rows ``[T]``.
            ends: Tokens of each row, those before the given ones included.
            lengths: Given tokens of each row.
            dtype: Of the heads.

        Returns:
            ``[T, 1, R / 2]`` each.
        """
        if self.switch is not None:
            shift = torch.tensor([self.switch if end > self.switch else 0 for end in ends])
            by_token = shift.repeat_interleave(torch.tensor(lengths), output_size=sum(lengths))
            positions = positions + sent(by_token, positions.device)
        return self._at(positions, dtype)

    def turns_alone(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the same for the last tokens of rows, from their positions on the device.

        Args:
            positions: One of each row, ``[N]``.
            dtype: Of the heads.

        Returns:
            ``[N, 1, R / 2]`` each.
        """
        if self.switch is not None:
            positions = positions + self.switch * (positions >= self.switch)
        return self._at(positions, dtype)

    def _at(self, places: slice | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = (table[places].to(dtype).unsqueeze(-2) for table in (self.cos, self.sin))
        return cos, sin


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> Tensor:
    """Rotate the first heads of fused projections by their position, in place.

    Args:
        qkv: ``[B, S, all heads F]``; the operation that made it must not need it any more. Not a
            view, or autograd copies all of its gradient twice more.
        cos: From :meth:`RotaryEmbedding.turns`.
        sin: Likewise.
        heads: How many of the heads rotate: those of queries and keys.
        head_dim: F.

    Returns:
        ``[B, S, all heads, F]``.
    """
    if torch.compiler.is_compiling():  # which decides itself what to write in place
        qkv = qkv.unflatten(-1, (-1, head_dim))
        half = cos.shape[-1]
        turned, values = qkv.split([heads, qkv.shape[2] - heads], dim=2)
        low, high, rest = turned.split([half, half, head_dim - 2 * half], dim=-1)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin, rest), dim=-1)
        return torch.cat((turned, values), dim=2)
    out: Tensor = _Rotate.apply(qkv, cos, sin, heads, head_dim)  # type: ignore[no-untyped-call]
    apart: Tensor = out.unflatten(-1, (-1, head_dim))
    return apart


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int
    ) -> Tensor:
        ctx.mark_dirty(qkv)
        ctx.save_for_backward(cos, sin)
        ctx.heads, ctx.head_dim = heads, head_dim
        _turn(qkv.unflatten(-1, (-1, head_dim))[:, :, :heads], cos, sin)
        return qkv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        g = grads[0].clone()
        _turn(g.unflatten(-1, (-1, ctx.head_dim))[:, :, : ctx.heads], cos, -sin)
        return g, None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    half = cos.shape[-1]
    low, high = x[..., :half], x[..., half : 2 * half]
    turned = (low * cos).sub_(high * sin)
    high.mul_(cos).add_(low * sin)
    low.copy_(turned)
