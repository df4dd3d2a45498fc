"""Which keys a query may see: causal order, the sliding window, packed documents."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

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
