"""Which keys a query may see: causal order, the sliding window, packed documents."""

from functools import lru_cache

import torch
from torch import Tensor


# Shapes: B batch, S queries, K keys
def windowed(
    mask: Tensor | None,
    queries: int,
    keys: int,
    offset: int,
    window: int | None,
    device: torch.device,
) -> Tensor | None:
    """Restrict a mask to the sliding window.

    The window counts places in the sequence, not restarted positions; inside one packed
    document the two differ by a constant.

    Args:
        mask: True where a query sees a key, ``[B, S, K]``; None is causal.
        queries: S, number of queries.
        keys: K, number of keys.
        offset: Place of the first query among the keys (what a key/value cache already holds).
        window: Number of keys a query sees, itself included; None is no limit.
        device: Where the mask is needed.

    Returns:
        ``mask`` itself (None: causal) when the window hides nothing, else ``[B or 1, S, K]``.

    Source: transformers 5.23 ``sliding_window_overlay``: key > query - window.
    """
    if window is None or offset + queries <= window:
        return mask
    band = _causal_band(queries, keys, offset, window, device)
    return band[None] if mask is None else mask & band


@lru_cache(maxsize=2)
def _causal_band(queries: int, keys: int, offset: int, window: int, device: torch.device) -> Tensor:
    # Every layer of a step asks for the same one.
    query = torch.arange(offset, offset + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    return (key <= query) & (key > query - window)
