"""Self-attention over Phi-3's fused ``qkv_proj``, and which keys a query sees.

What attends is an object that knows its tokens' positions and what each of them sees:

    Dense      rows of one length, causal or by a mask: how torchtune's recipes call the model
    Documents  documents side by side in one row, each within itself: how we train
    Step       new tokens of rows whose past is cached: how we generate, in cache.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    flex_attention,
)
from torch.nn.attention.varlen import varlen_attn
from torchtune.modules import KVCache

from phi3_plugin.device import sent
from phi3_plugin.models.rope import RotaryEmbedding, rotate

Mask = Tensor | BlockMask | None
"""True where a query sees a key, ``[B, S, keys]``; on a GPU torchtune packs with a block mask
instead; None is causal."""

QUERIES = 512
"""Those of a row longer than the window that are computed at a time."""


# Shapes: B batch, S sequence, T tokens of all documents, D model, H query heads, K key/value heads,
# F head dim, R rotated dims
class Attends(Protocol):
    """Tokens that are to attend."""

    cos: Tensor
    """By which the heads turn, ``[B, S, 1, R / 2]`` or without B."""
    sin: Tensor
    """Likewise."""

    def attend(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        """Return what the queries find, ``[B, S, H F]``.

        Args:
            qkv: Queries, keys and values, rotated, ``[B, S, H + 2 K, F]``.
            heads: H, K and K.
            window: Keys a query sees, itself included; None sees all before it.
        """


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
        self.qkv_proj = qkv_proj
        self.o_proj = o_proj
        self.rope = rope
        self.heads = [num_heads, num_kv_heads, num_kv_heads]
        self.head_dim = head_dim
        self.sliding_window = sliding_window
        # The two names that torchtune's layer asks about
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def forward(self, x: Tensor, attends: Attends, rows: Tensor | None = None) -> Tensor:
        """Attend within ``x [B, S, D]``.

        Args:
            x: Normalized hidden states.
            attends: What the tokens see.
            rows: Numbers of the tokens whose result is wanted, counted over all of B and S.

        Returns:
            ``[B, S, D]``, or of the wanted alone ``[1, rows, D]``.
        """
        rotated = self.heads[0] + self.heads[1]
        qkv = rotate(self.qkv_proj(x), attends.cos, attends.sin, rotated, self.head_dim)
        out = attends.attend(qkv, self.heads, self.sliding_window)
        return self.o_proj(take(out, rows))  # type: ignore[no-any-return]

    def dense(self, x: Tensor, mask: Mask, input_pos: Tensor | None) -> "Dense":
        """Return what attends as torchtune says it.

        Args:
            x: Hidden states ``[B, S, D]``.
            mask: See `Mask`.
            input_pos: Position of each token ``[B, S]``; None counts from 0.
        """
        cos, sin = self.rope.turns(x.shape[1], input_pos, x.dtype)
        return Dense(cos, sin, mask, self.kv_cache if self.cache_enabled else None)

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the key/value cache that torchtune's generation fills."""
        if self.kv_cache is None:
            self.kv_cache = KVCache(batch_size, max_seq_len, self.heads[1], self.head_dim, dtype)
            self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the key/value cache."""
        if self.kv_cache is None:
            raise RuntimeError("There is no key/value cache to reset: call setup_caches() first.")
        self.kv_cache.reset()


@dataclass
class Dense:
    """Rows of one length, which see what comes before them or what a mask says."""

    cos: Tensor
    sin: Tensor
    mask: Mask = None
    cache: KVCache | None = None
    """torchtune's, which takes the new keys and returns all."""

    def attend(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        """See :meth:`Attends.attend`."""
        q, k, v = qkv.transpose(1, 2).split(heads, dim=1)
        offset: int | Tensor = 0
        if self.cache is not None:  # a compiled model must not ask for the number
            place = self.cache.cache_pos[0]  # moved on by the update
            offset = place.clone() if torch.compiler.is_compiling() else self.cache.size
            k, v = self.cache.update(k, v)
        mask = windowed(self.mask, q.shape[2], k.shape[2], offset, window, q.device)
        gqa = heads[0] != heads[1]
        if isinstance(mask, BlockMask):
            out = _flex(q.device.type)(q, k, v, block_mask=mask, enable_gqa=gqa)
        elif mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)


@cache
def _flex(device: str) -> Callable[..., Tensor]:
    # Uncompiled it materializes every score, which only small tests can afford. It cannot be
    # compiled inside a compiled layer, so it is kept apart from that.
    if device == "cpu":
        return flex_attention
    compiled = torch.compile(flex_attention, dynamic=False)
    apart: Callable[..., Tensor] = torch.compiler.disable(compiled, recursive=False)
    return apart


def windowed(
    mask: Mask,
    queries: int,
    keys: int,
    offset: int | Tensor,
    window: int | None,
    device: torch.device,
) -> Mask:
    """Restrict a mask to the sliding window.

    The window counts places in the sequence, not restarted positions; inside one packed
    document the two differ by a constant.

    Args:
        mask: See `Mask`.
        queries: How many there are.
        keys: Likewise.
        offset: Place of the first query among the keys (what a key/value cache already holds).
        window: Number of keys a query sees, itself included; None is no limit.
        device: Where the mask is needed.

    Returns:
        ``mask`` itself when the window hides nothing, else a new one.

    Source: transformers 5.23 ``sliding_window_overlay``: key > query - window.
    """
    if window is None or keys <= window:
        return mask
    if isinstance(mask, BlockMask):
        return _windowed_blocks(mask, window)
    if isinstance(offset, Tensor):
        band = _causal_band(queries, keys, offset, window, device)
    elif offset + queries <= window:
        return mask
    else:
        band = causal_band(queries, keys, offset, window, device)
    return band[None] if mask is None else mask & band


