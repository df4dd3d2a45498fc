"""Samples of several lengths in one batch: one after the other, or padded to one length."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchtune.datasets import PackedDataset

from phi3_plugin.data.packing import Packs

Sample = Mapping[str, Any]
IGNORED = -100
"""Label of a token that the loss does not count."""

# Shapes: B batch, S the longest sample, T all tokens


def concatenate(batch: Sequence[Sample], padding_idx: int = 0) -> dict[str, Any]:
    """Put samples into one row without padding, for training with our recipe.

    Args:
        batch: Samples with ``tokens`` and ``labels``; or packs, which have the ``lengths`` of
            their documents as well.
        padding_idx: Not needed; every ``collate_fn`` is given it.

    Returns:
        ``tokens``, ``labels`` and ``input_pos``, each ``[1, T]``, and ``lengths``, those of the
        documents. The first token of a document has no label: nothing is predicted from one
        document about the next.
    """
    columns, lengths = {"tokens": list[Tensor](), "labels": list[Tensor]()}, list[int]()
    for sample in map(_without_padding, batch):
        for key, values in columns.items():
            values.append(torch.as_tensor(sample[key]))
        lengths += torch.as_tensor(sample.get("lengths", [len(sample["tokens"])])).tolist()
    tokens, labels = (torch.cat(values) for values in columns.values())
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    labels[starts] = IGNORED
    input_pos = torch.arange(len(tokens)) - starts.repeat_interleave(torch.tensor(lengths))
    row = {"tokens": tokens, "labels": labels, "input_pos": input_pos}
    return {**{key: value[None] for key, value in row.items()}, "lengths": lengths}


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


class StockPacks(PackedDataset):  # type: ignore[misc]
    """Packs as torchtune's own recipes take them: filled up to one length.

    The padding is one more document, but for its positions: they stay at 0, so that they cannot
    come past the one from which LongRoPE turns every angle of the batch. With ``_`` for padding::

        tokens     a0 a1 a2 c0 c1 c2 c3 c4      b0 b1  _  _  _  _  _  _
        labels      . a1 a2  . c1 c2 c3 c4       . b1  .  .  .  .  .  .
        input_pos   0  1  2  0  1  2  3  4       0  1  0  0  0  0  0  0
        seq_lens   [3, 5]                       [2, 6]
    """

    def __init__(self, packs: Packs, padding_idx: int = 0) -> None:
        """Keep the packs; ``padding_idx`` fills them up."""
        self.packs, self.ds = packs, packs.ds
        self.max_seq_len, self.padding_idx = packs.size, padding_idx

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens``, ``labels`` and ``input_pos``, each [size], and ``seq_lens``."""
        pack = self.packs[index]
        missing = self.max_seq_len - len(pack["tokens"])
        fills = {"tokens": self.padding_idx, "labels": IGNORED, "input_pos": 0}
        row = {key: pad(pack[key], (0, missing), value=fill) for key, fill in fills.items()}
        padding = torch.tensor([missing] if missing else [], dtype=torch.int64)
        return {**row, "seq_lens": torch.cat([pack["lengths"], padding])}


def without_padding(dataset: Any) -> Any:
    """Return a data set as it is, but :class:`StockPacks` as the packs they are made of."""
    return dataset.packs if isinstance(dataset, StockPacks) else dataset


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
        ``tokens`` and ``labels``, each ``[B, S]``.
    """
    values = {"tokens": padding_idx, "labels": ignore_idx}
    return {key: _padded(batch, key, value, left=False) for key, value in values.items()}


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


def _padded(batch: Sequence[Sample], key: str, value: int, *, left: bool) -> Tensor:
    rows = [torch.as_tensor(sample[key], dtype=torch.int64) for sample in batch]
    width = max(map(len, rows))
    missing = [width - len(row) for row in rows]
    sides = [(n, 0) if left else (0, n) for n in missing]
    return torch.stack([pad(row, s, value=value) for row, s in zip(rows, sides, strict=True)])
