"""Which samples are seen how often, and which are held out: the same on every machine."""

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.shapes import column
from phi3_plugin.data.turns import Chat, Turn, Written
from phi3_plugin.errors import DataError

# Shapes: N samples, G groups

STEP, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""Constants of SplitMix64.

Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""


@overload
def repeats(weight: float, index: int, seed: int) -> int: ...
@overload
def repeats(weight: float, index: NDArray[Any], seed: int) -> NDArray[np.int64]: ...
def repeats(weight: float, index: int | NDArray[Any], seed: int) -> int | NDArray[np.int64]:
    """Return how often an epoch sees a sample: the weight, rounded up for some and down for others.

    Args:
        weight: Above 0; 2.5 is twice, and a third time for half of the samples.
        index: Row of the sample, or of each of them, [N].
        seed: Decides which samples are rounded up.
    """
    whole = int(weight)
    chance = (_mixed(np.asarray(index), seed) >> np.uint64(11)) / 2.0**53
    times = whole + (chance < weight - whole).astype(np.int64)
    return int(times) if isinstance(index, int) else times


def held_out(groups: NDArray[np.uint64], share: float, seed: int) -> NDArray[np.bool_]:
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


def _joined(turns: "list[Turn] | Any") -> str:
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
    values = values + np.uint64(STEP)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(MIX[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(MIX[1])
    return values ^ (values >> np.uint64(31))
