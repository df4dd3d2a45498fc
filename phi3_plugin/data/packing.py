"""Several documents in one row: which of them lie together, and what such a pack holds.

With room for 8 tokens, documents of 3, 2 and 5 tokens become two packs::

    tokens     a0 a1 a2 c0 c1 c2 c3 c4      b0 b1
    labels      . a1 a2  . c1 c2 c3 c4       . b1
    input_pos   0  1  2  0  1  2  3  4       0  1
    lengths    [3, 5]                       [2]

and, if documents may be split::

    tokens     a0 a1 a2 b0 b1 c0 c1 c2      c3 c4
    labels      . a1 a2  . b1  . c1 c2       . c4
    input_pos   0  1  2  0  1  0  1  2       0  1
    lengths    [3, 2, 3]                    [2]

``.`` is not trained on. The first token of a document never is, and neither is that of a part that
a cut has left without what comes before it. So after the shift that the recipes do, nothing is
predicted from one document about the next. A pack has no padding; `StockPacks` adds it for
torchtune's own recipes.
"""

import hashlib
import logging
from bisect import bisect_left, insort
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset
from torchtune.datasets import PackedDataset
from torchtune.utils import log_rank_zero

from phi3_plugin.data.collate import IGNORED, OF_ANSWERS, concatenate
from phi3_plugin.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


class Packs(Dataset[dict[str, Tensor]]):
    """Packs, each made of its documents when it is asked for.

    A pack of which nothing is trained, as a cut may leave it, is not among them: it would be a
    step without a loss.
    """

    def __init__(
        self,
        dataset: Any,
        size: int,
        *,
        seed: int = 0,
        split_documents: bool = False,
    ) -> None:
        """Plan the packs; see :func:`plan_packs`.

        Args:
            dataset: Samples of ``tokens`` and ``labels``. Those of a chat data set are read as
                arrays, others one by one.
            size: Tokens that a pack has room for.
            seed: Decides the packs and their order.
            split_documents: See :func:`plan_packs`.

        Raises:
            DataError: A document is longer than a pack, or nothing is trained on.
        """
        self.ds = dataset if hasattr(dataset, "arrays") else _Arrays(dataset)
        self.size = size
        self._options: dict[str, Any] = {"seed": seed, "split_documents": split_documents}
        planned = plan_packs(self.ds.lengths, size, **self._options)
        labelled = planned.summed(self._labelled(planned))
        if not labelled.any():
            raise DataError("there is no token to train on in any pack.")
        kept = np.flatnonzero(labelled)
        if left_out := len(planned) - len(kept):
            message = f"left out {left_out} of {len(planned)} packs: they train nothing"
            log_rank_zero(logger, message, logging.WARNING)
        self.plan = planned.select(kept)
        self.labelled = labelled[kept].astype(np.int32)
        self.lengths = self.plan.summed(self.plan.lengths).astype(np.int32)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``tokens``, ``labels`` and ``input_pos``, each [T], and ``lengths``, [D].

        T tokens of D documents, one after the other; with ``weights``, [T], where any are told.
        """
        pieces = []
        for document, start, length in self.documents(index):
            tokens, labels = self.ds.arrays(document)
            here = slice(start, start + length)
            piece = {"tokens": tokens[here].astype(np.int64), "labels": labels[here]}
            if (weights := self._weights(document)) is not None:
                piece["weights"] = weights[here]
            pieces.append({**piece, **self._beside(document)})
        return _as_pack(concatenate(pieces))

    def documents(self, index: int) -> list[tuple[int, int, int]]:
        """Return the documents of a pack: index in the data set, first token and length."""
        plan = self.plan
        index = range(len(self))[index]
        here = slice(plan.borders[index], plan.borders[index + 1])
        values = (plan.documents[here], plan.starts[here], plan.lengths[here])
        return list(zip(*(array.tolist() for array in values), strict=True))

    @property
    def waste(self) -> float:
        """Share of the room in all packs that no document fills."""
        return self.plan.waste

    @property
    def fingerprint(self) -> str:
        """A hash of all that the packs hold: the data set's own, and the plan."""
        arrays = (self.plan.documents, self.plan.starts, self.plan.lengths, self.plan.borders)
        digest = hashlib.sha256(f"{self.ds.fingerprint} {self.size}".encode())
        for array in arrays:
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def hold_out(self, share: float, seed: int) -> tuple["Packs", "Packs"]:
        """Split the documents as their data set does, and pack both parts.

        Args:
            share: Of the documents that is held out.
            seed: Decides which.

        Returns:
            What to train on, and what is held out.
        """
        kept, held = self.ds.hold_out(share, seed)
        return Packs(kept, self.size, **self._options), Packs(held, self.size, **self._options)

    def _beside(self, document: int) -> dict[str, Any]:
        """Return what a sample that is several documents has beside tokens and labels."""
        beside: dict[str, Any] = self.ds.beside(document) if hasattr(self.ds, "beside") else {}
        return beside

    def _weights(self, document: int) -> NDArray[np.float32] | None:
        weights: Any = getattr(self.ds, "weights", None)
        return None if weights is None else weights(document)

    def _labelled(self, planned: "Plan") -> NDArray[np.int32]:
        counts: NDArray[np.int32] = self.ds.labelled[planned.documents]
        for piece in np.flatnonzero(planned.lengths < self.ds.lengths[planned.documents]):
            _, labels = self.ds.arrays(int(planned.documents[piece]))
            start = int(planned.starts[piece])
            end = start + int(planned.lengths[piece])
            counts[piece] = np.count_nonzero(labels[start + 1 : end] != IGNORED)
        return counts


