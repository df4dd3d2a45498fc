"""What a model does on data it is measured by, and what an adapter changes about it."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phi3_plugin.data.dataset import IGNORED
from phi3_plugin.data.formats import make_turn
from phi3_plugin.data.order import hold_out
from phi3_plugin.errors import DataError, MissingFileError, OutputError
from phi3_plugin.inspect import CHAT_DATASETS, arrays, conversations, place
from phi3_plugin.settings import (
    Settings,
)
from phi3_plugin.train.feed import build

# How far a number would move with other samples of the same kind: the paired bootstrap.
#
# Samples are drawn again and again, as many as there are and each as often as chance has it; base
# and adapter are judged on the same draws, so that what is hard for both does not blur their
# difference.
#
# Source: Efron & Tibshirani 1993, chapter 13 (percentile intervals); Koehn 2004 for pairs.

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


# The number that an answer ends in, as GSM8K writes and scores it.

MARK = "####"
"""GSM8K ends its answers in a line like ``#### 1,234``."""

NUMBER = re.compile(r"-?\$?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\$?\.\d+")


def marked_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``; None where there is none.

    Source: Cobbe et al. 2021, grade-school-math/dataset.py, ``extract_answer``; more than its
    ``-?[0-9.,]+`` the last mark counts, a ``$`` may stand before the number, and 5.0 is 5.
    """
    marked = [after for part in text.split(MARK)[1:] if (after := part.strip())]
    found = NUMBER.search(_plain_number(marked[-1].splitlines()[0])) if marked else None
    return _value(found[0]) if found else None


def last_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, or else the last number of a text."""
    if (marked := marked_number(text)) is not None:
        return marked
    text = _plain_number(text)
    found: list[re.Match[str]] = list(NUMBER.finditer(text))
    return _value(_unjoined(found[-1], text)) if found else None


