"""Samples of several lengths in one batch: one after the other, or padded to one length."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Sample = Mapping[str, Any]

IGNORED = -100
"""Label of a token that the loss does not count."""

OF_ANSWERS = {"wanted", "reference", "mismatched"}
"""What samples of answers have of each document."""

# Shapes: B batch, S the longest sample, T all tokens


def concatenate(batch: Sequence[Sample], padding_idx: int = 0) -> dict[str, Any]:
    """Put samples into one row without padding, for training with our recipe.

    Args:
        batch: Samples with ``tokens`` and ``labels``; or packs, which have the ``lengths`` of
            their documents as well.
        padding_idx: Not needed; every ``collate_fn`` is given it.

    Returns:
        ``tokens``, ``labels`` and ``input_pos``, each ``[1, T]``, ``weights`` too where samples
        have them, and ``lengths``, those of the documents. The first token of a document has no
        label: nothing is predicted from one document about the next. Of answers also what
        `phi3_plugin.data.preferences.Answers` has of each document: ``wanted`` and perhaps
        ``reference``, ``[documents]``, and ``mismatched``, another such row.
    """
    samples = [_without_padding(sample) for sample in batch]
    tokens, labels = (
        torch.cat([torch.as_tensor(sample[key], dtype=torch.int64) for sample in samples])
        for key in ("tokens", "labels")
    )
    lengths = list[int]()
    for sample in samples:
        lengths += torch.as_tensor(sample.get("lengths", [len(sample["tokens"])])).tolist()
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[starts] = IGNORED
    input_pos = torch.arange(len(tokens)) - starts.repeat_interleave(torch.tensor(lengths))
    row = {"tokens": tokens, "labels": labels, "input_pos": input_pos}
    if "weights" in samples[0]:
        weights = [torch.as_tensor(sample["weights"], dtype=torch.float32) for sample in samples]
        row["weights"] = torch.cat(weights)
    kept = OF_ANSWERS & samples[0].keys()
    beside = {key: _joined([sample[key] for sample in samples]) for key in kept}
    return {**{key: value[None] for key, value in row.items()}, "lengths": lengths, **beside}


def _joined(values: Sequence[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return concatenate(values)
    return torch.cat([torch.as_tensor(value) for value in values])


def _without_padding(sample: Sample) -> Sample:
    """Return a sample as it is, but a pack of torchtune's as one of ours."""
    if "seq_lens" not in sample:
        return sample
    lengths = torch.as_tensor(sample["seq_lens"]).tolist()
    # Padding has the position 0 throughout; a document of one token trains nothing either
    if len(lengths) > 1 and sample["input_pos"][-1] == 0:
        lengths = lengths[:-1]
    total = sum(lengths)
    return {
        "tokens": sample["tokens"][:total],
        "labels": sample["labels"][:total],
        "lengths": lengths,
    }


def pad_right(
    batch: Sequence[Sample], padding_idx: int = 0, ignore_idx: int = IGNORED
) -> dict[str, Tensor]:
    """Pad at the end, for training; a recipe takes this function as its ``collate_fn``.

    No mask is needed: under a causal one, no token sees what comes after it.

    Args:
        batch: Samples with ``tokens`` and ``labels``.
        padding_idx: Fills up the tokens.
        ignore_idx: Fills up the labels. An end-of-text label stays one, also where that token
            pads: labels are told apart by where they stand, not by the token.

    Returns:
        ``tokens`` and ``labels``, and ``weights`` where samples have them, each ``[B, S]``.
    """
    values = {"tokens": padding_idx, "labels": ignore_idx}
    padded = {key: _padded(batch, key, value, left=False) for key, value in values.items()}
    if "weights" in batch[0]:
        padded["weights"] = _padded(batch, "weights", 0, left=False, dtype=torch.float32)
    return padded


def pad_left(
    batch: Sequence[Sample], padding_idx: int = 0, ignore_idx: int = IGNORED
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
    tokens = _padded(batch, "tokens", padding_idx, left=True)
    sizes = torch.tensor([len(sample["tokens"]) for sample in batch])
    places = torch.arange(tokens.shape[1]) - (tokens.shape[1] - sizes)[:, None]
    # A row that saw nothing would be NaN, so padding sees itself
    itself = torch.eye(tokens.shape[1], dtype=torch.bool)
    mask = ((places >= 0)[:, None] | itself).tril()
    padded = {"tokens": tokens, "input_pos": places.clamp(min=0), "mask": mask}
    if any("labels" in sample for sample in batch):
        padded["labels"] = _padded(batch, "labels", ignore_idx, left=True)
    return padded


def _padded(
    batch: Sequence[Sample], key: str, value: int, *, left: bool, dtype: torch.dtype = torch.int64
) -> Tensor:
    rows = [torch.as_tensor(sample[key], dtype=dtype) for sample in batch]
    width = max(map(len, rows))
    missing = [width - len(row) for row in rows]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return torch.stack([pad(row, s, value=value) for row, s in zip(rows, sides, strict=True)])
