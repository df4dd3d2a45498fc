"""Did it get better? A base model and an adapter, measured on the same samples."""

import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from phi3_plugin.callable_module import CallableModule
from phi3_plugin.checkpoint.files import append_whole
from phi3_plugin.data.collate import IGNORED
from phi3_plugin.data.dataset import ChatDataset, messages_of_rows
from phi3_plugin.data.order import hold_out
from phi3_plugin.data.thoughts import is_thinking, split_thought
from phi3_plugin.data.turns import make_turn
from phi3_plugin.errors import DataError, MissingFileError, OutputError
from phi3_plugin.generate import Answer, answer_decoder
from phi3_plugin.inspect import arrays, is_chat_dataset, is_text_dataset, place_of, source_name
from phi3_plugin.pages.numbers import MINUS, count, number
from phi3_plugin.prompts import as_line, too_long
from phi3_plugin.settings import CHAT_DATASETS, PREFERENCE_DATASETS, Settings
from phi3_plugin.train.data import instantiate

BASE, ADAPTER = "base", "adapter"
"""Names of the models."""

# What they are measured on: the samples that a run holds out.

NO_ANSWER = "there is no answer of the assistant to a prompt in it"

Messages = Sequence[Mapping[str, Any]]

Question = tuple[Sequence[int], str, str]
"""The tokens of a prompt, the prompt as the model reads it, and the answer that is expected."""


@dataclass(frozen=True)
class EvalSample:
    """One sample, ready to be measured."""

    where: str
    """Where it was read."""
    tokens: list[int]
    """As a run takes them, as for the labels."""
    labels: list[int]
    prompt_ids: Sequence[int] = ()
    """What is to be answered; nothing where no answer is asked for."""
    prompt: str = ""
    """As the model reads it."""
    reference: str = ""
    """The answer that the data set has."""
    unasked: str = ""
    """Why no answer is asked for; empty where one is, or where nobody wants answers."""

    @property
    def labelled(self) -> int:
        """Labelled tokens, which the loss counts; the first token of all is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


class EvaluationData(NamedTuple):
    """The samples, and where they come from."""

    samples: list[EvalSample]
    source: str
    """Where they come from, in a sentence."""


def evaluation_data(
    s: Settings, tokenizer: Any, limit: int | None, positions: int | None
) -> EvaluationData:
    """Return the validation data, or what is held out, or else all data.

    Args:
        s: Of the run.
        tokenizer: As they ask for it.
        limit: Take the first so many samples; None takes all.
        positions: Of the model, for prompt and answer; None asks for no answers.

    Raises:
        DataError: There is no sample.
    """
    section = s.dataset_val or s.dataset
    if section["_component_"] in PREFERENCE_DATASETS:  # the better answers
        section = {**section, "_component_": CHAT_DATASETS[0]}
    if is_chat_dataset(section):  # each conversation is a sample of its own
        section = {**section, "packed": False, "split_documents": False}
    if is_text_dataset(section):
        section = {**section, "packed": False}
    rest, part = hold_out(
        instantiate(section, tokenizer), 0.0 if s.dataset_val else s.val_fraction or 0.0, s.seed
    )
    dataset = rest if part is None else part
    if isinstance(dataset, ChatDataset):  # no sample comes again because of its source's weight
        _, first = np.unique(dataset.chosen, return_index=True)
        dataset = dataset.select(np.sort(first))
    number = len(dataset) if limit is None else min(limit, len(dataset))
    if not number:
        raise DataError("dataset: there is no sample in it to evaluate.")
    chats: dict[str, Messages] = {}
    if is_chat_dataset(section) and positions is not None:
        wanted = {place_of(dataset, i) for i in range(number)}
        for where, messages in messages_of_rows(tokenizer, section):
            if where in wanted:
                chats.setdefault(where, messages)
            if len(chats) == len(wanted):
                break
    samples = [_sample(dataset, i, chats, tokenizer, positions) for i in range(number)]
    return EvaluationData(samples, _source(s, section, dataset, number))


def _sample(
    dataset: Any, i: int, chats: Mapping[str, Messages], tokenizer: Any, positions: int | None
) -> EvalSample:
    tokens, labels = (values.tolist() for values in arrays(dataset, i))
    where = place_of(dataset, i)
    if positions is None:
        return EvalSample(where, tokens, labels)
    try:
        if where in chats:
            ids, prompt, reference = question_of(chats[where], tokenizer)
        else:
            ids, prompt, reference = last_labelled(tokens, labels, tokenizer)
    except DataError as error:
        return EvalSample(where, tokens, labels, unasked=str(error))
    unasked = ""
    if len(ids) >= positions:
        unasked = f"its prompt has {too_long(len(ids), positions)}"
        ids = ()
    return EvalSample(where, tokens, labels, ids, prompt, reference, unasked)


def question_of(messages: Messages, tokenizer: Any) -> Question:
    """Return what the last answer of a conversation is an answer to, and that answer.

    Raises:
        DataError: There is none, or its prompt cannot be rendered.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise DataError(NO_ANSWER)
    before = messages[: answers[-1]]
    turns = [
        make_turn(m["role"], m["content"], tools=m.get("tools"))._replace(
            fields=m.get("fields", ""),
            variables=m.get("variables", ""),
            thought=m.get("thought"),
        )
        for m in before
    ]
    rendered = tokenizer.render(turns, add_generation_prompt=True)
    (tokens,) = tokenizer.encode_chats([rendered]).split()
    return tokens.ids.tolist(), rendered.text, messages[answers[-1]]["content"]


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
    prompt = list(tokens[:start])
    reference = [labels[i] for i in labelled.tolist() if i >= start]
    return prompt, tokenizer.decode(prompt, False), answer_decoder(tokenizer)(reference)


