"""Which keys a query may see: causal order, the window, the documents of one row."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask
from torch.nn.attention.varlen import varlen_attn

# Which keys a query may see: causal order, the sliding window, packed documents.

Mask = Tensor | BlockMask | None
"""True where a query sees a key, ``[B, S, K]``; on a GPU torchtune packs with a block mask
instead; None is causal."""


# Shapes: B batch, S queries, K keys
def windowed(
    mask: Mask, queries: int, keys: int, offset: int, window: int | None, device: torch.device
) -> Mask:
    """Restrict a mask to the sliding window.

    The window counts places in the sequence, not restarted positions; inside one packed
    document the two differ by a constant.

    Args:
        mask: See `Mask`.
        queries: S, number of queries.
        keys: K, number of keys.
        offset: Place of the first query among the keys (what a key/value cache already holds).
        window: Number of keys a query sees, itself included; None is no limit.
        device: Where the mask is needed.

    Returns:
        ``mask`` itself when the window hides nothing, else a new one.

    Source: transformers 5.23 ``sliding_window_overlay``: key > query - window.
    """
    if window is None or offset + queries <= window:
        return mask
    if isinstance(mask, BlockMask):
        return _windowed_blocks(mask, window)
    band = causal_band(queries, keys, offset, window, device)
    return band[None] if mask is None else mask & band


# Every layer of a step asks for the same ones.
@lru_cache(maxsize=4)
def causal_band(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    """Return which keys each query sees, ``[S, K]``; see :func:`windowed`."""
    query = torch.arange(offset, offset + queries, device=device)[:, None]
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


# Attention within the documents of one row, without a mask of all their pairs.

BLOCK = 512
"""Queries of a document longer than the window that are computed at a time."""


# Shapes: T tokens of all documents, H query heads, K key/value heads, F head dim, R rotated dims
@dataclass(frozen=True)
class Documents:
    """What every layer needs to know of a row of documents, worked out once."""

    lengths: tuple[int, ...]
    """Tokens of each document, from the first token on."""
    borders: Tensor
    """Where they begin and the last one ends, on the device, ``[documents + 1]``, int32."""
    cos: Tensor
    """By which the heads turn, ``[1, T, 1, R / 2]``."""
    sin: Tensor
    """Likewise."""

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)


def borders_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return where documents of these lengths begin and the last one ends, int32."""
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device, non_blocking=True)


def attend_within(
    qkv: Tensor, heads: list[int], documents: Documents, window: int | None
) -> Tensor:
    """Attend causally within each document.

    Args:
        qkv: Queries, keys and values, rotated, ``[1, T, H + 2 K, F]``.
        heads: H, K and K.
        documents: Whose lengths add up to T.
        window: Keys a query sees, itself included; None sees all before it.

    Returns:
        ``[1, T, H F]``.
    """
    if qkv.device.type == "cuda" and qkv.dtype.itemsize == 2:  # the kernel knows no fp32
        return _by_kernel(qkv, heads, documents, window)
    out: Tensor = _one_by_one(qkv, heads, documents.lengths, window)
    return out


def _by_kernel(qkv: Tensor, heads: list[int], documents: Documents, window: int | None) -> Tensor:
    q, k, v = qkv[0].split(heads, dim=1)
    borders, longest = documents.borders, documents.longest
    seen = (-1 if window is None else window - 1, 0)
    how: Any = {"window_size": seen, "enable_gqa": heads[0] != heads[1]}
    out: Any = varlen_attn(q, k, v, borders, borders, longest, longest, **how)
    attended: Tensor = out.flatten(1)[None]
    return attended


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _one_by_one(
    qkv: Tensor, heads: list[int], lengths: tuple[int, ...], window: int | None
) -> Tensor:
    # Split once, so that the backward pass joins once: a slice of each would be padded to all.
    documents = qkv.split(lengths, dim=1)
    return torch.cat([_document(document, heads, window) for document in documents], dim=1)


def _document(qkv: Tensor, heads: list[int], window: int | None) -> Tensor:
    q, k, v = qkv.transpose(1, 2).split(heads, dim=1)
    size, gqa = q.shape[2], heads[0] != heads[1]
    if window is None or size <= window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(2)
    found = []
    for first in range(0, size, BLOCK):
        last, start = min(first + BLOCK, size), max(first - window + 1, 0)
        mask = causal_band(last - first, last - start, first - start, window, q.device)
        rows = q[:, :, first:last], k[:, :, start:last], v[:, :, start:last]
        found.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, enable_gqa=gqa))
    return torch.cat(found, dim=2).transpose(1, 2).flatten(2)


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
