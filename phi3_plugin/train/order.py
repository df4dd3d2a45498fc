"""Which samples a step sees: one global order, whatever the number of processes.

epoch 0      3 0 4 1 5 2 6         shuffled by seed and epoch
step 0       [3 0][4 1]            micro-batches of 2; with 2 processes the first takes [3 0]
step 1       [5 2][6]              the last step of an epoch takes what is left

Grouped by length, a step sees samples of similar length, longest first. Here sample n has n tokens:

epoch 0      3 0 4 1 5 2 6         shuffled by seed and epoch
stretch      [5 4][3 2][1 0] 6     sorted, all but the last step's, which takes what is left
epoch 0      3 2 5 4 1 0 6         its steps shuffled
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from phi3_plugin.errors import DataError
from phi3_plugin.train.losses import IGNORED

Sample = dict[str, Any]
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
        self.dataset, self.batch_size, self.processes = dataset, batch_size, processes
        self.per_step = batch_size * accumulation * processes
        self.seed, self.shuffle, self.group_by_length = seed, shuffle, group_by_length
        self._drawn: tuple[int, list[int]] = (-1, [])

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
        order = self._epoch(epoch)
        return order[place * self.per_step : (place + 1) * self.per_step]

    def batches(self, step: int, rank: int, collate: Collate) -> list[dict[str, Tensor]]:
        """Return one process's micro-batches of a step; every process gets as many.

        A process that the last samples do not reach gets one without labels, since all must take
        part in the sharded model's gathering.

        Args:
            step: Counted from the start of the run.
            rank: The process.
            collate: Makes a batch of samples.
        """
        chosen, size = self.indices(step), self.batch_size
        parts = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        mine = parts[rank :: self.processes]
        full = -(-len(parts) // self.processes)
        return [self._collated(part, collate) for part in mine] + [
            self._unlabelled(chosen[0], collate) for _ in range(full - len(mine))
        ]

    def _epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        if self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        return self._drawn[1]

    def _draw(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.dataset), generator=generator).numpy()
        if self.group_by_length:
            order = _grouped(order, self.lengths, self.per_step, generator, first=epoch == 0)
        return list(order.tolist())

    def _collated(self, indices: list[int], collate: Collate) -> dict[str, Tensor]:
        return collate([self.dataset[i] for i in indices])

    def _unlabelled(self, index: int, collate: Collate) -> dict[str, Tensor]:
        batch = self._collated([index], collate)
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


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
