"""What a run would be trained on: its numbers, what to do about them, and samples token by token.

`survey` passes over the samples once, `statistics` counts, `advice` says what to act on, `show`
spells samples. `phi3_plugin.compare` holds them beside what transformers makes of the same rows;
`phi3_plugin.pages.inspection` shows it all.
"""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray

from phi3_plugin.config import read_config
from phi3_plugin.data.collate import IGNORED, concatenate
from phi3_plugin.data.findings import (
    BROKEN,
    CUT_AWAY,
    DROPPED_MESSAGE,
    NO_FINAL_ANSWER,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    UNREAD_TOKEN,
    UNUSABLE,
    Findings,
)
from phi3_plugin.data.order import Order
from phi3_plugin.data.packing import Packs
from phi3_plugin.data.preferences import PreferenceDataset
from phi3_plugin.data.thoughts import END_OF_THOUGHT, THINK
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import DataError
from phi3_plugin.pages.numbers import count, percent
from phi3_plugin.settings import CHAT_DATASETS, PREFERENCE_DATASETS, TEXT_DATASETS, Settings
from phi3_plugin.train.data import FEW_STEPS, RunData

# Shapes: N samples, S tokens of one of them, L conversations that gave no sample

FIRST = 5
"""Places that are named of what there are many of."""

Numbers = NDArray[np.int64]


def is_chat_dataset(section: Mapping[str, Any]) -> bool:
    """Whether a section of a YAML is a data set whose rows can be told apart."""
    return section["_component_"] in CHAT_DATASETS


def is_text_dataset(section: Mapping[str, Any]) -> bool:
    """Whether a section of a YAML is a data set of documents, whose samples are windows of them."""
    return section["_component_"] in TEXT_DATASETS


def source_name(section: Mapping[str, Any]) -> str:
    """Return where the rows of a section come from, or what makes them."""
    source = section.get("source") or section["_component_"]
    sources = source if isinstance(source, list | tuple) else [source]
    return ", ".join(str(one.get("source") if isinstance(one, Mapping) else one) for one in sources)


def all_rows(settings: Settings) -> Settings:
    """Return settings under which rows that cannot be used are counted, and stop nothing."""

    def dropping(section: Any) -> Any:
        ours = (*CHAT_DATASETS, *PREFERENCE_DATASETS, *TEXT_DATASETS)
        knows = section and section["_component_"] in ours
        return {**section, "bad_rows": "drop"} if knows else section

    val = dropping(settings.dataset_val)
    return replace(settings, dataset=dropping(settings.dataset), dataset_val=val)


def unpacked(dataset: Any) -> Any:
    """Return the samples of a data set, whether it is packed or not."""
    return dataset.ds if isinstance(dataset, Packs) else dataset


# One pass over the samples


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
    columns = []
    for i in range(len(dataset)):
        ids, labels = arrays(dataset, i)
        trained = np.flatnonzero(labels != IGNORED)
        first = int(trained[0]) if len(trained) else len(ids)
        ends = bool(np.isin(labels[trained], stops).any())
        columns.append((len(ids), len(trained), first, _digest(ids), _digest(ids[:first]), ends))
    lengths, labelled, firsts, content, prompt, ended = zip(*columns, strict=True)
    return Samples(
        lengths=np.array(lengths),
        full=np.asarray(getattr(dataset, "full", lengths), dtype=np.int64),
        labelled=np.array(labelled),
        first=np.array(firsts),
        content=np.array(content, dtype=np.uint64),
        prompt=np.array(prompt, dtype=np.uint64),
        stops=np.array(ended),
        places=[place_of(dataset, i) for i in range(len(dataset))],
    )


