"""What is in a chat data set: numbers, warnings, and the first samples token by token."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.dataset import COMMON, IGNORED, Read, chat_dataset, make_reading
from phi3_plugin.data.formats import (
    BROKEN,
    CUT_AWAY,
    DROPPED,
    DROPPED_MESSAGE,
    NO_FINAL_ANSWER,
    NOTICED,
    PASSED_OVER,
    SPECIAL_IN_TEXT,
    UNUSABLE,
    Findings,
    Turn,
    Written,
)
from phi3_plugin.data.packing import Packs
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.errors import DataError

CHAT_DATASETS = ("phi3_plugin.data.chat_dataset", "phi3_plugin.data.dataset.chat_dataset")
"""How a YAML calls the data set whose rows can be told apart."""


# One pass over the samples of a data set, and which of them come more than once.

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


# What a limit of the length costs, the chosen one and others.

# Shapes: N samples, L conversations that gave none

USUAL = (512, 1024, 2048, 4096)
"""Lengths at which it is always told what a limit would cost."""


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
        truncate: What becomes of longer conversations, see :mod:`phi3_plugin.data.tokenizer`.
    """
    # A shorter conversation would be lost at any limit
    lost = lost[lost > limit] if limit is not None else lost[:0]
    asked = _Asked(samples, lost, limit, truncate)
    return [asked.cut(at, named.get(at, "")) for at in sorted({*USUAL, *named})]


@dataclass(frozen=True)
class _Asked:
    samples: Samples
    lost: Numbers
    limit: int | None
    truncate: str

    def cut(self, at: int, name: str) -> Cut:
        """Return what one limit costs."""
        samples, lost = self.samples, self.lost
        longer = samples.full > (samples.lengths if at == self.limit else at)
        share = (int(longer.sum()) + int((lost > at).sum())) / (len(longer) + len(lost))
        total = int(samples.full.sum()) + int(lost.sum())
        return Cut(at, share, 1 - self._kept(at) / total, name, self._may_lose_more(at))

    def _kept(self, at: int) -> int:
        """Return how many tokens are left, at most."""
        samples, lost = self.samples, self.lost
        if at == self.limit:
            return int(samples.lengths.sum())
        tighter = self.limit is not None and at < self.limit
        # What a limit takes, a tighter one does not give back
        kept, lost = (samples.lengths, lost[:0]) if tighter else (samples.full, lost)
        if self.truncate == "drop":
            kept, lost = kept[samples.full <= at], lost[lost <= at]
        elif self.truncate == "right":
            kept = kept[samples.first < at]  # The others have nothing left to train on
        return sum(int(values.clip(max=at).sum()) for values in (kept, lost))

    def _may_lose_more(self, at: int) -> bool:
        if at == self.limit or self.truncate == "drop":
            return False
        cut = bool((self.lost > at).any())
        if self.truncate == "right":  # Where their answers begin is not known
            return cut and self.limit is not None and at > self.limit
        return cut or bool((self.samples.full > at).any())


# Samples as a reader can check them: the text of every token, and what training makes of it.

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How a vocabulary with byte fallback spells a byte of a character that it has no token for."""

UNFINISHED = "\ufffd"
"""What decoding gives for a part of a character."""

LONGEST = 4
"""Tokens that a character can take: as many as UTF-8 has bytes for it."""

HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")
"""Unicode categories of what shows nothing, looks like a space, or changes how others show."""


class Unit(NamedTuple):
    """A token; or several, where a character takes more than one."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    special: bool
    """Whether it is an added token such as ``<|end|>``."""


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

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return sum(len(unit.ids) for unit in self.units)

    @property
    def border(self) -> str:
        """What is said where the sample was cut."""
        if not self.lost:
            return ""
        tokens = f"{self.lost:,} {'token' if self.lost == 1 else 'tokens'}"
        return f"✂ {tokens} cut {'before the last turns' if self.from_start else 'here'}, not seen"


class Speller:
    """Gives each token of a sample its text, with the space before it."""

    def __init__(self, tokenizer: Phi3Tokenizer) -> None:
        """Read the added tokens."""
        self._tokenizer, self._backend = tokenizer, tokenizer._backend
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
            units.append(Unit(self._spelled(i), (i,), counts, False))
            # Parts of characters stand alone until the last one comes
            parts = [*parts[1 - LONGEST :], i] if UNFINISHED in self._text([i]) else []
            if whole := self._whole(parts):
                units[-len(whole) :] = [Unit(self._text(whole), tuple(whole), counts, False)]
                parts = []
        return units

    def _whole(self, parts: list[int]) -> list[int]:
        tails = (parts[start:] for start in range(len(parts) - 1))
        return next((tail for tail in tails if UNFINISHED not in self._text(tail)), [])

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*self._before, *ids], False)[self._skip :]

    def _spelled(self, i: int) -> str:
        text, spelled = self._text([i]), self._backend.id_to_token(i)
        return spelled if UNFINISHED in text and spelled and BYTE.fullmatch(spelled) else text


