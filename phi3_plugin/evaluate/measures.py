"""The numbers of an evaluation, with their intervals, and what the adapter changed.

A measure is worked out from sums over samples. So one pass over the draws of the bootstrap gives
all measures, and a measure of one sample is that of its own sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.evaluate.bootstrap import RESAMPLES, Estimate, estimate, resampled
from phi3_plugin.evaluate.outcomes import ADAPTER, BASE, Evaluation, Outcome, Said
from phi3_plugin.evaluate.scores import Scorer

Floats = NDArray[np.float64]
FEWEST = 6
"""Samples that can tell something: chance makes 5 of 5 better or worse in 6 of 100 cases."""

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


# Shapes: N samples, K sums of a measure, R rows of sums
@dataclass(frozen=True)
class Measure:
    """One number of an evaluation."""

    key: str
    title: str
    columns: Callable[[Outcome], Sequence[float] | None]
    """The sums of one sample, K; None where it has none."""
    value: Callable[[Floats], Floats]
    """Sums ``[R, K]`` to values ``[R]``; NaN of nothing."""
    lower_is_better: bool = False
    digits: int = 2
    by_sample: bool = True
    """Whether it means something of one sample."""


class Shares(NamedTuple):
    """Parts of the samples on which the adapter is better, worse and equal."""

    better: float
    worse: float
    equal: float


@dataclass(frozen=True)
class Result:
    """A measure of one model, or of two and their difference."""

    measure: Measure
    models: dict[str, Estimate]
    samples: int
    """How many it is measured on."""
    difference: Estimate | None = None
    """Adapter less base."""
    shares: Shares | None = None

    @property
    def verdict(self) -> str:
        """Whether the adapter is better, worse, or not clearly either; empty without one."""
        if self.difference is None:
            return ""
        _, low, high = self.difference
        if self.samples < FEWEST or not (low > 0 or high < 0):
            return UNCLEAR
        return BETTER if (high < 0) == self.measure.lower_is_better else WORSE


def measures(scorer: Scorer | None) -> list[Measure]:
    """Return what is measured; without a scorer, of the labelled tokens alone."""
    lower: dict[str, Any] = {"lower_is_better": True, "digits": 4}
    found = [
        Measure("loss", "Loss", lambda one: (one.loss, one.tokens), _ratio, **lower),
        Measure(
            "perplexity", "Perplexity", lambda one: (one.loss, one.tokens), _exp, True, 3, False
        ),
        Measure("accuracy", "Token accuracy, %", lambda one: (100 * one.hits, one.tokens), _ratio),
    ]
    if scorer is None:
        return found
    titles = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    titles |= {"rougeLsum": "ROUGE-Lsum", "exact": "Exact match, %", "numeric": "Right number, %"}
    found += [Measure(key, title, _score(key), _ratio) for key, title in titles.items()]
    bleu, chrf = _said(lambda said: said.scores.bleu), _said(lambda said: said.scores.chrf)
    found.append(Measure("bleu", "BLEU", bleu, scorer.bleu, by_sample=False))
    found.append(Measure("chrf", "chrF", chrf, scorer.chrf))
    return found


def results(
    evaluation: Evaluation,
    wanted: Sequence[Measure],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Result]:
    """Work out every measure that the samples have.

    Args:
        evaluation: Of one model or two.
        wanted: From :func:`measures`.
        resamples: Draws of the bootstrap.
        seed: Decides them.
    """
    outcomes = list(evaluation.outcomes.values())
    tables = {m.key: [_table(m, one) for one in outcomes] for m in wanted}
    kept = [m for m in wanted if tables[m.key][0].any()]
    if not kept:
        return []
    columns = [table for m in kept for table in tables[m.key]]
    draws = resampled(np.concatenate(columns, axis=1), resamples=resamples, seed=seed)
    ends = np.cumsum([table.shape[1] for table in columns])[:-1]
    parts = iter(np.split(draws, ends, axis=1))
    return [_result(m, tables[m.key], [next(parts) for _ in outcomes]) for m in kept]


def _result(measure: Measure, tables: list[Floats], draws: list[Floats]) -> Result:
    values = [float(measure.value(table.sum(0, keepdims=True))[0]) for table in tables]
    count = int(tables[0].any(1).sum())
    # One sample is drawn again as itself, which tells nothing
    drawn = [measure.value(sums if count > 1 else sums[:0]) for sums in draws]
    pairs = zip((BASE, ADAPTER), values, drawn, strict=False)
    models = {name: estimate(value, some) for name, value, some in pairs}
    if len(tables) == 1:
        return Result(measure, models, count)
    difference = estimate(values[1] - values[0], drawn[1] - drawn[0])
    return Result(measure, models, count, difference, _shares(measure, *tables))


def _shares(measure: Measure, base: Floats, adapter: Floats) -> Shares | None:
    if not measure.by_sample:
        return None
    change = measure.value(adapter) - measure.value(base)
    change = change[np.isfinite(change)] * (-1 if measure.lower_is_better else 1)
    if not len(change):
        return None
    return Shares(*(float(part.mean()) for part in (change > 0, change < 0, change == 0)))


def _table(measure: Measure, outcomes: Sequence[Outcome]) -> Floats:
    """Return the sums of each sample, ``[N, K]``; zeros where it has none."""
    rows = [measure.columns(outcome) for outcome in outcomes]
    width = max((len(row) for row in rows if row), default=1)
    return np.array([row or (0.0,) * width for row in rows], dtype=np.float64)


def _ratio(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)


def _exp(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(_ratio(sums))


def _score(key: str) -> Callable[[Outcome], tuple[float, float] | None]:
    def columns(outcome: Outcome) -> tuple[float, float] | None:
        value = outcome.said.scores.values.get(key) if outcome.said else None
        return None if value is None else (value, 1.0)

    return columns


def _said(read: Callable[[Said], tuple[float, ...]]) -> Callable[[Outcome], Any]:
    return lambda outcome: read(outcome.said) if outcome.said else None