def arrays(dataset: Any, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and labels of a sample, each [S]."""
    if hasattr(dataset, "arrays"):
        ids, labels = dataset.arrays(i)
        return ids, labels
    sample = dataset[i]
    return np.asarray(sample["tokens"], np.int32), np.asarray(sample["labels"], np.int32)


def place_of(dataset: Any, i: int) -> str:
    """Return where a sample was read."""
    return str(dataset.places(i)) if hasattr(dataset, "places") else f"sample {i}"


def _digest(ids: NDArray[np.int32]) -> int:
    content = np.ascontiguousarray(ids, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


# The numbers

USUAL = (512, 1024, 2048, 4096)
"""Lengths at which it is always told what a limit would cost."""

BINS = 12
"""Bars of a histogram, at most."""

UNGROUPED, GROUPED, PACKED = "plain", "grouped by length", "packed"
"""The ways to put samples into batches."""


class Alike(NamedTuple):
    """Samples that come more than once."""

    copies: int
    """Samples with the tokens of an earlier one from another row."""
    pairs: list[tuple[str, str]]
    """Where the first of them stand, each after the earlier one."""
    answers: int
    """Samples with the prompt of another one and another answer."""


class Cut(NamedTuple):
    """What a limit of the length costs."""

    limit: int
    samples: float
    """Share of the samples that are longer."""
    tokens: float
    """Share of the tokens that are lost."""
    name: str
    """What this limit is, if it is not just a round number."""
    least: bool = False
    """Whether more tokens may be lost: that would show only if the data were read with it."""

    @property
    def loss(self) -> str:
        """The share of the tokens that it loses, in words."""
        share = percent(self.tokens)
        if not self.least:
            return share
        return ">0 %" if share.startswith("<") else f"≥ {share}"


class Bin(NamedTuple):
    """A bar of a histogram: the samples of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    samples: int

    @property
    def span(self) -> str:
        """The lengths, in words."""
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,}–{self.high:,}"


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


class StockSteps(NamedTuple):
    """What torchtune's recipes would make of the same configuration."""

    steps: int
    """Of the whole run."""
    each: int
    """Of an epoch."""
    left_over: int
    """Samples, or packs, at the end of an epoch that make no whole step and are left out."""


class HeldOut(NamedTuple):
    """The validation data."""

    samples: int
    tokens: int
    labelled: int
    seen: int
    """Samples that are trained on as well."""
    findings: Findings


class Comparison(NamedTuple):
    """What comparing samples with transformers gave."""

    samples: int
    """How many were compared."""
    differ: int
    places: list[str]
    """The first that differ, and where they begin to."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A data set in numbers, as a training run would see it."""

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
    """What becomes of longer ones, see :func:`phi3_plugin.data.chat_dataset`."""
    positions: int
    """How many the model was made for."""
    pairs: "Pairs | None" = None
    """Of pairs of answers: how long both are."""
    batchings: list[Batching]
    per_step: str
    """What an optimizer step sees, in words."""
    steps: int
    """Of the whole run."""
    padded: bool = True
    """Whether the recipe pads; ours puts samples into one row, unless collate_fn pads."""
    stock: StockSteps | None = None
    """Where the configuration is one of torchtune's recipes too; they pad."""
    cuts: list[Cut]
    alike: Alike
    endless: int
    """Samples in which no end of a turn is trained on."""
    endless_uncut: int
    """Those of them that were not cut."""
    held_out: HeldOut | None = None
    compared: Comparison | None = None

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


