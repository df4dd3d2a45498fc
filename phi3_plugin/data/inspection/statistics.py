"""The numbers of a data set, as a training run would see it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from phi3_plugin.data.findings import Findings
from phi3_plugin.data.inspection.compared import Compared
from phi3_plugin.data.inspection.limits import Cut
from phi3_plugin.data.inspection.survey import Alike, Numbers, Samples
from phi3_plugin.data.packing import Packs

# Shapes: N samples, S tokens of one of them

BINS = 12
"""Bars of a histogram, at most."""

PLAIN, GROUPED, PACKED = "plain", "grouped by length", "packed"
"""The ways to put samples into batches."""


class Bin(NamedTuple):
    """A bar of a histogram: the samples of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    samples: int


class Lengths(NamedTuple):
    """How long the samples are before they are cut, in tokens."""

    median: float
    p95: float
    longest: int
    bins: list[Bin]


class Batching(NamedTuple):
    """A way to put samples into batches."""

    name: str
    padding: float
    """Share of all tokens of an epoch's batches."""
    steps: int
    """Optimizer steps of an epoch."""
    chosen: bool


class Part(NamedTuple):
    """The validation data."""

    rows: int
    samples: int
    tokens: int
    labelled: int
    seen: int
    """Samples that are trained on as well."""
    findings: Findings


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A data set in numbers."""

    options: Mapping[str, Any]
    """The section dataset of the YAML."""
    options_val: Mapping[str, Any] | None
    """The section dataset_val."""
    special_in_text: str
    """What a special token is that somebody wrote into a message."""
    rows: int
    """Rows read."""
    findings: Findings
    samples: int
    """What an epoch trains on."""
    tokens: int
    """Of an epoch, without padding."""
    labelled: int
    """Of an epoch, those that are trained on."""
    lengths: Lengths
    longest: int
    """Tokens of the longest sample, after the cut."""
    limit: int | None
    """Where samples are cut."""
    truncate: str = "right"
    """What becomes of longer ones, see :mod:`phi3_plugin.data.truncation`."""
    positions: int
    """How many the model was made for."""
    batchings: list[Batching]
    per_step: str
    """What an optimizer step sees, in words."""
    steps: int
    """Of the whole run."""
    cuts: list[Cut]
    alike: Alike
    endless: int
    """Samples in which no end of a turn is trained on."""
    endless_uncut: int
    """Those of them that were not cut."""
    held_out: Part | None = None
    compared: Compared | None = None
    """With transformers."""

    @property
    def batching(self) -> Batching:
        """The one that was chosen."""
        return next(batching for batching in self.batchings if batching.chosen)

    @property
    def fate(self) -> str:
        """What is done to longer samples, in a word."""
        return "dropped" if self.truncate == "drop" else "cut"

    @property
    def cut(self) -> Cut:
        """The one that was chosen; no limit cuts nothing."""
        return next((cut for cut in self.cuts if cut.limit == self.limit), Cut(0, 0.0, 0.0, ""))


def lengths_of(full: Numbers) -> Lengths:
    """Return the lengths in short."""
    middle, high = np.percentile(full, [50, 95])
    return Lengths(float(middle), float(high), int(full.max()), histogram(full))


def histogram(lengths: Numbers) -> list[Bin]:
    """Sort lengths into bars of one width, or where most would fall into one, of doubling widths.

    A width is a power of two, so that the usual limits are borders. Empty bars at either end are
    left out.
    """
    longest, middle = int(lengths.max()), float(np.median(lengths))
    width = 1 << max(0, (-(-longest // BINS) - 1).bit_length())
    if middle >= 2 * width:
        ends = np.arange(width, longest + width, width)
    else:
        ends = 1 << np.arange(longest.bit_length() + 1)
        ends = ends[: int(np.searchsorted(ends, longest)) + 1]
    counts = np.bincount(np.searchsorted(ends, lengths), minlength=len(ends))
    lows = [1, *(ends[:-1] + 1)]
    bins = [Bin(*map(int, bar)) for bar in zip(lows, ends, counts, strict=True)]
    used = np.flatnonzero(counts)
    return bins[used[0] : used[-1] + 1]


def padding(lengths: Numbers, batches: Iterable[Sequence[int]]) -> float:
    """Return which share of the batches' tokens is padding, each padded to its longest sample.

    Args:
        lengths: [N] tokens
        batches: The samples of each batch.
    """
    real = total = 0
    for batch in batches:
        chosen = lengths[np.asarray(batch)]
        real, total = real + int(chosen.sum()), total + int(chosen.max()) * len(chosen)
    return 1 - real / total if total else 0.0


def unpacked(dataset: Any) -> Any:
    """Return the samples of a data set, whether it is packed or not."""
    return dataset.ds if isinstance(dataset, Packs) else dataset


def epoch(dataset: Any, samples: Samples) -> tuple[int, int]:
    """Return the tokens of an epoch without padding, and those of them that are trained on.

    Args:
        dataset: May be packed: a cut takes from what is trained on.
        samples: The same, surveyed.
    """
    counted = dataset if isinstance(dataset, Packs) else samples
    return int(counted.lengths.sum()), int(counted.labelled.sum())


def part(dataset: Any, samples: Samples, training: Samples) -> Part:
    """Return what validation sees.

    Args:
        dataset: The validation data, packed or not.
        samples: The same, surveyed.
        training: What is trained on.
    """
    rows, (tokens, labelled) = unpacked(dataset), epoch(dataset, samples)
    return Part(
        rows=getattr(rows, "rows", len(samples.lengths)),
        samples=len(samples.lengths),
        tokens=tokens,
        labelled=labelled,
        seen=int(np.isin(samples.content, training.content).sum()),
        findings=getattr(rows, "findings", Findings()),
    )