def _source(s: Settings, section: Mapping[str, Any], dataset: Any, number: int) -> str:
    which, total = f"{number:,}", len(dataset)
    if number < total:
        which = f"The first {number:,} of {total:,}"
    how = "the whole data set"
    if s.dataset_val:
        how = "set as dataset_val"
    elif s.val_fraction:
        how = f"held out by val_fraction={s.val_fraction:g}"
    text = f"{which} {'sample' if total == 1 else 'samples'} of {source_name(section)}, {how}."
    if isinstance(dataset, ChatDataset):
        if cut := int((dataset.full > dataset.lengths)[:number].sum()):
            text += f" Cut at tokenizer.max_seq_len for the loss: {cut:,}."
        if lost := len(dataset.lost):
            text += f" Left out, with no answer within tokenizer.max_seq_len: {lost:,} more."
    return text


# How well a model predicts the labelled tokens.


# Shapes: N labelled tokens, n some of them, V vocabulary
@torch.no_grad()
def token_scores(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the loss of each labelled token, ``[N]`` in fp32, and whether it was the likeliest.

    Args:
        model: A decoder that takes ``targets`` and ``rows``, and whose head is ``output``.
        batch: As training hands it to the model, where the model is.
    """
    # The model makes its logits a few rows at a time; the likeliest tokens are seen in passing
    likeliest: list[Tensor] = [batch["targets"][:0]]
    head: Any = model.output
    # torchtune's tied head is no module; what it multiplies with is one
    head = head if isinstance(head, nn.Module) else head.linear
    hook = head.register_forward_hook(lambda _, __, logits: likeliest.append(logits.argmax(-1)))
    try:
        losses: Tensor = -model(**batch)
    finally:
        hook.remove()
    return losses, torch.cat(likeliest) == batch["targets"]


def by_document(values: Tensor, batch: dict[str, Any]) -> list[float]:
    """Return the sum of a value of labelled tokens over each document of a batch.

    Args:
        values: ``[N]``
        batch: A row of documents, with ``lengths`` and ``rows``.
    """
    ends = torch.tensor(batch["lengths"]).cumsum(0)
    documents = torch.searchsorted(ends, batch["rows"].cpu(), right=True)
    sums = torch.zeros(len(ends), dtype=torch.float64)  # which not every device has
    return list(sums.index_add_(0, documents, values.cpu().double()).tolist())


# How close an answer is to the one that was expected, by measures that others compute too: ROUGE is
# Google's ``rouge-score``, BLEU and chrF are ``sacrebleu``. Both come with ``phi3-plugin[eval]``.

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PACKAGES = ("rouge_score", "sacrebleu")
"""Whose versions decide the scores."""

Floats = NDArray[np.float64]


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


# Shapes: R rows of sums, K sums of a measure
class Scorer:
    """Scores answers one by one; sums over many are what scoring them together gives."""

    def __init__(self) -> None:
        """Load the packages.

        Raises:
            MissingFileError: One is not installed.
        """
        rouge, sacrebleu = map(_package, ("rouge_score.rouge_scorer", "sacrebleu.metrics"))
        self._rouge: Any = rouge.RougeScorer(ROUGE, use_stemmer=True)
        self._bleu = sacrebleu.BLEU()
        self._chrf = sacrebleu.CHRF()

    def score(self, answer: str, reference: str) -> Scores:
        """Compare an answer with what was expected, each without what was thought before it.

        Args:
            answer: What a model wrote.
            reference: What the data set has.
        """
        answer, reference = (split_thought(text)[1] for text in (answer, reference))
        rouge = self._rouge.score(reference, answer)
        values = {name: 100.0 * float(rouge[name].fmeasure) for name in ROUGE}
        plain = [text.replace("\r\n", "\n").strip() for text in (answer, reference)]
        values["exact"] = 100.0 * (plain[0] == plain[1])
        if (expected := marked_number(reference)) is not None:
            values["numeric"] = 100.0 * (last_number(answer) == expected)
        bleu, chrf = (
            tuple(map(float, metric._extract_corpus_statistics([answer], [[reference]])[0]))
            for metric in (self._bleu, self._chrf)
        )
        values["chrf"] = float(self.chrf(np.array([chrf]))[0]) if any(chrf) else 0.0
        return Scores(values, bleu, chrf, bool(self._rouge._tokenizer.tokenize(reference)))

    def bleu(self, sums: Floats) -> Floats:
        """Return the BLEU of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _corpus_scores(self._bleu, sums)

    def chrf(self, sums: Floats) -> Floats:
        """Return the chrF of each row of sums, ``[R, K]`` to ``[R]``; NaN of nothing."""
        return _corpus_scores(self._chrf, sums)

    def signatures(self) -> dict[str, str]:
        """Return by which settings the scores can be had again, as sacrebleu writes them."""
        self.score("", "")  # without an answer it has none
        metrics = {"bleu": self._bleu, "chrf": self._chrf}
        return {name: str(metric.get_signature().format()) for name, metric in metrics.items()}


def _corpus_scores(metric: Any, sums: Floats) -> Floats:
    rows = [list(map(int, row)) for row in sums.tolist()]
    scores = [metric._compute_score_from_stats(row).score if any(row) else np.nan for row in rows]
    return np.array(scores, dtype=np.float64)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0].replace("_", "-")
        raise MissingFileError(
            f"answers: they are scored by {package}, which is not installed. Run: pip install "
            "'phi3-plugin[eval]'; or measure the loss alone with answers=False."
        ) from error