def statistics(
    settings: Settings,
    data: RunData,
    samples: Samples,
    processes: int = 1,
    stock: Order | None = None,
) -> Statistics:
    """Count everything.

    Args:
        settings: Of the run.
        data: Its data, split and ordered.
        samples: Those of the training data, surveyed.
        processes: How many share a step.
        stock: What torchtune's recipes would see, if the configuration is one of theirs too.
    """
    dataset = unpacked(data.order.dataset)
    limit, truncate = getattr(data.tokenizer, "max_seq_len", None), truncation(settings)
    lost = getattr(dataset, "lost", samples.full[:0])
    positions = read_config(settings.checkpoint_dir).max_position_embeddings
    named = {positions: "model's most"} | ({limit: "yours"} if limit else {})
    things = "packs" if isinstance(data.order.dataset, Packs) else "samples"
    tokens, labelled = tokens_per_epoch(data.order.dataset, samples)
    padded = pads(data.collate)
    is_text = is_text_dataset(settings.dataset)  # nothing of it is lost, and no turn ends
    answers = samples
    if isinstance(dataset, PreferenceDataset):  # a limit is that of a prompt with one answer
        answers = survey(dataset.single(), data.tokenizer.stop_tokens)
    return Statistics(
        options=settings.dataset,
        options_val=settings.dataset_val,
        special_in_text=settings.tokenizer.get("special_in_text", "parse"),
        rows=getattr(dataset, "rows", len(dataset)),
        findings=getattr(dataset, "findings", Findings()),
        samples=len(samples.lengths),
        tokens=tokens,
        labelled=labelled,
        lengths=lengths_of(np.concatenate([answers.full, lost])),
        longest=int(answers.lengths.max()),
        limit=limit,
        truncate=truncate,
        positions=positions,
        pairs=pairs_of(dataset),
        batchings=_batchings(settings, data, samples, processes, padded or stock is not None),
        per_step=f"{data.order.per_step:,} {things}",
        steps=data.total_steps,
        padded=padded,
        stock=stock_steps(stock, settings.epochs) if stock else None,
        cuts=[] if is_text else cuts(answers, lost, named, limit=limit, truncate=truncate),
        alike=alike(samples),
        endless=0 if is_text else int((~samples.stops).sum()),
        endless_uncut=int((~samples.stops & (samples.full <= samples.lengths)).sum()),
        held_out=_held_out(data, samples),
    )


class Pairs(NamedTuple):
    """How long the answers of pairs are, in tokens that are trained on."""

    chosen: float
    """Median."""
    rejected: float
    longer: float
    """Share of the pairs whose chosen answer is the longer one."""


def pairs_of(dataset: Any) -> Pairs | None:
    """Return how long the answers of pairs are; None of other data."""
    if not isinstance(dataset, PreferenceDataset) or not dataset.is_paired:
        return None
    labelled = dataset.store.samples["labelled"]
    chosen, rejected = (labelled[dataset.chosen + side] for side in (0, 1))
    longer = float((chosen > rejected).mean())
    return Pairs(float(np.median(chosen)), float(np.median(rejected)), longer)


def truncation(settings: Settings) -> str:
    """Return what becomes of samples that are too long."""
    section = settings.dataset
    if section["_component_"] in PREFERENCE_DATASETS:
        return str(section.get("truncate", "left"))
    return section.get("truncate", "right") if is_chat_dataset(section) else "right"


def tokens_per_epoch(dataset: Any, samples: Samples) -> tuple[int, int]:
    """Return the tokens of an epoch without padding, and those of them that are trained on.

    Args:
        dataset: May be packed: a cut takes from what is trained on.
        samples: The same, surveyed.
    """
    counted = dataset if isinstance(dataset, Packs) else samples
    return int(counted.lengths.sum()), int(counted.labelled.sum())


def _held_out(data: RunData, training: Samples) -> HeldOut | None:
    if data.order_val is None:
        return None
    dataset = unpacked(data.order_val.dataset)
    samples = survey(dataset, data.tokenizer.stop_tokens)
    tokens, labelled = tokens_per_epoch(data.order_val.dataset, samples)
    return HeldOut(
        samples=len(samples.lengths),
        tokens=tokens,
        labelled=labelled,
        seen=int(np.isin(samples.content, training.content).sum()),
        findings=getattr(dataset, "findings", Findings()),
    )


def alike(samples: Samples) -> Alike:
    """Find samples that come more than once."""
    earliest: dict[int, int] = {}
    pairs: list[tuple[str, str]] = []
    for i, value in enumerate(samples.content.tolist()):
        earlier = earliest.setdefault(value, i)
        # A source may be seen more than once on purpose: the same row is no copy of itself
        if samples.places[earlier] != samples.places[i]:
            pairs.append((samples.places[earlier], samples.places[i]))
    _, index = np.unique(samples.content, return_index=True)
    # One token is no prompt: all conversations begin with it, as train_on=all leaves them
    index = index[samples.first[index] > 1]
    _, times = np.unique(samples.prompt[index], return_counts=True)
    return Alike(len(pairs), pairs[:FIRST], int(times[times > 1].sum()))


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