def _as_pack(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the only row of a batch."""
    pack = dict[str, Any]()
    for key, value in row.items():
        if isinstance(value, Mapping):
            pack[key] = _as_pack(value)
        elif key == "lengths":
            pack[key] = torch.tensor(value)
        else:
            pack[key] = value if key in OF_ANSWERS else value[0]
    return pack


class _Arrays:
    """A data set that offers samples only, read once."""

    def __init__(self, dataset: Any) -> None:
        self._samples = []
        for i in range(len(dataset)):  # torch's data sets have no end that iteration would find
            sample = dataset[i]
            pair = (np.asarray(sample[key], np.int32) for key in ("tokens", "labels"))
            self._samples.append(tuple(pair))
        self.lengths = np.array([len(ids) for ids, _ in self._samples], np.int32)
        counts = [np.count_nonzero(labels[1:] != IGNORED) for _, labels in self._samples]
        self.labelled = np.array(counts, np.int32)

    def arrays(self, index: int) -> tuple[NDArray[np.int32], ...]:
        return self._samples[index]

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.lengths.tobytes())
        for array in (array for sample in self._samples for array in sample):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def hold_out(self, share: float, seed: int) -> tuple[Any, Any]:
        raise DataError(
            f"val_fraction: {share} cannot be split off a packed data set that does not say how. "
            "Set dataset_val."
        )


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


class StockPairs(Dataset[dict[str, list[int]]]):
    """Pairs of answers as torchtune's DPO recipes take them."""

    def __init__(self, answers: Any) -> None:
        """Keep the pairs, of `phi3_plugin.data.preferences.PreferenceDataset`, or packs of them."""
        self.answers = answers

    def __len__(self) -> int:
        return len(self.answers)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``chosen_input_ids``, ``chosen_labels``, and both of ``rejected``.

        Raises:
            ConfigError: The pairs are packed.
        """
        if isinstance(self.answers, Packs):
            raise ConfigError(
                "dataset.packed: torchtune's DPO recipes take pairs one by one. Set it to False, "
                "or use phi3_lora_finetune."
            )
        sample = self.answers[index]
        tokens, labels = (sample[key].tolist() for key in ("tokens", "labels"))
        cut = int(sample["lengths"][0])
        return {
            "chosen_input_ids": tokens[:cut],
            "chosen_labels": labels[:cut],
            "rejected_input_ids": tokens[cut:],
            "rejected_labels": labels[cut:],
        }


def without_padding(dataset: Any) -> Any:
    """Return a data set as it is, but one in torchtune's shape as what it is made of."""
    if isinstance(dataset, StockPairs):
        return dataset.answers
    return dataset.packs if isinstance(dataset, StockPacks) else dataset


# Which document lies in which pack: decided once, from the lengths and a seed alone

# Shapes: N documents, P pieces of documents, K packs

BUFFER = 16384
"""Documents that are sorted at once. More waste hardly less, fewer mix better."""

CARRIED = 1024
"""Packs with room left that the next buffer may fill."""


@dataclass(frozen=True)
class Plan:
    """Which piece of which document lies in which pack; pieces stand in the order of the packs."""

    documents: NDArray[np.int32]
    """[P]"""
    starts: NDArray[np.int32]
    """[P]; the first token in the document, 0 where no document is split."""
    lengths: NDArray[np.int32]
    """[P]"""
    borders: NDArray[np.int64]
    """[K + 1]; the first piece of each pack, and P."""
    size: int
    """Tokens that a pack has room for."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    def summed(self, values: NDArray[np.int32]) -> NDArray[np.int64]:
        """Return the sum of a value of the pieces, [P], over each pack, [K]."""
        return np.diff(np.concatenate([[0], values.cumsum(dtype=np.int64)])[self.borders])

    @property
    def waste(self) -> float:
        """Share of the room in all packs that no document fills."""
        return 1 - int(self.lengths.sum(dtype=np.int64)) / (len(self) * self.size)

    def select(self, packs: NDArray[np.int64]) -> "Plan":
        """Return the plan of some of the packs, in the given order."""
        counts = np.diff(self.borders)[packs]
        borders = np.concatenate([[0], counts.cumsum()])
        # Each piece's place in its pack, and where the pack starts here
        pieces = np.arange(borders[-1]) + np.repeat(self.borders[packs] - borders[:-1], counts)
        documents, starts = self.documents[pieces], self.starts[pieces]
        return Plan(documents, starts, self.lengths[pieces], borders, self.size)


def plan_packs(
    lengths: NDArray[np.int32],
    size: int,
    *,
    seed: int,
    buffer: int = BUFFER,
    split_documents: bool = False,
) -> Plan:
    """Plan packs with little room left, the same ones for the same seed wherever it runs.

    Documents are shuffled. A buffer of them after the other is packed, longest first, each into
    the pack with the least room that still holds it (best-fit decreasing). The packs are shuffled
    too, and so are the documents within a pack.

    Args:
        lengths: Tokens of each document, [N].
        size: Tokens of a pack.
        seed: Decides both orders.
        buffer: Documents that are sorted at once.
        split_documents: Write the documents one after the other and cut that at ``size``; only
            the last pack has room left then.

    Raises:
        DataError: There is no document, or one is empty or longer than a pack.
    """
    lengths = np.asarray(lengths, dtype=np.int32)
    _check(lengths, size, split_documents)
    random = np.random.PCG64(seed)
    order = _shuffled(len(lengths), random)
    if split_documents:
        planned = _cut_at_size(order, lengths[order], size)
    else:
        planned = _whole_documents(order, lengths[order], size, buffer)
    return planned.select(_shuffled(len(planned), random))


def _check(lengths: NDArray[np.int32], size: int, split_documents: bool) -> None:
    if not len(lengths):
        raise DataError("there is no document to pack.")
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    if lengths[shortest] < 1:
        raise DataError(f"document {shortest} has no tokens. Leave it out.")
    if lengths[longest] > size and not split_documents:
        raise DataError(
            f"document {longest} has {lengths[longest]} tokens, a pack has room for {size}. "
            "Cut documents to the length of a pack, or set split_documents to True."
        )


def _shuffled(count: int, random: np.random.PCG64) -> NDArray[np.int64]:
    # Of numpy's random numbers only the raw ones never change from version to version
    return np.argsort(random.random_raw(count), kind="stable")


def _whole_documents(
    order: NDArray[np.int64], lengths: NDArray[np.int32], size: int, buffer: int
) -> Plan:
    packs = _best_fit(lengths, size, buffer)
    by_pack = np.argsort(packs, kind="stable")
    borders = np.concatenate([[0], np.bincount(packs).cumsum()])
    starts = np.zeros(len(order), dtype=np.int32)
    return Plan(order[by_pack].astype(np.int32), starts, lengths[by_pack], borders, size)


def _best_fit(lengths: NDArray[np.int32], size: int, buffer: int) -> NDArray[np.int64]:
    """Return the pack of each document."""
    count = len(lengths)
    smallest = int(lengths.min())
    packs = 0
    chosen = np.empty(count, dtype=np.int64)
    # Packs with room left, as room * count + pack in one number each: ascending, so that bisection
    # finds the one with the least room that is enough
    open_packs: list[int] = []
    for start in range(0, count, buffer):
        part = lengths[start : start + buffer]
        longest_first = np.argsort(-part, kind="stable")
        places = []
        for length in part[longest_first].tolist():
            least = bisect_left(open_packs, length * count)
            if least < len(open_packs):
                room, pack = divmod(open_packs.pop(least), count)
            else:
                room = size
                pack = packs
                packs += 1
            places.append(pack)
            if room - length >= smallest:
                insort(open_packs, (room - length) * count + pack)
        chosen[start + longest_first] = places
        del open_packs[:-CARRIED]
    return chosen


def _cut_at_size(order: NDArray[np.int64], lengths: NDArray[np.int32], size: int) -> Plan:
    ends = lengths.cumsum(dtype=np.int64)
    starts = ends - lengths
    pieces = np.union1d(starts, np.arange(0, ends[-1], size))
    owners = np.searchsorted(ends, pieces, side="right")  # the document of each piece
    sizes = np.diff(np.concatenate([pieces, ends[-1:]])).astype(np.int32)
    borders = np.append(np.flatnonzero(pieces % size == 0), len(pieces))
    inside = (pieces - starts[owners]).astype(np.int32)
    return Plan(order[owners].astype(np.int32), inside, sizes, borders, size)