# Every layer of a step asks for the same ones.
@lru_cache(maxsize=4)
def causal_band(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, ``[queries, keys]``; see :func:`windowed`."""
    return _causal_band(queries, keys, offset, window, device)


def _causal_band(
    queries: int, keys: int, offset: int | Tensor, window: int, device: torch.device
) -> Tensor:
    query = offset + torch.arange(queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    return (key <= query) & (key > query - window)


@lru_cache(maxsize=1)
def _windowed_blocks(mask: BlockMask, window: int) -> BlockMask:
    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key > query - window

    return create_block_mask(
        and_masks(mask.mask_mod, in_window),
        mask.shape[0],
        None,
        *mask.seq_lengths,
        device=mask.kv_num_blocks.device,
        BLOCK_SIZE=mask.BLOCK_SIZE,
    )


@dataclass
class Documents:
    """Documents side by side in one row, which attend within themselves: no mask of all pairs.

    Worked out once for all layers.
    """

    lengths: tuple[int, ...]
    """Tokens of each document, from the first token on; T in all."""
    cos: Tensor
    sin: Tensor

    def __post_init__(self) -> None:
        """Put the borders on the device, and find what else the kernel asks.

        Here, since a compiled layer that looked at the lengths would be compiled for each pack.
        """
        self.borders = borders_of(self.lengths, self.cos.device)
        self.longest = max(self.lengths)
        self.has_flash = has_flash(self.cos.device)

    def attend(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        """See :meth:`Attends.attend`."""
        if self.has_flash and qkv.dtype.itemsize == 2:  # the kernel knows no fp32
            return self.by_kernel(qkv, heads, window)
        out: Tensor = self._one_by_one(qkv, heads, window)
        return out

    def by_kernel(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        """Attend in all documents at once."""
        q, k, v = qkv[0].split(heads, dim=1)
        seen = (-1 if window is None else window - 1, 0)
        how: Any = {"window_size": seen, "enable_gqa": heads[0] != heads[1]}
        ends = self.borders, self.borders, self.longest, self.longest
        out: Any = varlen_attn(q, k, v, *ends, **how)
        attended: Tensor = out.flatten(1)[None]
        return attended

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _one_by_one(self, qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
        found = []
        # Split once, so that the backward pass joins once: a slice of each would be padded to all
        for document in qkv.split(self.lengths, dim=1):
            q, k, v = document.transpose(1, 2).split(heads, dim=1)
            found.append(attend_causally(q, k, v, window).transpose(1, 2).flatten(2))
        return torch.cat(found, dim=1)


def has_flash(device: torch.device) -> bool:
    """Whether FlashAttention's kernels run on a device: CUDA from compute capability 8.0 on.

    A T4 and a V100 have less. Of a GPU that is only planned for it is assumed.
    """
    if device.type != "cuda":
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def borders_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where documents of these lengths begin and the last one ends, int32."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return sent(ends, device)


def attend_causally(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend from the last tokens of a row, or all, to those before them; no mask of all pairs.

    Args:
        q: ``[B, H, queries, F]``.
        k: ``[B, K, keys, F]``; the last ones are those of the queries' tokens.
        v: As ``k``.
        window: Keys a query sees, itself included; None sees all before it.

    Returns:
        ``[B, H, queries, F]``.
    """
    count, keys, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    before, window = keys - count, window or keys
    if gqa and q.is_cuda and not (has_flash(q.device) and q.dtype.itemsize == 2):
        # The kernel that is left knows no groups, and torch would keep every score instead
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        gqa = False
    if not before and keys <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    found = []
    for first in range(0, count, QUERIES):
        last = min(first + QUERIES, count)
        start = max(before + first - window + 1, 0)
        some = slice(start, before + last)
        mask = causal_band(
            last - first, some.stop - start, before + first - start, window, q.device
        )
        part = q[:, :, first:last], k[:, :, some], v[:, :, some]
        found.append(F.scaled_dot_product_attention(*part, attn_mask=mask, enable_gqa=gqa))
    return torch.cat(found, dim=2)


def take(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return some tokens as one row, ``[1, rows, D]``.

    Args:
        x: ``[B, S, D]``.
        rows: Numbers of tokens, counted over all of B and S, each at most once; None takes ``x``
            as it is.
    """
    if rows is None:
        return x
    taken: Tensor = _Take.apply(x, rows)  # type: ignore[no-untyped-call]
    return taken


class _Take(torch.autograd.Function):
    """Since no token is taken twice, the backward pass copies and need not add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape
        return x.flatten(0, 1).index_select(0, rows)[None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        whole = g.new_zeros(ctx.shape)
        (rows,) = ctx.saved_tensors
        whole.view(-1, g.shape[-1]).index_copy_(0, rows, g[0])
        return whole, None