def pads(collate: Any) -> bool:
    """Whether samples are padded to one length, rather than put into one row."""
    return getattr(collate, "func", collate) is not concatenate


def stock_steps(order: Order, epochs: int) -> StockSteps:
    """Return the steps of torchtune's recipes.

    They drop the last batch of an epoch unless it is whole, and its last batches unless they make
    a step.
    """
    each = len(order.dataset) // order.per_step
    return StockSteps(epochs * each, each, len(order.dataset) - each * order.per_step)


def _batchings(
    settings: Settings, data: RunData, samples: Samples, processes: int, padded: bool
) -> list[Batching]:
    """Return the ways to put the samples into batches, the chosen one as the run would.

    Where nothing is padded, grouping by length changes nothing.
    """
    chosen, dataset = data.order, unpacked(data.order.dataset)
    if isinstance(dataset, PreferenceDataset):  # all documents of a batch are one row
        name = PACKED if isinstance(chosen.dataset, Packs) else UNGROUPED
        return [Batching(name, 0.0, chosen.steps_per_epoch, True)]
    order: Callable[..., Order] = partial(
        Order,
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation_steps,
        processes=processes,
        seed=settings.seed,
        shuffle=settings.shuffle,
    )
    orders = {UNGROUPED: order(dataset)}
    if settings.shuffle and padded:
        orders[GROUPED] = order(dataset, group_by_length=True)
    limit = getattr(data.tokenizer, "max_seq_len", None)
    section = settings.dataset
    if limit is not None and (is_chat_dataset(section) or is_text_dataset(section)):
        orders[PACKED] = order(Packs(dataset, limit, seed=section.get("seed", 0)))
    mine = GROUPED if chosen.group_by_length else UNGROUPED
    if isinstance(chosen.dataset, Packs):
        mine = PACKED
    orders[mine] = chosen
    return [
        Batching(
            name, _padding(order, samples) if padded else 0.0, order.steps_per_epoch, name == mine
        )
        for name, order in orders.items()
    ]


def _padding(order: Order, samples: Samples) -> float:
    """Return which share of the first epoch is padding, each batch padded to its longest sample."""
    if isinstance(order.dataset, Packs):
        return order.dataset.waste
    real = total = 0
    for step in range(order.steps_per_epoch):
        indices = order.indices(step)
        for start in range(0, len(indices), order.batch_size):
            lengths = samples.lengths[indices[start : start + order.batch_size]]
            real += int(lengths.sum())
            total += int(lengths.max()) * len(lengths)
    return 1 - real / total


def cuts(
    samples: Samples,
    lost: Numbers,
    named: Mapping[int, str],
    *,
    limit: int | None,
    truncate: str = "right",
) -> list[Cut]:
    """Return what a limit would cost at the usual lengths and at others.

    Args:
        samples: As they were left by the chosen limit.
        lost: [L] tokens of each conversation that gave no sample.
        named: More lengths, and what each of them is.
        limit: The chosen one.
        truncate: What becomes of longer conversations, see :func:`phi3_plugin.data.chat_dataset`.
    """
    # A shorter conversation would be lost at any limit
    lost = lost[lost > limit] if limit is not None else lost[:0]
    total = int(samples.full.sum()) + int(lost.sum())
    costs = []
    for at in sorted({*USUAL, *named}):
        longer = samples.full > (samples.lengths if at == limit else at)
        share = (int(longer.sum()) + int((lost > at).sum())) / (len(longer) + len(lost))
        left = _tokens_left(samples, lost, at, limit=limit, truncate=truncate)
        # What only reading the data with that limit would show: where the answers of lost
        # conversations begin, and what a cut from the left leaves
        if at == limit or truncate == "drop":
            least = False
        elif truncate == "right":
            least = limit is not None and at > limit and bool((lost > at).any())
        else:
            least = bool((lost > at).any() or longer.any())
        costs.append(Cut(at, share, 1 - left / total, named.get(at, ""), least))
    return costs