def _plain_number(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")  # which models write as well


def _unjoined(found: re.Match[str], text: str) -> str:
    """Return a number without a minus that stands between two numbers, as in 3-5."""
    joins = found[0].startswith("-") and text[: found.start()][-1:].isalnum()
    return found[0][1:] if joins else found[0]


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


# How close an answer is to the one that was expected, by measures that others compute too.
#
# ROUGE is Google's ``rouge-score``, BLEU and chrF are ``sacrebleu``; both come with
# ``phi3-plugin[eval]``.

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

PACKAGES = ("rouge_score", "sacrebleu")
"""Whose versions decide the scores."""


@dataclass(frozen=True)
class Scores:
    """Of one answer; everything from 0 to 100."""

    values: dict[str, float]
    """ROUGE as F-measures, ``exact``, ``chrf`` and, where the reference has one, ``numeric``."""
    bleu: tuple[float, ...]
    """What sums up to BLEU over a corpus."""
    chrf: tuple[float, ...]
    """What sums up to chrF over a corpus."""
    readable: bool
    """Whether ROUGE finds words in the reference; it knows Latin letters and digits alone."""


class Scorer:
    """Scores answers one by one; sums over many are what scoring them together gives."""

    def __init__(self) -> None:
        """Load the packages.

        Raises:
            MissingFileError: One is not installed.
        """
        scorer = _module("rouge_score.rouge_scorer").RougeScorer
        self._rouge: Any = scorer(ROUGE, use_stemmer=True)
        metrics = _module("sacrebleu.metrics")
        self._bleu, self._chrf = metrics.BLEU(), metrics.CHRF()

    def score(self, answer: str, reference: str) -> Scores:
        """Compare an answer with what was expected.

        Args:
            answer: What a model wrote.
            reference: What the data set has.
        """
        found = self._rouge.score(reference, answer)
        values = {name: 100.0 * float(found[name].fmeasure) for name in ROUGE}
        values["exact"] = 100.0 * (_plain(answer) == _plain(reference))
        if (expected := marked_number(reference)) is not None:
            values["numeric"] = 100.0 * (last_number(answer) == expected)
        bleu, chrf = (self._sums(metric, answer, reference) for metric in (self._bleu, self._chrf))
        values["chrf"] = float(self._chrf._compute_score_from_stats(list(map(int, chrf))).score)
        readable = bool(self._rouge._tokenizer.tokenize(reference))
        return Scores(values, bleu, chrf, readable)

    def bleu(self, sums: NDArray[Any]) -> NDArray[np.float64]:
        """Return the BLEU of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _from_sums(self._bleu, sums)

    def chrf(self, sums: NDArray[Any]) -> NDArray[np.float64]:
        """Return the chrF of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _from_sums(self._chrf, sums)

    def signatures(self) -> dict[str, str]:
        """Return by which settings the scores can be had again, as sacrebleu writes them."""
        self.score("", "")  # without an answer it has none
        named = {"bleu": self._bleu, "chrf": self._chrf}
        return {name: str(metric.get_signature().format()) for name, metric in named.items()}

    @staticmethod
    def _sums(metric: Any, answer: str, reference: str) -> tuple[float, ...]:
        (sums,) = metric._extract_corpus_statistics([answer], [[reference]])
        return tuple(map(float, sums))


def _from_sums(metric: Any, sums: NDArray[Any]) -> NDArray[np.float64]:
    rows = [list(map(int, row)) for row in sums.tolist()]
    scores = [float(metric._compute_score_from_stats(r).score) if any(r) else np.nan for r in rows]
    return np.array(scores, dtype=np.float64)


def _plain(text: str) -> str:
    return text.replace("\r\n", "\n").strip()


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingFileError(
            f"answers: they are scored by {package}, which is not installed. Run: pip install "
            "'phi3-plugin[eval]'; or measure the loss alone with answers=False."
        ) from error


# How well a model predicts the labelled tokens of a batch, one by one.
#
# The model works out log p itself, some rows of logits at a time. Whoever listens at its head sees
# those rows as well, so that nothing is computed twice and no more logits exist than in training.


# Shapes: N labelled tokens, n some of them, V vocabulary
@torch.no_grad()
def token_scores(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of each labelled token, ``[N]`` in fp32, and whether it was the likeliest.

    Args:
        model: A decoder that takes ``targets`` and ``rows``, and whose head is ``output``.
        batch: As training hands it to the model, where the model is.
    """
    targets = batch["targets"]
    hits = [targets.new_zeros(0).bool()]

    def look(module: nn.Module, given: Any, logits: Tensor) -> None:
        first = sum(map(len, hits))
        hits.append(logits.argmax(-1) == targets[first : first + len(logits)])

    listening = _head(model).register_forward_hook(look)
    try:
        losses = -model(**batch)
    finally:
        listening.remove()
    return losses, torch.cat(hits)


def _head(model: nn.Module) -> nn.Module:
    head: Any = model.output
    # torchtune's tied head is no module; what it multiplies with is one
    return head if isinstance(head, nn.Module) else head.linear


def by_document(values: Tensor, batch: dict[str, Any]) -> list[float]:
    """Return the sum of a value of labelled tokens over each document of a batch.

    Args:
        values: ``[N]``
        batch: A row of documents, with ``lengths`` and ``rows``.
    """
    ends = torch.tensor(batch["lengths"], device=values.device).cumsum(0)
    documents = torch.searchsorted(ends, batch["rows"], right=True)
    sums = torch.zeros(len(ends), dtype=torch.float64, device=values.device)
    return list(sums.index_add_(0, documents, values.double()).tolist())


# What is kept of an evaluation: the samples, and what each model made of them.

BASE, ADAPTER = "base", "adapter"
"""Names of the models."""


@dataclass(frozen=True)
class Sample:
    """What is asked."""

    where: str
    """Where it was read."""
    tokens: int
    """Labelled tokens."""
    prompt: str
    """As the model reads it; empty where nothing is asked."""
    reference: str
    """What the data set has as the answer."""
    unasked: str = ""
    """Why no answer was asked for; empty where one was."""


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    ended: str
    """``stop``, ``length``, ``time`` or ``context``."""
    tokens: int
    scores: Scores


@dataclass(frozen=True)
class Outcome:
    """What one model made of one sample."""

    loss: float
    """Summed over the labelled tokens."""
    hits: float
    """Labelled tokens that were the likeliest."""
    tokens: int
    """Labelled tokens."""
    said: Said | None = None


@dataclass(frozen=True)
class Evaluation:
    """All of it."""

    samples: Sequence[Sample]
    outcomes: Mapping[str, Sequence[Outcome]]
    """By :data:`BASE` and, where there is one, :data:`ADAPTER`; one a sample."""
    facts: Mapping[str, Any]
    """What was evaluated and how, in the words of the configuration."""
    notes: Sequence[str] = ()
    """What a reader should know about the numbers."""

    @property
    def last(self) -> Sequence[Outcome]:
        """What the model did that the evaluation is about."""
        return self.outcomes.get(ADAPTER, self.outcomes[BASE])

    @property
    def asked(self) -> list[int]:
        """The samples that were answered."""
        return [i for i, outcome in enumerate(self.last) if outcome.said]

    def endings(self) -> dict[str, dict[str, int]]:
        """Count, for each model, how its answers ended."""
        return {
            name: dict(Counter(one.said.ended for one in outcomes if one.said).most_common())
            for name, outcomes in self.outcomes.items()
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what is written of each sample."""
        for i, sample in enumerate(self.samples):
            line: dict[str, Any] = {"where": sample.where, "tokens": sample.tokens}
            line |= {"prompt": sample.prompt, "reference": sample.reference}
            if sample.unasked:
                line["not_answered"] = sample.unasked
            yield line | {name: _line(seen[i]) for name, seen in self.outcomes.items()}


def _line(outcome: Outcome) -> dict[str, Any]:
    mean = outcome.loss / outcome.tokens if outcome.tokens else None
    line: dict[str, Any] = {"loss": mean, "correct_tokens": int(outcome.hits)}
    if said := outcome.said:
        line |= {"answer": said.text, "ended": said.ended, "answer_tokens": said.tokens}
        line["scores"] = {name: round(value, 4) for name, value in said.scores.values.items()}
    return line


# Which answers to look at: the worst, and those that the adapter changed most.
#
# Being right comes first, which is the right number where the reference has one and the same text
# elsewhere; then how much of the text agrees, by chrF, which knows every script.

Key = tuple[float, float]
"""(right, chrF)"""


def worst(evaluation: Evaluation, count: int) -> list[int]:
    """Return the samples that the last model answered wrongly, the worst first."""
    keys = {i: _key(evaluation.last[i]) for i in evaluation.asked}
    return sorted((i for i in keys if keys[i][0] < 100), key=lambda i: keys[i])[:count]


def changed(evaluation: Evaluation, count: int) -> tuple[list[int], list[int]]:
    """Return the samples on which the adapter gained most, and those on which it lost most."""
    if ADAPTER not in evaluation.outcomes:
        return [], []
    base, adapter = (evaluation.outcomes[name] for name in (BASE, ADAPTER))
    change = {i: _change(_key(base[i]), _key(adapter[i])) for i in evaluation.asked}
    rising = sorted(change, key=lambda i: change[i])
    gained = [i for i in reversed(rising) if change[i] > (0, 0)]
    return gained[:count], [i for i in rising if change[i] < (0, 0)][:count]


def _key(outcome: Outcome) -> Key:
    assert outcome.said is not None  # only samples that were answered are ranked
    values = outcome.said.scores.values
    return values.get("numeric", values["exact"]), values["chrf"]


def _change(before: Key, after: Key) -> Key:
    return after[0] - before[0], after[1] - before[1]


# The numbers of an evaluation, with their intervals, and what the adapter changed.
#
# A measure is worked out from sums over samples. So one pass over the draws of the bootstrap gives
# all measures, and a measure of one sample is that of its own sums.

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


# What a reader should know about the numbers before believing them.

FEW = 30
"""Samples below which the intervals of a bootstrap are too narrow."""


def notes(samples: Sequence[Sample], outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Return what limits the numbers, a sentence each."""
    return [*_few(samples), *_unasked(samples), *_unlabelled(samples), *_unreadable(outcomes)]


def _few(samples: Sequence[Sample]) -> Iterator[str]:
    if len(samples) == 1:
        yield "Only 1 sample, which has no interval and tells nothing about others."
    elif len(samples) < FEW:
        yield (
            f"Only {len(samples)} samples: the intervals are rough, and narrower than they should "
            "be."
        )


def _unasked(samples: Sequence[Sample]) -> Iterator[str]:
    reasons = {sample.unasked: sample for sample in reversed(samples) if sample.unasked}
    for reason, first in reversed(reasons.items()):
        count = sum(sample.unasked == reason for sample in samples)
        which = first.where if count == 1 else f"{count:,} samples, the first {first.where},"
        yield f"{which} {'was' if count == 1 else 'were'} not answered: {reason}."


def _unlabelled(samples: Sequence[Sample]) -> Iterator[str]:
    if count := sum(not sample.tokens for sample in samples):
        have = "has" if count == 1 else "have"
        yield f"{count:,} of {len(samples):,} samples {have} no labelled token, and so no loss."


def _unreadable(outcomes: Mapping[str, Sequence[Outcome]]) -> Iterator[str]:
    scores = [outcome.said.scores for outcome in outcomes[BASE] if outcome.said]
    if count := sum(not one.readable for one in scores):
        yield (
            f"ROUGE finds no word in {count:,} of {len(scores):,} references, for it knows Latin "
            "letters and digits alone. Look at chrF."
        )


# The numbers of an evaluation as a reader gets them, in the page and in a terminal.

ENDED = {
    "stop": "ended by themselves",
    "length": "cut at generation.max_new_tokens",
    "time": "cut at generation.max_time",
    "context": "cut where the model has no more positions",
}
"""How answers end, in words."""

NAMED = 4
"""Measures that a sentence names; more are counted."""


def value(result: Result, number: float, *, signed: bool = False) -> str:
    """Return a number with the digits of its measure."""
    if not math.isfinite(number):
        return "–"
    digits = result.measure.digits if abs(number) < 1e4 else 0
    number = round(number, digits) + 0.0  # there is no -0.00
    return f"{number:{'+' if signed else ''},.{digits}f}"


def interval(result: Result, found: Estimate, *, signed: bool = False) -> str:
    """Return an interval; nothing where there is none."""
    if not math.isfinite(found.low):
        return ""
    low, high = (value(result, end, signed=signed) for end in (found.low, found.high))
    return f"{low} to {high}"


def percent(share: float) -> str:
    """Return a part as percent."""
    return f"{100 * share:.0f} %"


def counted(count: int, thing: str) -> str:
    """Return a number of things."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def verdict(found: Sequence[Result]) -> tuple[str, str]:
    """Return in a sentence whether the adapter is better, and one of the three verdicts.

    Empty without an adapter.
    """
    titles: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for result in found:
        if result.verdict:
            titles[result.verdict].append(result.measure.title.removesuffix(", %"))
    better, worse, unclear = titles.values()
    if not any(titles.values()):
        return "", ""
    if better and worse:
        return f"Mixed: better in {_listed(better)}; worse in {_listed(worse)}.", UNCLEAR
    if not better and not worse:
        few = all(result.samples < FEWEST for result in found)
        why = f"the samples are fewer than {FEWEST}" if few else "every interval of it holds 0"
        return f"No clear difference: {why}.", UNCLEAR
    sign, which = (BETTER, better) if better else (WORSE, worse)
    rest = f"; no clear difference in {_listed(unclear)}" if unclear else ""
    every = _listed(which) if unclear else "every measure"
    return f"The adapter is {sign} than the base in {every}{rest}.", sign


def _listed(titles: Sequence[str]) -> str:
    return ", ".join(titles) if len(titles) <= NAMED else f"{len(titles)} measures"


def endings(evaluation: Evaluation) -> dict[str, str]:
    """Say how the answers of each model ended."""
    return {name: _ended(counts) for name, counts in evaluation.endings().items() if counts}


def _ended(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {ENDED.get(ended, ended)}" for ended, count in counts.items())


def table(evaluation: Evaluation, found: Sequence[Result]) -> list[list[str]]:
    """Return the rows of a terminal's table, the head first."""
    both = ADAPTER in evaluation.outcomes
    rows = [["", BASE, ADAPTER, "difference", "95 % interval", ""] if both else ["", BASE, "95 %"]]
    for result in found:
        row = [result.measure.title, value(result, result.models[BASE].value)]
        if result.difference is None:
            row.append(interval(result, result.models[BASE]))
        else:
            change = result.difference
            row.append(value(result, result.models[ADAPTER].value))
            row.append(value(result, change.value, signed=True))
            row += [interval(result, change, signed=True), result.verdict]
        rows.append(row)
    return rows


def report(evaluation: Evaluation, found: Sequence[Result], page: str) -> str:
    """Return what a terminal shows.

    Args:
        evaluation: What was evaluated.
        found: Its numbers.
        page: Where the page with all of it lies.
    """
    rows = table(evaluation, found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    asked, samples = len(evaluation.asked), len(evaluation.samples)
    title = f"Evaluation: {counted(samples, 'sample')}"
    each = " from each model" * (ADAPTER in evaluation.outcomes)
    lines = [f"{title}, {counted(asked, 'answer')}{each}" if asked else title]
    lines += [str(evaluation.facts.get("evaluated", "")), ""]
    for row in rows:
        left, *rest = row
        aligned = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        if len(rest) > 2:
            aligned[-1] = rest[-1]  # the verdict
        lines.append("  ".join([f"{left:{widths[0]}}", *aligned]).rstrip())
    lines += ["", *filter(None, [verdict(found)[0]])]
    lines += [f"Answers of the {name}: {said}." for name, said in endings(evaluation).items()]
    lines += [f"Note: {note}" for note in evaluation.notes]
    return "\n".join([*lines, f"All of it: {page}"]) + "\n"


# Write the files of an evaluation, all of them or none.

SAMPLES, RESULTS, PAGE = "samples.jsonl", "results.json", "evaluation.html"
NAMES = (SAMPLES, PAGE, RESULTS)
"""In the order in which they get their names: who finds the results finds the rest."""

LINE_ENDS = re.compile("[\x85\u2028\u2029]")
"""Characters at which some readers would end a line."""


def refuse_earlier(folder: Path) -> None:
    """Refuse to write where an evaluation lies already: it may have taken hours.

    Raises:
        OutputError: One does.
    """
    if found := [name for name in NAMES if os.path.lexists(folder / name)]:
        raise OutputError(
            f"output_dir: {folder} already holds an evaluation ({', '.join(found)}). Choose "
            "another folder, or replace it with overwrite=True."
        )


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files whole; nothing gets its name before everything is on the disk.

    Args:
        folder: Where to; created if missing.
        texts: What each is to hold, by its name.

    Raises:
        OutputError: One cannot be written; earlier ones are untouched.
    """
    aside = {name: folder / f".partial-{name}" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            _write(aside[name], text)
        for name in texts:
            os.replace(aside[name], folder / name)
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} could not be written: {error}. Free space or permissions are "
            "missing; run the command again with another folder."
        ) from error
    finally:
        for path in aside.values():
            with suppress(OSError):
                path.unlink()


def samples_text(evaluation: Evaluation) -> str:
    """Return what ``samples.jsonl`` holds: a line a sample."""
    return "".join(_json(line) + "\n" for line in evaluation.lines())


def results_text(evaluation: Evaluation, found: Sequence[Result], seed: int) -> str:
    """Return what ``results.json`` holds: all numbers and what decided them."""
    content = {
        "samples": len(evaluation.samples),
        "answered": len(evaluation.asked),
        "labelled_tokens": sum(sample.tokens for sample in evaluation.samples),
        "measures": {result.measure.key: _result_row(result) for result in found},
        "ended": evaluation.endings(),
        "notes": list(evaluation.notes),
        "bootstrap": {"resamples": RESAMPLES, "percent": LEVEL, "seed": seed},
        **evaluation.facts,
    }
    return _json(content, indent=2) + "\n"


def _result_row(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = {
        "title": result.measure.title,
        "better": "lower" if result.measure.lower_is_better else "higher",
        "samples": result.samples,
    }
    found |= {name: _estimate(value) for name, value in result.models.items()}
    if result.difference is not None:
        found |= {"difference": _estimate(result.difference), "verdict": result.verdict}
    if result.shares is not None:
        found["share_of_samples"] = result.shares._asdict()
    return found


def _estimate(value: Estimate) -> dict[str, float | None]:
    numbers = value._asdict().items()
    return {name: number if math.isfinite(number) else None for name, number in numbers}


def _json(content: Any, indent: int | None = None) -> str:
    text = json.dumps(_finite(content), ensure_ascii=False, indent=indent, allow_nan=False)
    return LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    """Return a value without what JSON cannot say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# What `phi3_plugin.recipes.phi3_evaluate` measures on: the samples that a run holds out.

NO_ANSWER = "there is no answer of the assistant to a prompt in it"

Messages = Sequence[Mapping[str, Any]]
Question = tuple[list[int], str, str]
"""Tokens and text of a prompt, and what is expected as the answer."""


@dataclass(frozen=True)
class Item:
    """One sample, ready to be measured."""

    sample: Sample
    trained: dict[str, Any]
    """Its ``tokens`` and ``labels``, as a run takes them."""
    prompt: list[int]
    """What is to be answered; empty where nothing is."""


@dataclass(frozen=True)
class Held:
    """The samples, and where they come from."""

    items: list[Item]
    evaluated: str
    """Where they come from, in words."""
    section: Mapping[str, Any]
    """And in those of the configuration."""


def held(s: Settings, tokenizer: Any, *, limit: int | None, positions: int | None) -> Held:
    """Return the validation data, or what is held out, or else all data.

    Args:
        s: Of the run.
        tokenizer: As they ask for it.
        limit: Take the first so many samples; None takes all.
        positions: Of the model, for prompt and answer; None asks for no answers.
    """
    section = unpacked(s.dataset_val or s.dataset)
    share = 0.0 if s.dataset_val else s.val_fraction
    kept, part = hold_out(build(section, tokenizer), share, s.seed)
    dataset = once(kept if part is None else part)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    if not count:
        raise DataError("dataset: there is no sample in it to evaluate.")
    chats = {} if positions is None else chats_of(dataset, count, section, tokenizer)
    items = [_item(dataset, i, chats, tokenizer, positions) for i in range(count)]
    words = _in_words(s, section, count, len(dataset)) + _too_long(dataset, count)
    return Held(items, words, section)


def unpacked(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a data set's section under which each conversation is a sample of its own."""
    if section["_component_"] not in CHAT_DATASETS:
        return section
    return {**section, "packed": False, "split_documents": False}


def once(dataset: Any) -> Any:
    """Return a data set in which no sample comes again because of its source's weight."""
    if not hasattr(dataset, "chosen"):
        return dataset
    _, first = np.unique(dataset.chosen, return_index=True)
    return dataset.select(np.sort(first))


def chats_of(
    dataset: Any, count: int, section: Mapping[str, Any], tokenizer: Any
) -> dict[str, Messages]:
    """Return the messages of the first samples, by where they were read."""
    found = dict[str, Messages]()
    if section["_component_"] not in CHAT_DATASETS:
        return found
    missing = {place(dataset, i) for i in range(count)}
    for where, messages in conversations(tokenizer, section):
        if where in missing:
            found[where] = messages
            missing.remove(where)
        if not missing:
            break
    return found


def question(messages: Messages, tokenizer: Any) -> Question:
    """Return what the last answer of a conversation is an answer to, and that answer.

    Raises:
        DataError: There is none, or its prompt cannot be rendered.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(NO_ANSWER)
    before = messages[: answers[-1]]
    turns = [make_turn(m["role"], m["content"], tools=m.get("tools")) for m in before]
    (tokens,) = tokenizer.tokenize_chats([turns], add_generation_prompt=True)
    text = tokenizer.render(turns, add_generation_prompt=True).text
    return tokens.ids.tolist(), text, messages[answers[-1]]["content"]


def last_labelled(tokens: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Question:
    """Return the last stretch of labelled tokens as the answer to what is before it.

    For samples of which nothing more is known.

    Raises:
        DataError: Nothing is labelled, or all of it is.
    """
    labelled = np.flatnonzero(np.asarray(labels) != IGNORED)
    breaks = np.flatnonzero(np.diff(labelled) > 1)
    start = int(labelled[breaks[-1] + 1 if len(breaks) else 0]) if len(labelled) else 0
    if start < 2:  # one token is no prompt: a sample that is labelled as a whole begins with it
        raise DataError(NO_ANSWER)
    prompt, said = list(tokens[:start]), [labels[i] for i in labelled.tolist() if i >= start]
    return prompt, tokenizer.decode(prompt, False), tokenizer.decode(said)


def _item(
    dataset: Any, i: int, chats: Mapping[str, Messages], tokenizer: Any, positions: int | None
) -> Item:
    ids, labels = (values.tolist() for values in arrays(dataset, i))
    where, tokens = place(dataset, i), sum(label != IGNORED for label in labels[1:])
    prompt, text, reference, unasked = list[int](), "", "", ""
    if positions is not None:
        try:
            chat = chats.get(where)
            prompt, text, reference = (
                last_labelled(ids, labels, tokenizer) if chat is None else question(chat, tokenizer)
            )
            _check_length(len(prompt), positions)
        except DataError as error:
            prompt, unasked = [], str(error)
    sample = Sample(where, tokens, text, reference, unasked)
    return Item(sample, {"tokens": ids, "labels": labels}, prompt)


def _check_length(length: int, positions: int) -> None:
    if length >= positions:
        raise DataError(
            f"its prompt has {length:,} tokens, and the model {positions:,} positions for prompt "
            "and answer"
        )


def _in_words(s: Settings, section: Mapping[str, Any], count: int, total: int) -> str:
    how = "set as dataset_val" if s.dataset_val else "the whole data set"
    if not s.dataset_val and s.val_fraction:
        how = f"held out by val_fraction={s.val_fraction:g}"
    number = f"{count:,}" if count == total else f"The first {count:,} of {total:,}"
    source = section.get("source") or section["_component_"]
    source = ", ".join(map(str, source)) if isinstance(source, list | tuple) else source
    return f"{number} {'sample' if total == 1 else 'samples'} of {source}, {how}."


def _too_long(dataset: Any, count: int) -> str:
    """Say what tokenizer.max_seq_len takes from the numbers; empty where that is nothing."""
    if not hasattr(dataset, "lost"):
        return ""
    lost, cut = len(dataset.lost), int((dataset.full > dataset.lengths)[:count].sum())
    said = f" Cut at tokenizer.max_seq_len for the loss: {cut:,}." if cut else ""
    if lost:
        said += f" Left out, with no answer within tokenizer.max_seq_len: {lost:,} more."
    return said
