"""Which document lies in which pack: decided once, from the lengths and a seed alone."""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.errors import DataError

BUFFER = 16384
"""Documents that are sorted at once. More waste hardly less, fewer mix better."""

CARRIED = 1024
"""Packs with room left that the next buffer may fill."""


# Shapes: N documents, P pieces of documents, K packs
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
    def padding(self) -> int:
        """Tokens that are none, in all packs."""
        return len(self) * self.size - int(self.lengths.sum(dtype=np.int64))

    @property
    def waste(self) -> float:
        """Share of the padding."""
        return self.padding / (len(self) * self.size)

    def select(self, packs: NDArray[np.int64]) -> "Plan":
        """Return the plan of some of the packs, in the given order."""
        counts = np.diff(self.borders)[packs]
        borders = np.concatenate([[0], counts.cumsum()])
        # Each piece's place in its pack, and where the pack starts here
        pieces = np.arange(borders[-1]) + np.repeat(self.borders[packs] - borders[:-1], counts)
        documents, starts = self.documents[pieces], self.starts[pieces]
        return Plan(documents, starts, self.lengths[pieces], borders, self.size)


def plan(
    lengths: NDArray[np.int32],
    size: int,
    *,
    seed: int,
    buffer: int = BUFFER,
    split_documents: bool = False,
) -> Plan:
    """Plan packs with little padding, the same ones for the same seed wherever it runs.

    Documents are shuffled. A buffer of them after the other is packed, longest first, each into
    the pack with the least room that still holds it (best-fit decreasing). The packs are shuffled
    too, and so are the documents within a pack.

    Args:
        lengths: Tokens of each document, [N].
        size: Tokens of a pack.
        seed: Decides both orders.
        buffer: Documents that are sorted at once.
        split_documents: Write the documents one after the other and cut that at ``size``; only
            the last pack has padding then.

    Raises:
        DataError: There is no document, or one is empty or longer than a pack.
    """
    lengths = np.asarray(lengths, dtype=np.int32)
    _check(lengths, size, split_documents)
    random = np.random.PCG64(seed)
    order = _shuffled(len(lengths), random)
    cut = _cut if split_documents else _whole
    planned = cut(order, lengths[order], size, buffer)
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


def _whole(order: NDArray[np.int64], lengths: NDArray[np.int32], size: int, buffer: int) -> Plan:
    packs = _best_fit(lengths, size, buffer)
    by_pack = np.argsort(packs, kind="stable")
    borders = np.concatenate([[0], np.bincount(packs).cumsum()])
    documents, starts = order[by_pack].astype(np.int32), np.zeros(len(order), dtype=np.int32)
    return Plan(documents, starts, lengths[by_pack], borders, size)


def _best_fit(lengths: NDArray[np.int32], size: int, buffer: int) -> NDArray[np.int64]:
    """Return the pack of each document."""
    count, smallest, packs = len(lengths), int(lengths.min()), 0
    chosen = np.empty(count, dtype=np.int64)
    open_packs: list[int] = []  # room * count + pack, ascending
    for start in range(0, count, buffer):
        part = lengths[start : start + buffer]
        longest_first = np.argsort(-part, kind="stable")
        places = []
        for length in part[longest_first].tolist():
            least = bisect_left(open_packs, length * count)
            if least < len(open_packs):
                room, pack = divmod(open_packs.pop(least), count)
            else:
                room, pack, packs = size, packs, packs + 1
            places.append(pack)
            if room - length >= smallest:
                insort(open_packs, (room - length) * count + pack)
        chosen[start + longest_first] = places
        del open_packs[:-CARRIED]
    return chosen


def _cut(order: NDArray[np.int64], lengths: NDArray[np.int32], size: int, _: int) -> Plan:
    ends = lengths.cumsum(dtype=np.int64)
    starts = ends - lengths
    pieces = np.union1d(starts, np.arange(0, ends[-1], size))
    found = np.searchsorted(ends, pieces, side="right")  # whose document each piece is
    sizes = np.diff(np.concatenate([pieces, ends[-1:]])).astype(np.int32)
    borders = np.append(np.flatnonzero(pieces % size == 0), len(pieces))
    documents, inside = order[found].astype(np.int32), (pieces - starts[found]).astype(np.int32)
    return Plan(documents, inside, sizes, borders, size)