def _tokens_left(
    samples: Samples, lost: Numbers, at: int, *, limit: int | None, truncate: str
) -> int:
    """Return how many tokens a limit leaves, at most."""
    if at == limit:
        return int(samples.lengths.sum())
    lengths = samples.full
    if limit is not None and at < limit:  # what a limit takes, a tighter one does not give back
        lengths, lost = samples.lengths, lost[:0]
    if truncate == "drop":
        lengths, lost = lengths[samples.full <= at], lost[lost <= at]
    elif truncate == "right":
        lengths = lengths[samples.first < at]  # the others have nothing left to train on
    return int(lengths.clip(max=at).sum()) + int(lost.clip(max=at).sum())


# What is worth acting on

CUT_SAMPLES, LOST_TOKENS = 0.01, 0.01
"""Cut samples, and lost tokens, that are worth a word; and what a better length may lose."""

PADDING, SPARED = 0.2, 0.1
"""Padding that is worth a word, and how much less another way must have to be advised."""

LABELLED = 0.05
"""Trained tokens below which most of the work is reading."""

COPIES = 0.01

SWITCHES = {PACKED: "dataset.packed=True", GROUPED: "group_by_length=True"}
"""How each way to spare padding is chosen."""


class Problem(NamedTuple):
    """Something to act on."""

    text: str
    advice: str
    stops: bool = False
    """Whether training would stop because of it."""


def advice(stats: Statistics) -> list[Problem]:
    """Return what is worth acting on, what would stop the run first."""
    makers = (_of_rows_left_out, _of_lengths, _of_batches, _of_rows, _of_validation)
    listed = [problem for maker in makers for problem in maker(stats)]
    return sorted(listed, key=lambda problem: not problem.stops)  # sorted() keeps the order


def _of_rows_left_out(stats: Statistics) -> Iterator[Problem]:
    sections = [("dataset", stats.options, stats.findings)]
    # Rows that are only split into two parts are told of once
    val = stats.options_val
    if stats.held_out and val is not None and val.get("source") != stats.options.get("source"):
        sections.append(("dataset_val", val, stats.held_out.findings))
    for name, options, findings in sections:
        bad = findings.counts[BROKEN] + findings.counts[UNUSABLE]
        drop = f"{name}.bad_rows=drop"
        text, fix = f"{name}: {count(bad, 'row')} cannot be read or used", "Correct them"
        if bad and options.get("bad_rows", "error") == "drop":
            yield Problem(f"{text}; {drop} leaves them out.", f"{fix} if they are to be learned.")
        elif bad:
            text = f"{text}: training would stop because of them."
            yield Problem(text, f"{fix}, or leave them out with {drop}.", stops=True)


def _of_lengths(stats: Statistics) -> Iterator[Problem]:
    if stats.endless:
        cut = stats.endless_uncut * 2 < stats.endless
        yield Problem(
            f"In {count(stats.endless, 'sample')} ({percent(stats.endless / stats.samples)}) the "
            "token that ends a turn is not trained: the model does not learn from them when to "
            "stop.",
            "They are cut before the answer ends; see the lengths below."
            if cut
            else "Look at a sample below: is the answer an assistant's turn, and whole?",
        )
    if lost := stats.findings.counts[CUT_AWAY]:
        yield Problem(
            f"{count(lost, 'row')} left out: nothing to train on is within "
            f"tokenizer.max_seq_len={stats.limit}.",
            "Raise it, or shorten what comes before the answers.",
        )
    if stats.cut.samples >= CUT_SAMPLES or stats.cut.tokens >= LOST_TOKENS:
        fate = f"cut at {stats.limit:,}"
        if stats.truncate == "drop":
            fate = f"longer than {stats.limit:,} and dropped"
        yield Problem(
            f"{percent(stats.cut.samples)} of the samples are {fate}: "
            f"{percent(stats.cut.tokens)} of all tokens are lost.",
            _better_limit(stats),
        )
    if stats.longest > stats.positions:
        yield Problem(
            f"The longest sample has {stats.longest:,} tokens; the model was made for "
            f"{stats.positions:,}.",
            f"Set tokenizer.max_seq_len={stats.positions}, or less.",
        )


