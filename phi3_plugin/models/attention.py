"""Self-attention over Phi-3's fused ``qkv_proj``: causal, windowed, within documents, or cached."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtune.modules import KVCache

from phi3_plugin.models.cache import Step
from phi3_plugin.models.masks import Documents, Mask, attend_within, take, windowed
from phi3_plugin.models.rope import RotaryEmbedding, rotate


# Shapes: B batch, S sequence, D model, H query heads, K key/value heads, F head dim
class Phi3Attention(nn.Module):
    """Grouped-query attention with rotary positions and a sliding window.

    Source: transformers 5.23 ``Phi3Attention``; rows of ``qkv_proj`` are q, k, v.
    """

    def __init__(
        self,
        qkv_proj: nn.Module,
        o_proj: nn.Module,
        rope: RotaryEmbedding,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int | None,
    ) -> None:
        """Take the two projections as built, with or without adapters.

        Args:
            qkv_proj: D to (H + 2K)·F.
            o_proj: H·F to D.
            rope: Shared by all layers.
            num_heads: H.
            num_kv_heads: K.
            head_dim: F.
            sliding_window: Keys a query sees, itself included; None sees all before it.
        """
        super().__init__()
        self.qkv_proj, self.o_proj, self.rope = qkv_proj, o_proj, rope
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sliding_window = sliding_window
        # The two names that torchtune's layer asks about.
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the key/value cache that torchtune's generation fills."""
        if self.kv_cache is not None:
            return
        self.kv_cache = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the key/value cache."""
        if self.kv_cache is None:
            raise RuntimeError("There is no key/value cache to reset: call setup_caches() first.")
        self.kv_cache.reset()

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        mask: Mask | Documents | Step = None,
        input_pos: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Attend within ``x [B, S, D]``.

        Args:
            x: Normalized hidden states.
            y: What torchtune's layer passes a second time; self-attention does not need it.
            mask: True where a query sees a key, ``[B, S, keys]``; None is causal. Or a block
                mask, which is how torchtune packs on a GPU; or the documents of a single row, or
                new tokens of cached rows, both of which know their positions.
            input_pos: Position of each token ``[B, S]``; None counts from 0.
            rows: Numbers of the tokens whose result is wanted, counted over all of B and S.

        Returns:
            ``[B, S, D]``, or of the wanted alone ``[1, rows, D]``.
        """
        if isinstance(mask, Documents | Step):
            qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
            heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            qkv = rotate(qkv, mask.cos, mask.sin, heads[0] + heads[1])
            if isinstance(mask, Step):
                out = mask.attend(qkv, heads)
            else:
                out = attend_within(qkv, heads, mask, self.sliding_window)
            return self.o_proj(take(out, rows))  # type: ignore[no-any-return]
        q, k, v = self._split_heads(self.qkv_proj(x), input_pos)
        offset = 0
        if self.kv_cache is not None and self.cache_enabled:
            offset = self.kv_cache.size
            k, v = self.kv_cache.update(k, v)
        seen = windowed(mask, q.shape[2], k.shape[2], offset, self.sliding_window, x.device)
        out = attend(q, k, v, seen).transpose(1, 2).flatten(2)
        return self.o_proj(take(out, rows))  # type: ignore[no-any-return]

    def _split_heads(self, qkv: Tensor, input_pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        q, k = self.rope(q, input_pos=input_pos), self.rope(k, input_pos=input_pos)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Attend with the mask as it is.

    Args:
        q: ``[B, H, S, F]``.
        k: ``[B, K, keys, F]``; each key/value head serves H / K query heads.
        v: As ``k``.
        mask: ``[B, S, keys]``, a block mask, or None for causal.

    Returns:
        ``[B, H, S, F]``.
    """
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):
        return _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=gqa)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=gqa)


@cache
def _flex(device: str) -> Callable[..., Tensor]:
    # Uncompiled it materializes every score, which only small tests can afford. It cannot be
    # compiled inside a compiled layer, so it is kept apart from that.
    if device == "cpu":
        return flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    apart: Callable[..., Tensor] = torch.compiler.disable(compiled, recursive=False)
    return apart
