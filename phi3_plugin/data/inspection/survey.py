"""One pass over the samples of a data set, and which of them come more than once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.dataset import IGNORED
from phi3_plugin.errors import DataError

# Shapes: N samples, S tokens of one of them

FIRST = 5
"""Places that are named of what there are many of."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """What one pass over the samples tells of each."""

    lengths: Numbers
    """[N] tokens"""
    full: Numbers
    """[N] tokens before they were cut"""
    labelled: Numbers
    """[N] tokens that are trained on"""
    first: Numbers
    """[N] tokens before the first trained one"""
    content: NDArray[np.uint64]
    """[N]; equal where all tokens are"""
    prompt: NDArray[np.uint64]
    """[N]; equal where all tokens before the first trained one are"""
    stops: NDArray[np.bool_]
    """[N]; whether a token that ends a turn is trained on"""
    places: Sequence[str]
    """[N] where their rows stand"""


class Alike(NamedTuple):
    """Samples that come more than once."""

    copies: int
    """Samples with the tokens of an earlier one from another row."""
    pairs: list[tuple[str, str]]
    """Where the first of them stand, each after the earlier one."""
    answers: int
    """Samples with the prompt of another one and another answer."""


def survey(dataset: Any, stop_tokens: Sequence[int]) -> Samples:
    """Look at every sample once.

    Args:
        dataset: ``tokens`` and ``labels`` of each; what a ChatDataset offers beside is used.
        stop_tokens: The ids that end a turn.

    Raises:
        DataError: There is no sample.
    """
    if not len(dataset):
        raise DataError("dataset: there is no sample in it. Give it rows to train on.")
    stops = np.array(stop_tokens)
    digests, starts, ends, sizes, trained, firsts = [], [], [], [], [], []
    for i in range(len(dataset)):
        ids, labels = arrays(dataset, i)
        places = np.flatnonzero(labels != IGNORED)
        digests.append(_digest(ids))
        firsts.append(int(places[0]) if len(places) else len(ids))
        starts.append(_digest(ids[: firsts[-1]]))
        ends.append(bool(np.isin(labels[places], stops).any()))
        sizes.append(len(ids))
        trained.append(len(places))
    lengths = np.array(sizes, dtype=np.int64)
    return Samples(
        lengths=lengths,
        full=np.asarray(getattr(dataset, "full", lengths), dtype=np.int64),
        labelled=np.array(trained, dtype=np.int64),
        first=np.array(firsts, dtype=np.int64),
        content=np.array(digests, dtype=np.uint64),
        prompt=np.array(starts, dtype=np.uint64),
        stops=np.array(ends, dtype=np.bool_),
        places=[place(dataset, i) for i in range(len(dataset))],
    )


def arrays(dataset: Any, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and labels of a sample, each [S]."""
    if hasattr(dataset, "arrays"):
        ids, labels = dataset.arrays(i)
        return ids, labels
    sample = dataset[i]
    return np.asarray(sample["tokens"], np.int32), np.asarray(sample["labels"], np.int32)


def place(dataset: Any, i: int) -> str:
    """Return where a sample was read."""
    return str(dataset.places(i)) if hasattr(dataset, "places") else f"sample {i}"


def alike(samples: Samples) -> Alike:
    """Find samples that come more than once."""
    first: dict[int, int] = {}
    found: list[tuple[str, str]] = []
    for i, value in enumerate(samples.content.tolist()):
        earlier = first.setdefault(value, i)
        # A source may be seen more than once on purpose: the same row is no copy of itself
        if samples.places[earlier] != samples.places[i]:
            found.append((samples.places[earlier], samples.places[i]))
    _, index = np.unique(samples.content, return_index=True)
    # One token is no prompt: all conversations begin with it, as train_on=all leaves them
    index = index[samples.first[index] > 1]
    _, times = np.unique(samples.prompt[index], return_counts=True)
    return Alike(len(found), found[:FIRST], int(times[times > 1].sum()))


def _digest(ids: NDArray[np.int32]) -> int:
    content = np.ascontiguousarray(ids, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