def _better_limit(stats: Statistics) -> str:
    better = [cut for cut in stats.cuts if (stats.limit or 0) < cut.limit <= stats.positions]
    if not better:
        return "That is all the model can take: split these conversations."
    cut = next((cut for cut in better if cut.tokens < LOST_TOKENS), better[-1])
    loss = cut.loss.replace("≥", "at least").replace(">0", "more than 0")
    return f"tokenizer.max_seq_len={cut.limit} would lose {loss if cut.tokens else 'nothing'}."


def _of_batches(stats: Statistics) -> Iterator[Problem]:
    share = stats.labelled / stats.tokens
    if share < LABELLED:
        yield Problem(
            f"{percent(share)} of the tokens are trained on; the rest is only read.",
            "Check in the samples below that the answers are marked. Shorter prompts, or "
            "dataset.train_on=all, would train on more.",
        )
    if stats.steps < FEW_STEPS:
        yield Problem(
            f"The whole run makes {count(stats.steps, 'step') if stats.steps else 'no step'} of "
            f"{stats.per_step}.",
            "Lower gradient_accumulation_steps or batch_size, or raise epochs.",
        )
    now, ways = stats.batching, list[str]()
    for other in stats.batchings:
        if other.name in SWITCHES and now.padding - other.padding > SPARED:
            way = f"{SWITCHES[other.name]} would bring it to {percent(other.padding)}"
            if other.steps != now.steps:
                way += f", with {other.steps:,} steps an epoch instead of {now.steps:,}"
            ways.append(f"{way}.")
    if not ways and now.name == PACKED:
        ways = ["Set another tokenizer.max_seq_len, the length of a pack."]
    if now.padding >= PADDING and ways:
        padded = percent(now.padding)
        where = "" if stats.padded else " in torchtune's recipes, which pad"
        yield Problem(f"{padded} of each batch is padding{where}.", " ".join(ways))


def _of_rows(stats: Statistics) -> Iterator[Problem]:
    counts, copies = stats.findings.counts, stats.alike.copies
    if copies >= COPIES * stats.samples:
        yield Problem(
            f"{count(copies, 'sample')} ({percent(copies / stats.samples)}) "
            f"{'repeats' if copies == 1 else 'repeat'} an earlier one, token for token.",
            "Remove them, unless the model is to see them more often.",
        )
    if unanswered := counts[NO_FINAL_ANSWER]:
        yield Problem(
            f"{count(unanswered, 'conversation')} without an answer to the last message.",
            "What follows the last answer is not trained on. Remove it, or add the answer.",
        )
    if passed := counts[PASSED_OVER]:
        yield Problem(
            f"{count(passed, 'row')} with weight or train fields that are passed over.",
            f"dataset.train_on={stats.options.get('train_on', 'assistant')} decides alone; "
            "dataset.train_on=marked would follow them.",
        )
    if left_out := counts[DROPPED_MESSAGE]:
        yield Problem(
            f"{count(left_out, 'row')} with a message that the chat template leaves out.",
            "Move what they say into the user's message, if the model is to know it.",
        )
    if unread := counts[UNREAD_TOKEN]:
        yield Problem(
            f"{count(unread, 'row')} with a text of tokenizer.add_tokens that is not read as that "
            "token.",
            "Write a space before it, or add it as {content: '<call>', normalized: False}.",
        )
    special = counts[SPECIAL_IN_TEXT]
    if special and stats.special_in_text == "parse":
        yield Problem(
            f"{count(special, 'row')} with a special token such as <|end|> written in a message: "
            "it counts as that token, and can end a turn.",
            "Set tokenizer.special_in_text=text to keep it as text.",
        )


