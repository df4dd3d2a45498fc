"""The numbers of a data set, as a training run would see it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from phi3_plugin.data.findings import Findings
from phi3_plugin.data.inspection.compared import Compared
from phi3_plugin.data.inspection.survey import Alike, Numbers, Samples

# Shapes: N samples, S tokens of one of them

USUAL = (512, 1024, 2048, 4096)
"""Lengths at which it is always told what a cut would cost."""

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


class Cut(NamedTuple):
    """What a limit of the length costs."""

    limit: int
    samples: float
    """Share of the samples that are cut."""
    tokens: float
    """Share of the tokens that are lost."""
    name: str
    """What this limit is, if it is not just a round number."""


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


def cuts(full: Numbers, named: Mapping[int, str]) -> list[Cut]:
    """Return what cutting would cost at the usual lengths and at others.

    Args:
        full: [N] tokens before anything was cut.
        named: More lengths, and what each of them is.
    """
    total = int(full.sum())
    return [
        Cut(
            limit,
            float((full > limit).mean()),
            float(np.maximum(full - limit, 0).sum() / total),
            named.get(limit, ""),
        )
        for limit in sorted({*USUAL, *named})
    ]


def part(dataset: Any, samples: Samples, training: Samples) -> Part:
    """Return what validation sees.

    Args:
        dataset: The validation data.
        samples: The same, surveyed.
        training: What is trained on.
    """
    return Part(
        rows=getattr(dataset, "rows", len(samples.lengths)),
        samples=len(samples.lengths),
        tokens=int(samples.lengths.sum()),
        labelled=int(samples.labelled.sum()),
        seen=int(np.isin(samples.content, training.content).sum()),
        findings=getattr(dataset, "findings", Findings()),
    )