def show(
    dataset: Any, indices: Iterable[int], speller: Speller, *, from_start: bool = False
) -> list[Shown]:
    """Spell some samples of a data set.

    Args:
        dataset: Holds them.
        indices: Which.
        speller: Of its tokenizer.
        from_start: Whether long samples were cut from their start.
    """
    shown = []
    for i in indices:
        ids, labels = arrays(dataset, i)
        full = int(dataset.full[i]) if hasattr(dataset, "full") else len(ids)
        trained = labels != IGNORED
        units = speller.units(ids, trained)
        lost = full - len(ids)
        shown.append(Shown(place(dataset, i), units, int(trained.sum()), lost, from_start))
    return shown


def harmless(text: str) -> str:
    r"""Spell out, as ``\x1b`` or ``\u202e``, what could drive a terminal or hide in a page.

    Plain spaces, line ends and tabs stay, and so do letters of every script and emoji.
    """
    return "".join(char if _shows(char) else _code(char) for char in text)


def _shows(char: str) -> bool:
    return char in " \n\t" or unicodedata.category(char) not in HIDDEN


def _code(char: str) -> str:
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


# The samples beside what another tokenizer makes of the same conversations.

Marked = tuple[Sequence[int], Sequence[bool]]
"""The ids of a conversation, and which are trained on."""


class Compared(NamedTuple):
    """What a comparison found."""

    samples: int
    """How many were compared."""
    differ: int
    places: list[str]
    """The first that differ, and where they begin to."""