def _of_validation(stats: Statistics) -> Iterator[Problem]:
    held_out, compared = stats.held_out, stats.compared
    if held_out and held_out.seen:
        yield Problem(
            f"{held_out.seen:,} of {count(held_out.samples, 'validation sample')} "
            f"({percent(held_out.seen / held_out.samples)}) can be found in the training data: "
            "the validation loss will look too good.",
            "Remove them from one of the two.",
        )
    if compared and compared.differ:
        yield Problem(
            f"{compared.differ:,} of {count(compared.samples, 'sample')} differ from what "
            "transformers makes of them.",
            "Look at the first ones below. With tokenizer.special_in_text=text that is wanted "
            "where messages hold special tokens.",
        )


# Samples as a reader can check them: the text of every token, and what training makes of it

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How a vocabulary with byte fallback spells a byte of a character that it has no token for."""

_THOUGHT = re.compile(rf"{THINK}.*?({END_OF_THOUGHT}|\Z)", re.DOTALL)

UNFINISHED = "\ufffd"
"""What decoding gives for a part of a character."""

TOKENS_OF_CHARACTER = 4
"""Tokens that a character can take: as many as UTF-8 has bytes for it."""


class Unit(NamedTuple):
    """A token; or several, where what is read as one character takes more than one."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    """Whether it is an added token such as ``<|end|>``."""
    thought: bool = False
    """Whether it is trained on as a part of what is thought before an answer."""


class Shown(NamedTuple):
    """One sample."""

    where: str
    """Where its row stands."""
    units: list[Unit]
    trained: int
    """Tokens that are trained on."""
    lost: int
    """Tokens that were cut off."""
    from_start: bool = False
    """Whether they came before the first unit, or between the system message and the rest."""
    difference: str = ""
    """Of the worse of two answers: what it has in place of what the better one has."""

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return sum(len(unit.ids) for unit in self.units)

    @property
    def thought(self) -> int:
        """Tokens that are trained on as parts of thoughts."""
        return sum(len(unit.ids) for unit in self.units if unit.thought)

    @property
    def border(self) -> str:
        """What is said where the sample was cut."""
        if not self.lost:
            return ""
        where = "before the last turns" if self.from_start else "here"
        return f"✂ {count(self.lost, 'token')} cut {where}, not seen"


def show(
    dataset: Any, indices: Iterable[int], tokenizer: Phi3Tokenizer, *, from_start: bool = False
) -> list[Shown]:
    """Spell some samples of a data set.

    Args:
        dataset: Holds them.
        indices: Which.
        tokenizer: What made them.
        from_start: Whether long samples were cut from their start.
    """
    speller, shown = Speller(tokenizer), []
    if isinstance(dataset, PreferenceDataset):
        return [one for i in indices for one in _sides(dataset, i, speller, from_start)]
    for i in indices:
        ids, labels = arrays(dataset, i)
        trained = labels != IGNORED
        lost = int(dataset.full[i]) - len(ids) if hasattr(dataset, "full") else 0
        units = speller.units(ids, trained)
        where = place_of(dataset, i) + _weights_told(dataset, i, trained)
        shown.append(Shown(where, units, int(trained.sum()), lost, from_start))
    return shown


def _weights_told(dataset: Any, i: int, trained: NDArray[np.bool_]) -> str:
    """Say how much the loss counts what is trained on, if that is not 1."""
    weights = dataset.weights(i) if hasattr(dataset, "weights") else None
    values = [] if weights is None else np.unique(weights[trained]).tolist()
    return "" if values in ([], [1]) else f", weight {' and '.join(f'{v:g}' for v in values)}"


def _sides(
    dataset: PreferenceDataset, i: int, speller: "Speller", from_start: bool
) -> Iterator[Shown]:
    """Yield the answers of a sample, each with its prompt."""
    before: list[Unit] | None = None
    for document in dataset.documents_of(i):
        ids, labels = dataset.document(document)
        trained = labels != IGNORED
        units = speller.units(ids, trained)
        row = dataset.store.samples[document]
        paired = ("chosen", "rejected")[before is not None]
        name = paired if dataset.is_paired else ("bad answer", "good answer")[bool(row["wanted"])]
        difference = "" if before is None else difference_of(before, units)
        lost = int(row["full"]) - len(ids)
        where = f"{place_of(dataset, i)}, {name}"
        yield Shown(where, units, int(trained.sum()), lost, from_start, difference)
        before = units


DIFFERENCES = 3
"""Stretches that are told of two answers that differ in more."""


def difference_of(chosen: Sequence[Unit], rejected: Sequence[Unit]) -> str:
    """Return in words what one answer has in place of the other's."""
    texts = [[unit.text for unit in side if unit.trained] for side in (chosen, rejected)]
    matcher = SequenceMatcher(a=texts[0], b=texts[1], autojunk=False)
    found = [
        ["".join(texts[0][start:end]), "".join(texts[1][first:last])]
        for kind, start, end, first, last in matcher.get_opcodes()
        if kind != "equal"
    ]
    told = [f"{theirs!r} in place of {ours!r}" for ours, theirs in found[:DIFFERENCES]]
    more = [f"and {len(found) - DIFFERENCES} more"] if len(found) > DIFFERENCES else []
    return ", ".join([*told, *more])


