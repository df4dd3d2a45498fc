"""Which samples a run sees, and when: the same on every machine, for any number of processes.

    epoch 0      3 0 4 1 5 2 6         shuffled by seed and epoch
    step 0       [3 0][4 1]            micro-batches of 2; with 2 processes the first takes [3 0]
    step 1       [5 2][6]              the last step of an epoch takes what is left

Grouped by length, a step sees samples of similar length, longest first. Here sample n has n tokens:

    epoch 0      3 0 4 1 5 2 6         shuffled by seed and epoch
    stretch      [5 4][3 2][1 0] 6     sorted, all but the last step's, which takes what is left
    epoch 0      3 2 5 4 1 0 6         its steps shuffled
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from phi3_plugin.data.collate import IGNORED, Sample
from phi3_plugin.data.turns import Chat, Turn, Written, column
from phi3_plugin.errors import DataError

# Shapes: N samples, G groups

Collate = Callable[[list[Sample]], dict[str, Tensor]]

STRETCH = 50
"""Steps within which samples are sorted, or a quarter of an epoch if that is less.

Sorting more at once would save little, and put the same samples together in every epoch.
"""


class Order:
    """Cuts a data set into steps, and each step into the processes' micro-batches."""

    def __init__(
        self,
        dataset: Sequence[Sample],
        *,
        batch_size: int,
        accumulation: int,
        processes: int,
        seed: int,
        shuffle: bool,
        group_by_length: bool = False,
    ) -> None:
        """Keep the sizes; nothing is drawn yet.

        Args:
            dataset: Tokenized samples.
            batch_size: Samples of a micro-batch.
            accumulation: Micro-batches of one process in a step.
            processes: Number of processes.
            seed: With the epoch, decides the order.
            shuffle: False keeps the order of the data set.
            group_by_length: Shuffle such that a step sees samples of similar length, which
                spares padding. The longest sample of all comes in the first step of the run, so
                that a device with too little memory shows at once.
        """
        self.dataset = dataset
        self.batch_size = batch_size
        self.processes = processes
        self.per_step = batch_size * accumulation * processes
        self.seed = seed
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self._epoch = -1
        self._order: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every sample once; the last may be smaller."""
        return -(-len(self.dataset) // self.per_step)

    @cached_property
    def identity(self) -> dict[str, int | bool | str]:
        """What decides what each step sees; equal orders of equal samples are equal here.

        A data set without a ``fingerprint`` is read as a whole, the first time.
        """
        return {
            "samples": len(self.dataset),
            "content": getattr(self.dataset, "fingerprint", None) or _content(self.dataset),
            "samples per step": self.per_step,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "grouped by length": self.group_by_length,
        }

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample; a data set that does not offer them is read as a whole."""
        return _lengths(self.dataset)

    def indices(self, step: int) -> list[int]:
        """Return the samples of a step, counted from the start of the run."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._drawn(epoch)
            self._epoch = epoch
        return self._order[place * self.per_step : (place + 1) * self.per_step]

    def batches(self, step: int, rank: int, collate: Collate) -> list[dict[str, Tensor]]:
        """Return one process's micro-batches of a step; every process gets as many.

        A process that the last samples do not reach gets one without labels, since all must take
        part in the sharded model's gathering.

        Args:
            step: Counted from the start of the run.
            rank: The process.
            collate: Makes a batch of samples.
        """
        chosen = self.indices(step)
        parts = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        mine = [collate([self.dataset[i] for i in part]) for part in parts[rank :: self.processes]]
        while len(mine) < -(-len(parts) // self.processes):
            batch = collate([self.dataset[chosen[0]]])
            mine.append({**batch, "labels": torch.full_like(batch["labels"], IGNORED)})
        return mine

    def _drawn(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.dataset), generator=generator).numpy()
        if self.group_by_length:
            order = _grouped(order, self.lengths, self.per_step, generator, first=epoch == 0)
        return list(order.tolist())


def _grouped(
    order: NDArray[np.int64],
    lengths: NDArray[np.int32],
    per_step: int,
    generator: torch.Generator,
    *,
    first: bool,
) -> NDArray[np.int64]:
    if first:
        longest = int(lengths[order].argmax())
        order[[0, longest]] = order[[longest, 0]]
    # What is left for a short last step is of any length: drawn, not the shortest of all
    full = len(order) - len(order) % per_step
    stretch = max(1, min(STRETCH, full // per_step // 4)) * per_step
    cuts = [*range(stretch, full, stretch), full]
    parts = [part[np.argsort(-lengths[part], kind="stable")] for part in np.split(order, cuts)]
    steps = np.concatenate(parts[:-1]).reshape(-1, per_step)
    steps = steps[torch.randperm(len(steps), generator=generator).numpy()]
    if first and full:
        longest = int(lengths[steps[:, 0]].argmax())
        steps[[0, longest]] = steps[[longest, 0]]
    return np.concatenate([steps.ravel(), parts[-1]])


def _lengths(dataset: Any) -> NDArray[np.int32]:
    if isinstance(dataset, Subset):
        return _lengths(dataset.dataset)[np.array(dataset.indices, dtype=np.int64)]
    if hasattr(dataset, "lengths"):
        return np.asarray(dataset.lengths, dtype=np.int32)
    return np.array([len(dataset[i]["tokens"]) for i in range(len(dataset))], dtype=np.int32)


def _content(dataset: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for i in range(len(dataset)):  # torch's data sets have no end that iteration would find
        sample = dataset[i]
        for key in ("tokens", "labels"):
            values = np.asarray(sample[key], dtype=np.int64)
            digest.update(np.int64(values.size).tobytes() + values.tobytes())
    return digest.hexdigest()[:16]


def shares(order: Order, rank: int, collate: Collate) -> Iterator[dict[str, Tensor]]:
    """Yield one process's batches of a whole pass, as validation needs them."""
    for step in range(order.steps_per_epoch):
        yield from order.batches(step, rank, collate)