NUMBER = re.compile(r"-?\$?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\$?\.\d+")


def marked_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, as GSM8K ends its answers; None without one.

    Source: Cobbe et al. 2021, grade-school-math/dataset.py, ``extract_answer``; more than its
    ``-?[0-9.,]+`` the last mark counts, a ``$`` may stand before the number, and 5.0 is 5.
    """
    marked = [after for part in text.split("####")[1:] if (after := part.strip())]
    match = NUMBER.search(_with_hyphens(marked[-1].splitlines()[0])) if marked else None
    return _decimal(match[0]) if match else None


def last_number(text: str) -> Decimal | None:
    """Return the number after the last ``####``, or else the last number of a text."""
    if (marked := marked_number(text)) is not None:
        return marked
    text = _with_hyphens(text)
    matches: list[re.Match[str]] = list(NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    joins = text[: match.start()][-1:].isalnum()  # as the minus of 3-5 does
    return _decimal(match[0].removeprefix("-") if joins else match[0])


def _with_hyphens(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")  # which models write as well


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", ""))


# An evaluation: the samples, and what each model made of them.


@dataclass(frozen=True)
class Outcome:
    """What one model made of one sample."""

    loss: float
    """Summed over the labelled tokens."""
    hits: float
    """Labelled tokens that were the likeliest."""
    tokens: int
    """Labelled tokens."""
    answer: Answer | None = None
    scores: Scores | None = None
    """Of the answer."""

    def sums(self) -> dict[str, Sequence[float]]:
        """Return what each measure sums up over samples, by its key; those that it has."""
        loss = (self.loss, self.tokens)
        sums: dict[str, Sequence[float]] = {"loss": loss, "perplexity": loss}
        sums["accuracy"] = (100 * self.hits, self.tokens)
        if self.scores:
            sums |= {name: (value, 1.0) for name, value in self.scores.values.items()}
            sums |= {"bleu": self.scores.bleu, "chrf": self.scores.chrf}
        return sums

    def as_json(self) -> dict[str, Any]:
        """Return what is written of it."""
        mean = self.loss / self.tokens if self.tokens else None
        row: dict[str, Any] = {"loss": mean, "correct_tokens": int(self.hits)}
        if self.answer and self.scores:
            row |= {"answer": self.answer.text, "ended": self.answer.reason}
            row["answer_tokens"] = len(self.answer.tokens)
            row["scores"] = {name: round(v, 4) for name, v in self.scores.values.items()}
        return row

    def rank(self) -> tuple[float, float]:
        """Return how good the answer is: right or not, and then chrF, which knows every script.

        Right is the right number where the reference has one, and the same text elsewhere.
        """
        assert self.scores is not None  # only samples that were answered are ranked
        values = self.scores.values
        return values.get("numeric", values["exact"]), values["chrf"]


ENDED = {
    "stop": "ended by themselves",
    "length": "cut at generation.max_new_tokens",
    "time": "cut at generation.max_time",
    "context": "cut where the model has no more positions",
}
"""Why answers end, in words."""


@dataclass(frozen=True)
class Evaluation:
    """All of it."""

    samples: Sequence[EvalSample]
    outcomes: Mapping[str, Sequence[Outcome]]
    """By :data:`BASE` and, where there is one, :data:`ADAPTER`; one a sample."""
    facts: Mapping[str, Any]
    """What was evaluated and how, in the words of the configuration."""

    @property
    def last(self) -> Sequence[Outcome]:
        """What the model did that the evaluation is about."""
        return self.outcomes.get(ADAPTER, self.outcomes[BASE])

    @property
    def answered(self) -> list[int]:
        """The samples that were answered."""
        return [i for i, outcome in enumerate(self.last) if outcome.answer]

    def endings(self) -> dict[str, dict[str, int]]:
        """Count, for each model, why its answers ended."""
        return {
            name: dict(Counter(o.answer.reason for o in outcomes if o.answer).most_common())
            for name, outcomes in self.outcomes.items()
        }

    def endings_in_words(self) -> dict[str, str]:
        """Say, for each model that answered, why its answers ended."""
        return {
            name: ", ".join(f"{n:,} {ENDED.get(reason, reason)}" for reason, n in counts.items())
            for name, counts in self.endings().items()
            if counts
        }

    @property
    def ranked_by(self) -> str:
        """By what answers are ranked, in words; see :meth:`Outcome.rank`."""
        numeric = ["numeric" in scores.values for o in self.last if (scores := o.scores)]
        first = "exact match"
        if any(numeric):
            first = "right number"
            first += "" if all(numeric) else " (exact match where the reference has none)"
        return f"{first}, then chrF"

    def worst(self, most: int) -> list[int]:
        """Return the samples that the last model answered wrongly, the worst first."""
        ranks = {i: self.last[i].rank() for i in self.answered}
        return sorted((i for i in ranks if ranks[i][0] < 100), key=lambda i: ranks[i])[:most]

    def changed(self, most: int) -> tuple[list[int], list[int]]:
        """Return the samples on which the adapter gained most, and those on which it lost most."""
        if ADAPTER not in self.outcomes:
            return [], []
        changes = {}
        for i in self.answered:
            ranks = (self.outcomes[name][i].rank() for name in (BASE, ADAPTER))
            changes[i] = tuple(after - before for before, after in zip(*ranks, strict=True))
        rising = sorted(changes, key=lambda i: changes[i])
        gained = [i for i in reversed(rising) if changes[i] > (0, 0)]
        return gained[:most], [i for i in rising if changes[i] < (0, 0)][:most]

    @property
    def notes(self) -> list[str]:
        """Return what a reader should know before believing the numbers, a sentence each."""
        notes = []
        number = len(self.samples)
        if number == 1:
            notes = ["Only 1 sample, which has no interval and tells nothing about others."]
        elif number < FEW:
            rough = "the intervals are rough, and narrower than they should be"
            notes = [f"Only {number} samples: {rough}."]
        for reason, times in Counter(s.unasked for s in self.samples if s.unasked).items():
            first = next(s.where for s in self.samples if s.unasked == reason)
            which = f"{first} was" if times == 1 else f"{times:,} samples, the first {first}, were"
            notes.append(f"{which} not answered: {reason}.")
        if unlabelled := sum(not sample.labelled for sample in self.samples):
            have = "has" if unlabelled == 1 else "have"
            notes.append(
                f"{unlabelled:,} of {number:,} samples {have} no labelled token, and so no loss."
            )
        for name, outcomes in self.outcomes.items():
            answers = [outcome.answer.text for outcome in outcomes if outcome.answer]
            if thinking := sum(map(is_thinking, answers)):
                notes.append(
                    f"{count(thinking, 'answer')} of the {name} ended within the thought, and "
                    "count as empty: raise generation.max_new_tokens."
                )
        scores = [outcome.scores for outcome in self.outcomes[BASE] if outcome.scores]
        if unreadable := sum(not one.readable for one in scores):
            notes.append(
                f"ROUGE finds no word in {unreadable:,} of {len(scores):,} references, for it "
                "knows Latin letters and digits alone. Look at chrF."
            )
        return notes


# The numbers. A measure is worked out from sums over samples; the interval in which it could lie by
# chance, from samples that are drawn again and again, as many as there are and each as often as
# chance has it: the bootstrap. Base and adapter are judged on the same draws, so that what is hard
# for both does not blur their difference.
#
# Source: Efron & Tibshirani 1993, chapter 13 (percentile intervals); Koehn 2004 for pairs.

RESAMPLES = 2000
LEVEL = 95.0
"""Percent of the draws that an interval holds."""
FEW = 30
"""Samples below which the intervals are too narrow."""
FEWEST = 6
"""Samples that can tell something: chance makes 5 of 5 better or worse in 6 of 100 cases."""
DRAWN = 1 << 22
"""Numbers that are held at once, about."""

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


class Interval(NamedTuple):
    """A number, and the interval that holds it."""

    value: float
    low: float
    high: float


class Shares(NamedTuple):
    """Parts of the samples on which the adapter is better, worse and equal."""

    better: float
    worse: float
    equal: float


# Shapes: N samples, K sums of a measure, R resamples
@dataclass(frozen=True)
class Measure:
    """One number of an evaluation."""

    key: str
    title: str
    value: Callable[[Floats], Floats]
    """Sums ``[R, K]`` to values ``[R]``; NaN of nothing."""
    lower_is_better: bool = False
    digits: int = 2
    by_sample: bool = True
    """Whether it means something of one sample."""


def measures(scorer: Scorer | None) -> list[Measure]:
    """Return what is measured; without a scorer, of the labelled tokens alone."""
    of_tokens = [
        Measure("loss", "Loss", _mean, lower_is_better=True, digits=4),
        Measure("perplexity", "Perplexity", _exp_mean, True, digits=3, by_sample=False),
        Measure("accuracy", "Token accuracy, %", _mean),
    ]
    if scorer is None:
        return of_tokens
    return [
        *of_tokens,
        Measure("rouge1", "ROUGE-1", _mean),
        Measure("rouge2", "ROUGE-2", _mean),
        Measure("rougeL", "ROUGE-L", _mean),
        Measure("rougeLsum", "ROUGE-Lsum", _mean),
        Measure("exact", "Exact match, %", _mean),
        Measure("numeric", "Right number, %", _mean),
        Measure("bleu", "BLEU", scorer.bleu, by_sample=False),
        Measure("chrf", "chrF", scorer.chrf),
    ]


def _mean(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[:, 0] / np.where(sums[:, 1] > 0, sums[:, 1], np.nan)


def _exp_mean(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(_mean(sums))


@dataclass(frozen=True)
class Result:
    """A measure of one model, or of two and their difference."""

    measure: Measure
    models: dict[str, Interval]
    samples: int
    """How many it is measured on."""
    difference: Interval | None = None
    """Adapter less base."""
    shares: Shares | None = None

    @property
    def digits(self) -> int:
        """After the point in each of its numbers: none where all are large."""
        smallest = min(abs(interval.value) for interval in self.models.values())
        return self.measure.digits if smallest < 1000 else 0

    def text(self, value: float, *, signed: bool = False) -> str:
        """Return one of its numbers as it is shown."""
        return number(value, self.digits, signed=signed)

    def interval_text(self, interval: Interval, *, signed: bool = False) -> str:
        """Return an interval as it is shown; nothing where there is none."""
        if not math.isfinite(interval.low):
            return ""
        low, high = (self.text(end, signed=signed) for end in (interval.low, interval.high))
        return f"{low} to {high}"

    @property
    def verdict(self) -> str:
        """Whether the adapter is better, worse, or not clearly either; empty without one."""
        if self.difference is None:
            return ""
        _, low, high = self.difference
        if self.samples < FEWEST or not (low > 0 or high < 0):
            return UNCLEAR
        return BETTER if (high < 0) == self.measure.lower_is_better else WORSE

    def as_json(self) -> dict[str, Any]:
        """Return what is written of it."""
        better = "lower" if self.measure.lower_is_better else "higher"
        row: dict[str, Any] = {"title": self.measure.title, "better": better}
        row["samples"] = self.samples
        row |= {name: interval._asdict() for name, interval in self.models.items()}
        if self.difference is not None:
            row |= {"difference": self.difference._asdict(), "verdict": self.verdict}
        if self.shares is not None:
            row["share_of_samples"] = self.shares._asdict()
        return row


def results(evaluation: Evaluation, wanted: Sequence[Measure], *, seed: int = 0) -> list[Result]:
    """Work out every measure that the samples have.

    Args:
        evaluation: Of one model or two.
        wanted: From :func:`measures`.
        seed: Decides the draws of the bootstrap.
    """
    sums = [[one.sums() for one in outcomes] for outcomes in evaluation.outcomes.values()]
    tables = {m: [_table(m.key, rows) for rows in sums] for m in wanted}
    tables = {m: pair for m, pair in tables.items() if pair[0].any()}
    if not tables:
        return []
    columns = [table for pair in tables.values() for table in pair]
    draws = resampled(np.concatenate(columns, axis=1), seed=seed)
    ends = np.cumsum([table.shape[1] for table in columns])[:-1]
    parts = iter(np.split(draws, ends, axis=1))
    return [_result(m, pair, [next(parts) for _ in pair]) for m, pair in tables.items()]


def _table(key: str, rows: Sequence[Mapping[str, Sequence[float]]]) -> Floats:
    """Return the sums of each sample, ``[N, K]``; zeros where it has none."""
    width = max((len(row[key]) for row in rows if key in row), default=1)
    return np.array([row.get(key, (0.0,) * width) for row in rows], dtype=np.float64)


def resampled(columns: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return the sums of columns over samples that are drawn again, ``[R, K]``.

    Args:
        columns: ``[N, K]``; what stands in one row stays together.
        resamples: R.
        seed: Decides the draws, given N alone.
    """
    number, generator = len(columns), np.random.default_rng(seed)
    even = np.full(number, 1 / number)
    block = max(1, DRAWN // number)
    sums = [
        generator.multinomial(number, even, size=min(block, resamples - first)) @ columns
        for first in range(0, resamples, block)
    ]
    return np.concatenate(sums).astype(np.float64)


def with_interval(value: float, draws: Floats) -> Interval:
    """Return a number with the interval of what was drawn for it, ``[R]``; NaN do not count."""
    known = draws[np.isfinite(draws)]
    if not len(known):
        return Interval(value, np.nan, np.nan)
    tail = (100 - LEVEL) / 2
    low, high = np.percentile(known, (tail, 100 - tail))
    return Interval(value, float(low), float(high))


def _result(measure: Measure, tables: list[Floats], draws: list[Floats]) -> Result:
    values = [float(measure.value(table.sum(0, keepdims=True))[0]) for table in tables]
    number = int(tables[0].any(1).sum())
    # One sample is drawn again as itself, which tells nothing
    drawn = [measure.value(sums if number > 1 else sums[:0]) for sums in draws]
    triples = zip((BASE, ADAPTER), values, drawn, strict=False)
    models = {name: with_interval(value, some) for name, value, some in triples}
    if len(tables) == 1:
        return Result(measure, models, number)
    difference = with_interval(values[1] - values[0], drawn[1] - drawn[0])
    shares = None
    if measure.by_sample:
        change = measure.value(tables[1]) - measure.value(tables[0])
        change = change[np.isfinite(change)] * (-1 if measure.lower_is_better else 1)
        if len(change):
            parts = (change > 0, change < 0, change == 0)
            shares = Shares(*(float(part.mean()) for part in parts))
    return Result(measure, models, number, difference, shares)


# The numbers as a reader gets them, in the page and in a terminal.

NAMED = 4
"""Measures that a sentence names; more are counted."""


def verdict(numbers: Sequence[Result]) -> tuple[str, str]:
    """Return in a sentence whether the adapter is better, and one of the three verdicts.

    Empty without an adapter.
    """
    titles: dict[str, list[str]] = {BETTER: [], WORSE: [], UNCLEAR: []}
    for result in numbers:
        if result.verdict:
            titles[result.verdict].append(result.measure.title.removesuffix(", %"))
    better, worse, unclear = (
        ", ".join(names) if len(names) <= NAMED else f"{len(names)} measures"
        for names in titles.values()
    )
    if not (better or worse or unclear):
        return "", ""
    if better and worse:
        return f"Mixed: better in {better}; worse in {worse}.", UNCLEAR
    if not better and not worse:
        few = all(result.samples < FEWEST for result in numbers)
        why = f"the samples are fewer than {FEWEST}" if few else "every interval of it holds 0"
        return f"No clear difference: {why}.", UNCLEAR
    sign = BETTER if better else WORSE
    where = f"{better or worse}; no clear difference in {unclear}" if unclear else "every measure"
    return f"The adapter is {sign} than the base in {where}.", sign


def terminal_report(
    evaluation: Evaluation, numbers: Sequence[Result], page: Path | None = None
) -> str:
    """Return what a terminal shows.

    Args:
        evaluation: What was evaluated.
        numbers: Of it.
        page: Where the page with all of it lies, if there is one.
    """
    both = ADAPTER in evaluation.outcomes
    title = f"Evaluation: {count(len(evaluation.samples), 'sample')}"
    if answers := len(evaluation.answered):
        title += f", {count(answers, 'answer')}{' from each model' if both else ''}"
    head = [BASE, ADAPTER, "difference", "95 % interval", ""] if both else [BASE, "95 %"]
    rows = [["", *head]]
    for result in numbers:
        measure, base, difference = result.measure, result.models[BASE], result.difference
        row = [measure.title, result.text(base.value)]
        if difference is None:
            row.append(result.interval_text(base))
        else:
            row.append(result.text(result.models[ADAPTER].value))
            row.append(result.text(difference.value, signed=True))
            row += [result.interval_text(difference, signed=True), result.verdict]
        # Not every terminal's encoding has a minus
        rows.append([cell.replace(MINUS, "-") for cell in row])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [title, str(evaluation.facts.get("evaluated", "")), ""]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        if both:
            cells[-1] = rest[-1]  # the verdict
        lines.append("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())
    lines += ["", *filter(None, [verdict(numbers)[0]])]
    lines += [
        f"Answers of the {name}: {text}." for name, text in evaluation.endings_in_words().items()
    ]
    lines += [f"Note: {note}" for note in evaluation.notes]
    lines += [f"All of it: {page}"] if page else []
    return "\n".join(lines) + "\n"


# The files of an evaluation.

SAMPLES, PAGE, RESULTS = "samples.jsonl", "evaluation.html", "results.json"
PART, PREVIOUS = f"{SAMPLES}.part", "samples.previous.jsonl"
"""Answers as they come, and those of an evaluation before that ended early."""
EVALUATION_FILES = (SAMPLES, PAGE, RESULTS)
"""In the order in which they get their names: who finds the results finds the rest."""


def refuse_earlier(folder: Path) -> None:
    """Refuse to write where an evaluation lies already: it may have taken hours.

    Raises:
        OutputError: One does.
    """
    if earlier := [name for name in EVALUATION_FILES if os.path.lexists(folder / name)]:
        raise OutputError(
            f"output_dir: {folder} already holds an evaluation ({', '.join(earlier)}). Choose "
            "another folder, or replace it with overwrite=True."
        )


class AnswersSoFar:
    """Answers in a file as they come: what is left of an evaluation that ends early.

    Where several processes answer, each has a file: samples.jsonl.part, samples.jsonl.part-1, …
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """Write nothing yet.

        Args:
            folder: Of the evaluation.
            rank: Of this process.
        """
        self.file = folder / (PART if not rank else f"{PART}-{rank}")
        self.count = 0
        self._fails = False

    def add(self, model: str, sample: EvalSample, answer: Answer) -> None:
        """Write an answer of a model; where that fails, say so once and go on."""
        row = {"model": model, "where": sample.where, "prompt": sample.prompt}
        row |= {"reference": sample.reference, "answer": answer.text, "ended": answer.reason}
        if self._fails:
            return
        try:
            append_whole(self.file, as_line(row).encode("utf-8", "replace"))
            self.count += 1
        except OSError as error:
            self._fails = True
            print(f"{self.file} cannot be written: {error.strerror or error}.", file=sys.stderr)


def set_aside(folder: Path) -> str:
    """Keep the answers of an evaluation that has ended early, and say so if there are any.

    Raises:
        OutputError: The folder cannot be written to.
    """
    if not (parts := sorted(folder.glob(f"{PART}*"))):
        return ""
    try:
        answers = b"".join(part.read_bytes() for part in parts)
        (folder / PREVIOUS).write_bytes(answers)
        for part in parts:
            part.unlink()
    except OSError as error:
        raise OutputError(
            f"output_dir: {folder} cannot be written: {error.strerror or error}. Choose a folder "
            "that you may write to."
        ) from error
    number = count(len(answers.splitlines()), "answer")
    return f"An evaluation ended early here. Its {number} are in {folder / PREVIOUS} now."


def samples_text(evaluation: Evaluation) -> str:
    """Return what ``samples.jsonl`` holds: a line a sample."""
    lines = []
    for i, sample in enumerate(evaluation.samples):
        row: dict[str, Any] = {"where": sample.where, "tokens": sample.labelled}
        row |= {"prompt": sample.prompt, "reference": sample.reference}
        if sample.unasked:
            row["not_answered"] = sample.unasked
        row |= {name: outcomes[i].as_json() for name, outcomes in evaluation.outcomes.items()}
        lines.append(as_line(_finite(row)))
    return "".join(lines)


def results_text(evaluation: Evaluation, numbers: Sequence[Result], seed: int) -> str:
    """Return what ``results.json`` holds: all numbers and what decided them."""
    content = {
        "samples": len(evaluation.samples),
        "answered": len(evaluation.answered),
        "labelled_tokens": sum(sample.labelled for sample in evaluation.samples),
        "measures": {result.measure.key: result.as_json() for result in numbers},
        "ended": evaluation.endings(),
        "notes": evaluation.notes,
        "bootstrap": {"resamples": RESAMPLES, "percent": LEVEL, "seed": seed},
        **evaluation.facts,
    }
    return json.dumps(_finite(content), ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a value as JSON holds it, with null for numbers that it cannot say."""
    text = json.dumps(value, default=str)
    return json.loads(text, parse_constant=lambda _: None)


sys.modules[__name__].__class__ = CallableModule