class Speller:
    """Gives each token of a sample its text, with the space before it."""

    def __init__(self, tokenizer: Phi3Tokenizer) -> None:
        """Read the added tokens."""
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        decoder = self._backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in decoder.items()}
        # Decoding drops the space at the very start, so that every text gets one before it
        self._before = tokenizer.encode("a")[-1:]
        self._skip = len(tokenizer.decode(self._before, False))

    def units(self, ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> list[Unit]:
        """Spell a sample.

        Args:
            ids: [S]
            trained: [S]; whether the loss counts the token.
        """
        units, parts = list[Unit](), list[int]()
        for i, counts in zip(ids.tolist(), trained.tolist(), strict=True):
            if i in self._added:
                units.append(Unit(self._added[i], (i,), counts, True))
                parts = []
                continue
            text = self._text([i])
            if UNFINISHED not in text:
                units.append(Unit(text, (i,), counts, False))
                parts = []
                continue
            # Parts of characters stand alone until the last one comes
            spelling = self._backend.id_to_token(i) or ""
            units.append(Unit(spelling if BYTE.fullmatch(spelling) else text, (i,), counts, False))
            parts = [*parts[1 - TOKENS_OF_CHARACTER :], i]
            for tail in (parts[start:] for start in range(len(parts) - 1)):
                if UNFINISHED not in (whole := self._text(tail)):
                    units[-len(tail) :] = [Unit(whole, tuple(tail), counts, False)]
                    parts = []
                    break
        return _with_thoughts(_as_read(units))

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids], False)[self._skip :]


def _with_thoughts(units: Sequence[Unit]) -> list[Unit]:
    """Mark what is trained on between ``<think>`` and ``</think>``, these included."""
    ends = [*accumulate(len(unit.text) for unit in units)]
    marked = list(units)
    for thought in _THOUGHT.finditer("".join(unit.text for unit in units)):
        first, last = bisect_right(ends, thought.start()), bisect_left(ends, thought.end())
        for n in range(first, min(last + 1, len(units))):
            marked[n] = units[n]._replace(thought=units[n].trained)
    return marked


def _as_read(units: Iterable[Unit]) -> list[Unit]:
    """Join units that make one character for a reader: a flag, a family, a letter with its accent.

    Source: extended grapheme clusters, Unicode Annex 29.
    """
    joined: list[Unit] = []
    for unit in units:
        last = joined[-1] if joined else None
        alike = last and last.trained == unit.trained and not (last.special or unit.special)
        # No character of ASCII goes on with one before it but a line end, which is better seen
        if last and alike and not unit.text[:1].isascii():
            text = last.text + unit.text
            if len(last.text) not in accumulate(map(len, regex.findall(r"\X", text))):
                joined[-1] = Unit(text, last.ids + unit.ids, unit.trained, False)
                continue
        joined.append(unit)
    return joined
