"""Samples of several lengths, padded into one batch: right to train, left to generate."""

# Shapes: B batch, S the longest sample

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

Sample = Mapping[str, Sequence[int]]


def pad_right(
    batch: Sequence[Sample], padding_idx: int = 0, ignore_idx: int = -100
) -> dict[str, Tensor]:
    """Pad at the end, for training; a recipe takes this function as its ``collate_fn``.

    No mask is needed: under a causal one, no token sees what comes after it.

    Args:
        batch: Samples with ``tokens`` and ``labels``.
        padding_idx: Fills up the tokens.
        ignore_idx: Fills up the labels. An end-of-text label stays one, also where that token
            pads: labels are told apart by where they stand, not by the token.

    Returns:
        ``tokens`` and ``labels``, each ``[B, S]``.
    """
    values = {"tokens": padding_idx, "labels": ignore_idx}
    return {key: _filled(batch, key, value, left=False) for key, value in values.items()}


def pad_left(
    batch: Sequence[Sample], padding_idx: int = 0, ignore_idx: int = -100
) -> dict[str, Tensor]:
    """Pad at the start, for generation: the last column holds the last token of every sample.

    Args:
        batch: Samples with ``tokens``, and all or none with ``labels``.
        padding_idx: Fills up the tokens.
        ignore_idx: Fills up the labels.

    Returns:
        ``tokens`` and ``input_pos``, each ``[B, S]``; ``mask``, ``[B, S, S]``, True where a token
        sees another; ``labels``, ``[B, S]``, if the samples have them. Positions count from each
        sample's first token and are 0 in the padding. Padding sees only itself and nothing sees
        it, so ``mask[:, -1]`` tells real tokens from padding.
    """
    tokens = _filled(batch, "tokens", padding_idx, left=True)
    sizes = torch.tensor([len(sample["tokens"]) for sample in batch])
    places = torch.arange(tokens.shape[1]) - (tokens.shape[1] - sizes)[:, None]
    padded = {"tokens": tokens, "input_pos": places.clamp(min=0), "mask": _mask(places >= 0)}
    if any("labels" in sample for sample in batch):
        padded["labels"] = _filled(batch, "labels", ignore_idx, left=True)
    return padded


def _mask(real: Tensor) -> Tensor:
    # A row that saw nothing would be NaN, so padding sees itself
    itself = torch.eye(real.shape[1], dtype=torch.bool)
    return (real[:, None] | itself).tril()


def _filled(batch: Sequence[Sample], key: str, value: int, *, left: bool) -> Tensor:
    rows = [torch.tensor(sample[key], dtype=torch.int64) for sample in batch]
    width = max(map(len, rows))
    missing = [width - len(row) for row in rows]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return torch.stack([pad(row, s, value=value) for row, s in zip(rows, sides, strict=True)])