def held_out(order: Order | None) -> dict[str, int | bool | str] | None:
    """Return what tells validation data from others, however many processes share them."""
    names = ("samples", "content")
    return None if order is None else {name: order.identity[name] for name in names}


def hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Split a data set into what is trained on and what is held out for validation.

    Args:
        dataset: Tokenized samples. One that has a ``hold_out`` of its own is split by that.
        share: Of the samples that are held out; at least one if it is not 0.
        seed: Decides which.

    Returns:
        Both parts, here in their old order; the second is None if nothing is held out.

    Raises:
        DataError: Nothing is left to train on.
    """
    if not share:
        return dataset, None
    if hasattr(dataset, "hold_out"):
        kept, held = dataset.hold_out(share, seed)
        return kept, held
    count = max(1, round(len(dataset) * share))
    if count >= len(dataset):
        raise DataError(f"val_fraction: {share} of {len(dataset)} samples leaves none to train on.")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(dataset), generator=generator).tolist()
    return Subset(dataset, sorted(shuffled[count:])), Subset(dataset, sorted(shuffled[:count]))


# Which samples are seen how often, and which are held out


def repeats(weight: float, rows: NDArray[Any], seed: int) -> NDArray[np.int64]:
    """Return how often an epoch sees samples: the weight, rounded up for some and down for others.

    Args:
        weight: Above 0; 2.5 is twice, and a third time for half of the samples.
        rows: The row of each sample, [N].
        seed: Decides which samples are rounded up.
    """
    whole = int(weight)
    chance = (_mixed(rows, seed) >> np.uint64(11)) / 2.0**53
    return whole + (chance < weight - whole).astype(np.int64)


def held_out_mask(groups: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.bool_]:
    """Choose samples to hold out, groups whole.

    Args:
        groups: The group of each sample, [N].
        share: Of the samples; groups are taken until it is reached, at least one if it is not 0.
        seed: Decides which groups.

    Returns:
        True for the samples that are held out, [N].

    Raises:
        DataError: Nothing would be left.
    """
    if share <= 0:
        return np.zeros(len(groups), dtype=np.bool_)
    names, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(_mixed(names, seed))
    # Less a little, so that 0.07 of 100 samples are 7 in floating point too
    enough = share * len(groups) * (1 - 1e-12)
    taken = 1 + int(np.searchsorted(np.cumsum(sizes[order]), enough))
    if taken >= len(names):
        raise DataError(
            f"a share of {share} of {len(groups)} samples cannot be held out: they are in "
            f"{len(names)} groups that stay together, and none would be left to train on"
        )
    chosen = np.zeros(len(names), dtype=np.bool_)
    chosen[order[:taken]] = True
    return chosen[members]


def group_of(row: Mapping[str, Any], chat: Chat, group_by: str | None) -> int:
    """Return the group of a row, from 0 to 2**64 - 1.

    Args:
        row: The row as it was read.
        chat: The row's conversation.
        group_by: A column: rows of equal value are one group. None: conversations that are the
            same up to the first answer are.

    Raises:
        DataError: The row has no value in the column.
    """
    if group_by is None:
        return _hash(_opening(chat))
    value = column(row, group_by)
    if value is None:
        raise DataError(f"{group_by!r} is null, and rows are grouped by it")
    try:
        return _hash(json.dumps(value, sort_keys=True, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{group_by!r} cannot be grouped by: {error}") from error


def _opening(chat: Chat) -> str:
    if isinstance(chat, Written):
        return chat.text[: chat.said[0][0]] if chat.said else chat.text
    asked = False
    for i, turn in enumerate(chat):
        # Many may share a greeting: what follows it tells them apart
        if asked and turn.role == "assistant":
            return _joined(chat[:i])
        asked = asked or turn.role not in ("assistant", "system")
    return _joined(chat)


def _joined(turns: Sequence[Turn]) -> str:
    return "\0".join([text for turn in turns for text in turn[:2]])


def _hash(text: str) -> int:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mixed(values: NDArray[Any], seed: int) -> NDArray[np.uint64]:
    """Return a number for each value that seems chosen at random, two never the same."""
    # Arrays wrap around as this needs; single numbers of NumPy would warn
    start = _spread(np.full(1, seed % 2**64, dtype=np.uint64))
    return _spread(values.astype(np.uint64) ^ start).reshape(values.shape)


def _spread(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one step of SplitMix64 from each value.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
