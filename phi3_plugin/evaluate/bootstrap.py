"""How far a number would move with other samples of the same kind: the paired bootstrap.

Samples are drawn again and again, as many as there are and each as often as chance has it; base
and adapter are judged on the same draws, so that what is hard for both does not blur their
difference.

Source: Efron & Tibshirani 1993, chapter 13 (percentile intervals); Koehn 2004 for pairs.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 95.0
"""Percent of the draws that an interval holds."""

_DRAWN = 1 << 22
"""Numbers that are held at once, about."""


class Estimate(NamedTuple):
    """A number, and the interval that holds it."""

    value: float
    low: float
    high: float


# Shapes: N samples, K sums of a measure, R resamples
def resampled(
    columns: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Return the sums of columns over samples that are drawn again, ``[R, K]``.

    Args:
        columns: ``[N, K]``; what stands in one row stays together.
        resamples: R.
        seed: Decides the draws, given N alone.
    """
    count, generator = len(columns), np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    block = max(1, _DRAWN // count)
    sums = [
        generator.multinomial(count, even, size=min(block, resamples - first)) @ columns
        for first in range(0, resamples, block)
    ]
    return np.concatenate(sums).astype(np.float64)


def estimate(value: float, draws: NDArray[np.float64]) -> Estimate:
    """Return a number with the interval of what was drawn for it, ``[R]``; NaN do not count."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Estimate(value, np.nan, np.nan)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(known, (tail, 100 - tail))
    return Estimate(value, float(low), float(high))