def conversations(
    tokenizer: Phi3Tokenizer, options: Mapping[str, Any]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield where each row stands, and its messages, marked by what is trained on.

    Rows that give no sample, and those that are a text already, are passed over.

    Args:
        tokenizer: Of the checkpoint.
        options: Of :func:`phi3_plugin.data.chat_dataset`.
    """
    given = {name: option.default for name, option in signature(chat_dataset).parameters.items()}
    given |= {name: value for name, value in options.items() if name in given}
    reading = make_reading(
        tokenizer,
        given["source"],
        {name: given[name] for name in COMMON},
        tool_calls=given["tool_calls"],
        group_by=given["group_by"],
        lesson=(given["train_on"], given["system_prompt"], given["add_eos"]),
        truncate=given["truncate"],
    )
    for number, source in enumerate(reading.sources):
        for row in reading.rows(number, source):
            if not isinstance(row, Read) or isinstance(row.chat, Written):
                continue
            try:
                turns = reading.preparation.lesson.prepare(row.chat)
            except DataError:  # there is nothing to train on
                continue
            yield row.where, [_message(turn) for turn in turns]


def marked(dataset: Any, i: int) -> Marked:
    """Return a sample as it is compared."""
    ids, labels = arrays(dataset, i)
    return ids.tolist(), (labels != IGNORED).tolist()


def as_trained(
    theirs: Marked, *, limit: int | None, options: Mapping[str, Any], eos_id: int
) -> Marked:
    """Do to a whole conversation what the options of a data set do: end it, mark it, cut it."""
    ids, trained = list(theirs[0]), list(theirs[1])
    if options.get("add_eos", False) and ids[-1:] != [eos_id]:
        ids, trained = [*ids, eos_id], [*trained, False]
    if options.get("train_on") == "all":
        trained = [True] * len(ids)
    return ids[:limit], [False, *trained[1:limit]]


def compare(pairs: Iterable[tuple[str, Marked, Marked]]) -> Compared:
    """Compare samples, each with its place, ours first."""
    found = [(where, difference(ours, theirs)) for where, ours, theirs in pairs]
    places = [f"{where}: {text}" for where, text in found if text]
    return Compared(len(found), len(places), places[:FIRST])


def difference(ours: Marked, theirs: Marked) -> str:
    """Say where two tokenizations begin to differ; nothing if they do not."""
    lists = (ours[0], theirs[0]), (ours[1], theirs[1])
    for (mine, other), what in zip(lists, ("id", "trained"), strict=True):
        for n, pair in enumerate(zip(mine, other, strict=False)):
            if pair[0] != pair[1]:
                return f"token {n} has {what} {pair[0]} here, {pair[1]} there"
    if len(ours[0]) != len(theirs[0]):
        return f"{len(ours[0])} tokens here, {len(theirs[0])} there"
    return ""


def _message(turn: Turn) -> dict[str, Any]:
    tools = {} if turn.tools is None else {"tools": turn.tools}
    return {"role": turn.role, "content": turn.content, **tools, "trained": turn.trained}


# The numbers of a data set, as a training run would see it.

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
    """What becomes of longer ones, see :mod:`phi3_plugin.data.tokenizer`."""
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


# What is worth acting on in the numbers of a data set, in words, with what to do about it.

CUT, LOST = 0.01, 0.01
"""Cut samples, and lost tokens, that are worth a word; and what a better length may lose."""

PADDING, SPARED = 0.2, 0.1
"""Padding that is worth a word, and how much less another way must have to be advised."""

LABELLED = 0.05
"""Trained tokens below which most of the work is reading."""

COPIES = 0.01
FEW_STEPS = 10

SWITCHES = {PACKED: "dataset.packed=True", GROUPED: "group_by_length=True"}
"""How each way to spare padding is chosen."""


class Problem(NamedTuple):
    """Something to act on."""

    text: str
    advice: str
    stops: bool = False
    """Whether training would stop because of it."""


def problems(found: Statistics) -> list[Problem]:
    """Return what is worth acting on, the worst first."""
    makers = (
        _bad_rows,
        _stopping,
        _length,
        _labelled,
        _padding,
        _rows,
        _texts,
        _held_out_problems,
        _compared,
    )
    listed = [problem for maker in makers for problem in maker(found)]
    return sorted(listed, key=lambda problem: not problem.stops)  # sorted() keeps the order


def percent(share: float) -> str:
    """Write a share; what is not nothing, or not all, does not look like it."""
    if share <= 0 or share >= 1:
        return f"{100 * share:.0f} %"
    if share < 0.0005:
        return "<0.1 %"
    if share > 0.9995:
        return ">99.9 %"
    return f"{100 * share:.{0 if 0.0995 <= share < 0.995 else 1}f} %"


def loss(cut: Cut) -> str:
    """Write which share of the tokens a limit loses."""
    share = percent(cut.tokens)
    if not cut.least:
        return share
    return ">0 %" if share.startswith("<") else f"≥ {share}"


def count(number: int, one: str) -> str:
    """Write how many there are of something."""
    return f"{number:,} {one if number == 1 else one + 's'}"


def _bad_rows(found: Statistics) -> Iterator[Problem]:
    for name, options, findings in _sections(found):
        bad = sum(findings.counts.get(kind, 0) for kind in (BROKEN, UNUSABLE))
        drop = f"{name}.bad_rows=drop"
        text, fix = f"{name}: {count(bad, 'row')} cannot be read or used", "Correct them"
        if bad and options.get("bad_rows", "error") == "drop":
            yield Problem(f"{text}; {drop} leaves them out.", f"{fix} if they are to be learned.")
        elif bad:
            text = f"{text}: training would stop because of them."
            yield Problem(text, f"{fix}, or leave them out with {drop}.", stops=True)


def _stopping(found: Statistics) -> Iterator[Problem]:
    if found.endless == 0:
        return
    text = (
        f"In {count(found.endless, 'sample')} ({percent(found.endless / found.samples)}) the token "
        "that ends a turn is not trained: the model does not learn from them when to stop."
    )
    if found.endless_uncut * 2 < found.endless:
        yield Problem(text, "They are cut before the answer ends; see the lengths below.")
    else:
        yield Problem(text, "Look at a sample below: is the answer an assistant's turn, and whole?")


def _length(found: Statistics) -> Iterator[Problem]:
    limit, lost = found.limit, found.findings.counts.get(CUT_AWAY, 0)
    if lost:
        yield Problem(
            f"{count(lost, 'row')} left out: nothing to train on is within "
            f"tokenizer.max_seq_len={limit}.",
            "Raise it, or shorten what comes before the answers.",
        )
    if found.cut.samples >= CUT or found.cut.tokens >= LOST:
        yield Problem(
            f"{percent(found.cut.samples)} of the samples are {_cut(found)}: "
            f"{percent(found.cut.tokens)} of all tokens are lost.",
            _longer(found),
        )
    if found.longest > found.positions:
        yield Problem(
            f"The longest sample has {found.longest:,} tokens; the model was made for "
            f"{found.positions:,}.",
            f"Set tokenizer.max_seq_len={found.positions}, or less.",
        )


def _cut(found: Statistics) -> str:
    if found.truncate == "drop":
        return f"longer than {found.limit:,} and dropped"
    return f"cut at {found.limit:,}"


def _longer(found: Statistics) -> str:
    better = [cut for cut in found.cuts if (found.limit or 0) < cut.limit <= found.positions]
    if not better:
        return "That is all the model can take: split these conversations."
    enough = next((cut for cut in better if cut.tokens < LOST), better[-1])
    return f"tokenizer.max_seq_len={enough.limit} would lose {_little(enough)}."


def _little(cut: Cut) -> str:
    words = loss(cut).replace("≥", "at least").replace(">0", "more than 0")
    return words if cut.tokens else "nothing"


def _labelled(found: Statistics) -> Iterator[Problem]:
    share = found.labelled / found.tokens
    if share < LABELLED:
        yield Problem(
            f"{percent(share)} of the tokens are trained on; the rest is only read.",
            "Check in the samples below that the answers are marked. Shorter prompts, or "
            "dataset.train_on=all, would train on more.",
        )
    if found.steps < FEW_STEPS:
        yield Problem(
            f"The whole run makes {count(found.steps, 'step')} of {found.per_step}.",
            "Lower gradient_accumulation_steps or batch_size, or raise epochs.",
        )


def _padding(found: Statistics) -> Iterator[Problem]:
    now = found.batching
    if now.padding < PADDING:
        return
    better = [b for b in found.batchings if b.name in SWITCHES and now.padding - b.padding > SPARED]
    text = f"{percent(now.padding)} of each batch is padding, where a recipe pads (torchtune's do)."
    if better:
        yield Problem(text, " ".join(_switch(batching, now) for batching in better))
    elif now.name == PACKED:
        yield Problem(text, "Set another tokenizer.max_seq_len, the length of a pack.")


def _switch(batching: Batching, now: Batching) -> str:
    text = f"{SWITCHES[batching.name]} would bring it to {percent(batching.padding)}"
    if batching.steps == now.steps:
        return f"{text}."
    return f"{text}, with {batching.steps:,} steps an epoch instead of {now.steps:,}."


def _rows(found: Statistics) -> Iterator[Problem]:
    counted = found.findings.counts
    copies = found.alike.copies
    if copies >= COPIES * found.samples:
        yield Problem(
            f"{count(copies, 'sample')} ({percent(copies / found.samples)}) "
            f"{'repeats' if copies == 1 else 'repeat'} an earlier one, token for token.",
            "Remove them, unless the model is to see them more often.",
        )
    if unanswered := counted.get(NO_FINAL_ANSWER, 0):
        yield Problem(
            f"{count(unanswered, 'conversation')} without an answer to the last message.",
            "What follows the last answer is not trained on. Remove it, or add the answer.",
        )
    if passed := counted.get(PASSED_OVER, 0):
        yield Problem(
            f"{count(passed, 'row')} with weight or train fields that are passed over.",
            f"dataset.train_on={found.options.get('train_on', 'assistant')} decides alone; "
            "dataset.train_on=marked would follow them.",
        )


def _texts(found: Statistics) -> Iterator[Problem]:
    counted = found.findings.counts
    if left_out := counted.get(DROPPED_MESSAGE, 0):
        yield Problem(
            f"{count(left_out, 'row')} with a message that the chat template leaves out.",
            "Move what they say into the user's message, if the model is to know it.",
        )
    special = counted.get(SPECIAL_IN_TEXT, 0)
    if special and found.special_in_text == "parse":
        yield Problem(
            f"{count(special, 'row')} with a special token such as <|end|> written in a message: "
            "it counts as that token, and can end a turn.",
            "Set tokenizer.special_in_text=text to keep it as text.",
        )


def _held_out_problems(found: Statistics) -> Iterator[Problem]:
    part = found.held_out
    if part and part.seen:
        yield Problem(
            f"{part.seen:,} of {count(part.samples, 'validation sample')} "
            f"({percent(part.seen / part.samples)}) can be found in the training data: the "
            "validation loss will look too good.",
            "Remove them from one of the two.",
        )


def _compared(found: Statistics) -> Iterator[Problem]:
    if found.compared and found.compared.differ:
        yield Problem(
            f"{found.compared.differ:,} of {count(found.compared.samples, 'sample')} differ from "
            "what transformers makes of them.",
            "Look at the first ones below. With tokenizer.special_in_text=text that is wanted "
            "where messages hold special tokens.",
        )


def _sections(found: Statistics) -> Iterator[tuple[str, Mapping[str, Any], Findings]]:
    yield "dataset", found.options, found.findings
    # Rows that are only split into two parts are told of once
    val = found.options_val
    if found.held_out and val is not None and val.get("source") != found.options.get("source"):
        yield "dataset_val", val, found.held_out.findings


# The numbers of a data set as lines of text, the same for the page and the terminal.


class Fact(NamedTuple):
    """One number, in words."""

    label: str
    value: str
    places: list[str]
    """Where the first of what is counted stand, and why."""


def title_of(found: Statistics) -> str:
    """Return what the data set is called."""
    return _source(found.options.get("source") or found.options["_component_"])


def short(where: str, found: Statistics) -> str:
    """Return a place without the folder that all places of the data set begin with."""
    source = found.options.get("source")
    if not isinstance(source, str) or "/" not in source:
        return where
    folder = source if where.startswith(f"{source.rstrip('/')}/") else source.rpartition("/")[0]
    return where.replace(f"{folder.rstrip('/')}/", "")


def span(bin: Bin) -> str:
    """Return the lengths of a bar."""
    return f"{bin.low:,}" if bin.low == bin.high else f"{bin.low:,}–{bin.high:,}"


def limits_title(found: Statistics) -> str:
    """Return what stands over the table of limits."""
    return f"If samples are {'dropped above' if found.truncate == 'drop' else 'cut at'}"


def facts(found: Statistics) -> Iterator[Fact]:
    """Yield what is told of a data set, but for its tables."""
    yield Fact("Rows", f"{found.rows:,} read", [])
    yield from _noticed(found.findings, DROPPED, "left out: ")
    yield from _noticed(found.findings, NOTICED, "")
    yield Fact("Samples", f"{found.samples:,}", [])
    yield from _endless(found)
    yield from _alike(found.alike)
    yield Fact("Tokens an epoch", f"{found.tokens:,}", [])
    share = percent(found.labelled / found.tokens)
    yield Fact("Trained on", f"{found.labelled:,} ({share})", [])
    each, steps = found.batching.steps, count(found.steps, "step")
    epoch = f", {each:,} an epoch" if each != found.steps else ""
    yield Fact("Training", f"{steps} of {found.per_step}{epoch}", [])
    if found.held_out:
        yield from _held_out(found.held_out, found.options_val is not None)
    if found.compared:
        differ, samples = found.compared.differ, count(found.compared.samples, "sample")
        text = f"{samples}, of which {differ:,} differ" if differ else f"{samples}, all equal"
        yield Fact("Beside transformers", text, found.compared.places)


def _source(source: Any) -> str:
    if isinstance(source, Mapping):
        return _source(source.get("source"))
    if isinstance(source, Sequence) and not isinstance(source, str):
        return ", ".join(map(_source, source))
    return str(source)


def _noticed(findings: Findings, kinds: Sequence[str], before: str) -> Iterator[Fact]:
    for kind in kinds:
        if number := findings.counts[kind]:
            listed = findings.places.get(kind, [])[:FIRST]
            places = [f"{where}: {detail}" if detail else where for where, detail in listed]
            if 0 < len(places) < number:
                places.append(f"and {number - len(places):,} more")
            yield Fact("", f"{before}{number:,} {_agreeing(kind, number)}", places)


def _agreeing(kind: str, number: int) -> str:
    verb, _, rest = kind.partition(" ")
    one = {"have": "has", "are": "is", "do": "does"}.get(verb, verb)
    return f"{one if number == 1 else verb} {rest}"


def _endless(found: Statistics) -> Iterator[Fact]:
    if found.endless:
        cut = found.endless - found.endless_uncut
        yield Fact(
            "", f"{found.endless:,} without a trained end of a turn, {cut:,} of them cut", []
        )


def _alike(alike: Alike) -> Iterator[Fact]:
    if alike.copies:
        places = [f"{again} repeats {first}" for first, again in alike.pairs]
        if len(places) < alike.copies:
            places.append(f"and {alike.copies - len(places):,} more")
        yield Fact("", f"{alike.copies:,} with the tokens of an earlier one", places)
    if alike.answers:
        yield Fact("", f"{alike.answers:,} share a prompt and answer it differently", [])


def _held_out(part: Part, own: bool) -> Iterator[Fact]:
    share = percent(part.labelled / part.tokens)
    yield Fact(
        "Validation",
        f"{count(part.samples, 'sample')}, {part.tokens:,} tokens, {share} of them predicted",
        [],
    )
    if own:
        yield from _noticed(part.findings, DROPPED, "left out: ")
    if part.seen:
        yield Fact("", f"{part.seen:,} are in the training data too", [])
