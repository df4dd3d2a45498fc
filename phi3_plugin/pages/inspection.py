"""How an inspection is shown: its numbers in words, as a page and in a terminal."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import regex

from phi3_plugin.data.findings import DROPPED, NOTICED, Findings
from phi3_plugin.inspect import FIRST, Shown, Statistics, Unit, advice, source_name
from phi3_plugin.pages import render, write_files
from phi3_plugin.pages.numbers import count, number, percent
from phi3_plugin.terminal import harmless

# The numbers in words


class Fact(NamedTuple):
    """One number, in words."""

    label: str
    value: str
    places: list[str]
    """Where the first of what is counted stand, and why."""


def facts(stats: Statistics) -> Iterator[Fact]:
    """Yield what is told of a data set beside its problems and tables."""
    yield Fact("Rows", f"{stats.rows:,} read", [])
    for told in stats.findings.columns_told():
        yield Fact("", short(told, stats), [])
    yield from _noticed(stats, stats.findings, DROPPED, "left out: ")
    yield from _noticed(stats, stats.findings, NOTICED)
    yield Fact("Samples", f"{stats.samples:,}", [])
    if copies := stats.alike.copies:
        pairs = [short(f"{again} repeats {first}", stats) for first, again in stats.alike.pairs]
        yield Fact("", f"{copies:,} with the tokens of an earlier one", _and_more(pairs, copies))
    if stats.alike.answers:
        yield Fact("", f"{stats.alike.answers:,} share a prompt and answer it differently", [])
    if both := stats.pairs:
        text = f"chosen {both.chosen:,.0f} tokens, rejected {both.rejected:,.0f} (medians); the "
        yield Fact("Answers", f"{text}chosen is longer in {percent(both.longer)}", [])
    yield Fact("Tokens an epoch", f"{stats.tokens:,}", [])
    share = percent(stats.labelled / stats.tokens)
    yield Fact("Trained on", f"{stats.labelled:,} ({share})", [])
    each, steps = stats.batching.steps, count(stats.steps, "step")
    epoch = f", {each:,} an epoch" if each != stats.steps else ""
    yield Fact("Training", f"{steps} of {stats.per_step}{epoch}", [])
    if stock := stats.stock:
        text = f"by torchtune's recipes {count(stock.steps, 'step')}, {stock.each:,} an epoch"
        text += f", without the last {stock.left_over:,} of each" if stock.left_over else ""
        yield Fact("", text, [])
    if held_out := stats.held_out:
        share = percent(held_out.labelled / held_out.tokens)
        samples = count(held_out.samples, "sample")
        text = f"{samples}, {held_out.tokens:,} tokens, {share} of them predicted"
        yield Fact("Validation", text, [])
        if stats.options_val is not None:
            yield from _noticed(stats, held_out.findings, DROPPED, "left out: ")
    if compared := stats.compared:
        samples = count(compared.samples, "sample")
        differ = f"of which {compared.differ:,} differ" if compared.differ else "all equal"
        places = [short(place, stats) for place in compared.places]
        yield Fact("Beside transformers", f"{samples}, {differ}", places)


def _noticed(
    stats: Statistics, findings: Findings, kinds: Sequence[str], before: str = ""
) -> Iterator[Fact]:
    for kind in kinds:
        if number := findings.counts[kind]:
            places = [
                short(f"{where}: {detail}" if detail else where, stats)
                for where, detail in findings.places.get(kind, [])[:FIRST]
            ]
            verb, _, rest = kind.partition(" ")
            one = {"have": "has", "are": "is", "do": "does"}.get(verb, verb)
            text = f"{before}{number:,} {one if number == 1 else verb} {rest}"
            yield Fact("", text, _and_more(places, number))


def _and_more(places: list[str], number: int) -> list[str]:
    more = number - len(places)
    return [*places, f"and {more:,} more"] if places and more else places


def short(where: str, stats: Statistics) -> str:
    """Return a place without the folder that all places of the data set begin with."""
    source = stats.options.get("source")
    if not isinstance(source, str) or "/" not in source:
        return where
    folder = source if where.startswith(f"{source.rstrip('/')}/") else source.rpartition("/")[0]
    return where.replace(f"{folder.rstrip('/')}/", "")


class Table(NamedTuple):
    """Figures of several choices."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, str, tuple[str, ...], bool]]
    """A choice, a note about it, its figures, and whether the settings make it."""


STOCK_PADS = "; only torchtune's recipes pad"


def tables(stats: Statistics) -> list[Table]:
    """Return what the ways to fill batches, and the limits of the length, would cost."""
    is_padded = stats.padded or stats.stock is not None
    heads = ("padding", "steps an epoch") if is_padded else ("steps an epoch",)
    batches = []
    for batching in stats.batchings:
        cells = [percent(batching.padding)] if is_padded else []
        cells.append(number(batching.steps))
        note = "yours" if batching.chosen else ""
        batches.append((batching.name, note, tuple(cells), batching.chosen))
    limits = [
        (f"{cut.limit:,}", cut.name, (percent(cut.samples), cut.loss), cut.limit == stats.limit)
        for cut in stats.cuts
    ]
    title = f"If samples are {'dropped above' if stats.fate == 'dropped' else 'cut at'}"
    listed = [
        Table(f"Batches{'' if stats.padded or not stats.stock else STOCK_PADS}", heads, batches),
    ]
    if limits:
        listed.append(Table(title, (f"samples {stats.fate}", "tokens lost"), limits))
    return listed


def lengths_title(stats: Statistics) -> str:
    """Return what the lengths are of."""
    what = "a sample" if stats.pairs is None else "a prompt with one answer"
    is_cut = stats.fate == "cut" and stats.cuts  # windows of a document lose nothing
    return f"Tokens of {what}{' before it is cut' if is_cut else ''}"


def lengths_text(stats: Statistics) -> str:
    """Return the lengths in a few words, and what is done to longer samples."""
    lengths = stats.lengths
    text = f"Median {lengths.median:,.0f}, 95 % have up to {lengths.p95:,.0f}"
    text += f", longest {lengths.longest:,}."
    if stats.limit and stats.cuts and stats.fate == "cut":
        text += f" Samples are cut at {stats.limit:,}."
    elif stats.limit and stats.fate == "dropped":
        text += f" Samples of more than {stats.limit:,} are dropped."
    return text


def sample_title(sample: Shown, stats: Statistics) -> str:
    """Return where a sample stands, and how long it is."""
    length = count(sample.tokens, "token")
    title = f"{short(sample.where, stats)}: {length}, {sample.trained:,} trained"
    title += f", of these {sample.thought:,} a thought" if sample.thought else ""
    return f"{title}; {sample.difference}" if sample.difference else title


# The page

DATA_PAGE = "data.html"

HEAD_UNITS, TAIL_UNITS = 2500, 500
"""Units that are shown of a long sample; a browser has trouble with a hundred thousand."""

SPACES = re.compile(r"([ \t\n]+)")
SIGNS = str.maketrans({" ": "·", "\t": "⇥", "\n": "⏎\n"})


class Token(NamedTuple):
    """A unit of a sample, as the page shows it."""

    kind: str
    """Its CSS classes."""
    note: str
    pieces: list[tuple[str, bool]]
    """Its text, and whether it is white space."""


def write_page(folder: str | Path, stats: Statistics, samples: Sequence[Shown]) -> Path:
    """Write ``data.html``, whole or not at all.

    Args:
        folder: Where to; created if missing.
        stats: The numbers.
        samples: The first samples.

    Returns:
        The page.

    Raises:
        OutputError: It cannot be written.
    """
    page = page_of(stats, samples)
    write_files(folder, {DATA_PAGE: page}, "Choose a folder with output_dir=DIR.")
    return Path(folder) / DATA_PAGE


def page_of(stats: Statistics, samples: Sequence[Shown]) -> str:
    """Return the page."""
    tiles = [
        ("Samples", f"{stats.samples:,}"),
        ("Tokens an epoch", f"{stats.tokens:,}"),
        ("Trained on", percent(stats.labelled / stats.tokens)),
        ("Tokens lost", percent(stats.cut.tokens)),
        ("Steps", f"{stats.steps:,}"),
    ]
    if stats.padded:
        tiles.insert(3, ("Padding", percent(stats.batching.padding)))
    return render(
        "inspection.html.j2",
        title=source_name(stats.options),
        stats=stats,
        problems=advice(stats),
        tiles=tiles,
        lengths_title=lengths_title(stats),
        lengths_text=lengths_text(stats),
        most=max(bin.samples for bin in stats.lengths.bins),
        tables=tables(stats),
        facts=_grouped(facts(stats)),
        number=number,
        count=count,
        samples=[(sample_title(one, stats), one, _tokens(one.units)) for one in samples],
    )


def _grouped(listed: Iterable[Fact]) -> list[tuple[str, list[Fact]]]:
    """Return facts under their labels; one without belongs to the one before it."""
    groups: list[tuple[str, list[Fact]]] = []
    for fact in listed:
        if fact.label:
            groups.append((fact.label, []))
        groups[-1][1].append(fact)
    return groups


def _tokens(units: Sequence[Unit]) -> list[Token | str]:
    """Return what the page shows of a sample, and a text in place of what it leaves out."""
    tokens: list[Token | str] = []
    hidden = max(0, len(units) - HEAD_UNITS - TAIL_UNITS)
    for unit in [*units[:HEAD_UNITS], *units[HEAD_UNITS + hidden :]]:
        if hidden and len(tokens) == HEAD_UNITS:
            tokens.append(f"… {hidden:,} more …")
        kinds = {"trained": unit.trained, "special": unit.special, "thought": unit.thought}
        classes = ["u", *(name for name, is_one in kinds.items() if is_one)]
        note = f"{'ids' if len(unit.ids) > 1 else 'id'} {', '.join(map(str, unit.ids))}"
        note += ", trained" if unit.trained else ""
        note += ", thought" if unit.thought else ""
        pieces = [
            (part.translate(SIGNS), SPACES.fullmatch(part) is not None)
            for part in SPACES.split(unit.text)
            if part
        ]
        tokens.append(Token(" ".join(classes), note, pieces))
    return tokens


# The terminal


class Ansi:
    """Codes that change how a terminal writes."""

    PLAIN, BOLD, DIM, ITALIC, UNDERLINED, TURNED = "0", "1", "2", "3", "4", "7"
    RED, GREEN, YELLOW, BLUE, MAGENTA = "31", "32", "33", "34", "35"


COLOR = re.compile(r"\x1b\[[\d;]*m")

LEAST = 60
"""Columns that are used even of a narrower terminal: what the tables take."""

LABEL = 24
"""Columns of what stands on the left."""

HEAD_LINES, TAIL_LINES = 9, 3
"""Lines that are shown of a long sample."""

READ_SIGN, TRAINED_SIGN, THOUGHT_SIGN = "|+~"
"""Signs of lines that are only read, trained on, and trained on as a thought."""

SAMPLES_SHOWN = 3
"""Samples that are shown; the page has more."""


class Terminal:
    """Writes for one terminal."""

    def __init__(self, width: int, *, color: bool) -> None:
        """Take the columns, and whether it has colors; marks say the same without."""
        self.width, self.color = max(LEAST, width), color

    def report(self, stats: Statistics, samples: Sequence[Shown], page: str) -> str:
        """Return the whole report.

        Args:
            stats: The numbers.
            samples: The first samples.
            page: Where the page with all of it lies.
        """
        title = self._wrapped(f"Training data: {source_name(stats.options)}")
        parts = [
            [self._paint(line, Ansi.BOLD) for line in title],
            self._advice(stats),
            self._facts(stats),
            self._lengths(stats),
            *map(self._table, tables(stats)),
            self._samples(samples, stats),
        ]
        text = "\n\n".join("\n".join(part) for part in parts)
        return f"{text}\n\n{self._paint('All of it: ', Ansi.BOLD)}{harmless(page)}\n"

    def _advice(self, stats: Statistics) -> Iterator[str]:
        listed = advice(stats)
        if not listed:
            yield self._paint("No problem was found.", Ansi.GREEN)
        for problem in listed:
            sign, code = ("x", Ansi.RED) if problem.stops else ("!", Ansi.YELLOW)
            first, *rest = self._wrapped(problem.text, 2)
            yield f"{self._paint(sign, Ansi.BOLD, code)} {self._paint(first, Ansi.BOLD)}"
            yield from (f"  {self._paint(line, Ansi.BOLD)}" for line in rest)
            yield from (f"  {line}" for line in self._wrapped(problem.advice, 2))

    def _facts(self, stats: Statistics) -> Iterator[str]:
        for fact in facts(stats):
            first, *rest = self._wrapped(fact.value, LABEL)
            yield f"{_padded(fact.label, LABEL)}{first}"
            yield from (" " * LABEL + line for line in rest)
            for place in fact.places:
                lines = self._wrapped(place, LABEL + 2)
                yield from (self._paint(" " * (LABEL + 2) + line, Ansi.DIM) for line in lines)

    def _lengths(self, stats: Statistics) -> Iterator[str]:
        bins, limit = stats.lengths.bins, stats.limit
        yield self._paint(lengths_title(stats), Ansi.BOLD)
        yield from (f"  {line}" for line in self._wrapped(lengths_text(stats), 2))
        left = max(len(bin.span) for bin in bins)
        most = max(bin.samples for bin in bins)
        right = len(f"{most:,}")
        room = max(8, self.width - left - right - 5 - len(stats.fate))
        for bin in bins:
            # A bar that holds anything can be seen
            bar = "█" * max(bool(bin.samples), round(room * bin.samples / most))
            over = limit is not None and bin.low > limit
            bar = self._paint(bar, Ansi.YELLOW if over else Ansi.BLUE)
            line = f"  {bin.span:>{left}} {bin.samples:>{right},} {bar}".rstrip()
            yield f"{line} {stats.fate}" if over else line

    def _table(self, table: Table) -> Iterator[str]:
        yield self._paint(table.title, Ansi.BOLD)
        yield " " * (LABEL + 4) + "".join(f"{head:>16}" for head in table.heads)
        for name, note, cells, chosen in table.rows:
            line = _padded(f"{name} ({note})" if note else name, LABEL + 2)
            line += "".join(f"{cell:>16}" for cell in cells)
            code = Ansi.BOLD if chosen else Ansi.PLAIN
            yield f"{'>' if chosen else ' '} {self._paint(line, code)}"

    def _samples(self, samples: Sequence[Shown], stats: Statistics) -> Iterator[str]:
        yield self._paint("Samples", Ansi.BOLD)
        legend: tuple[tuple[str, ...], ...] = (
            ("+ trained", Ansi.GREEN),
            ("| only read", Ansi.PLAIN),
            ("<|special|>", Ansi.MAGENTA),
            ("<|special, trained|>", Ansi.TURNED, Ansi.GREEN),
        )
        if any(sample.thought for sample in samples):
            legend = (*legend[:1], ("~ trained, a thought", Ansi.ITALIC, Ansi.GREEN), *legend[1:])
        yield "  " + "  ".join(self._paint(text, *codes) for text, *codes in legend)
        for place, sample in enumerate(samples[:SAMPLES_SHOWN], 1):
            yield ""
            yield from self._wrapped(f"{place}. {sample_title(sample, stats)}")
            lines = list(self._sample(sample))
            hidden = len(lines) - HEAD_LINES - TAIL_LINES
            if hidden > 1:
                note = self._paint(f"  … {hidden} more lines in the page", Ansi.DIM)
                lines = [*lines[:HEAD_LINES], note, *lines[-TAIL_LINES:]]
            yield from lines

    def _sample(self, sample: Shown) -> Iterator[str]:
        """Yield lines that are of one kind as a whole, which the first sign tells."""
        border = [self._paint(sample.border, Ansi.YELLOW)] if sample.border else []
        if sample.from_start:
            yield from border
        line, used, kind = "", 0, READ_SIGN
        for place, unit in enumerate(sample.units):
            for part in _parts(seen(unit.text), self.width - 2):
                now = THOUGHT_SIGN if unit.thought else TRAINED_SIGN if unit.trained else READ_SIGN
                if used and (now != kind or used + columns(part) > self.width - 2):
                    yield self._line(line, kind)
                    line, used = "", 0
                kind = now
                line += self._paint(part, *_codes(unit, place))
                used += columns(part)
                if part.endswith("⏎"):
                    yield self._line(line, kind)
                    line, used = "", 0
        if used:
            yield self._line(line, kind)
        if not sample.from_start:
            yield from border

    def _line(self, line: str, kind: str) -> str:
        return f"{self._paint(kind, Ansi.DIM if kind == READ_SIGN else Ansi.GREEN)} {line}"

    def _paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self.color and text else text

    def _wrapped(self, text: str, indent: int = 0) -> list[str]:
        """Break a text between words, and words that are too long anywhere."""
        room, lines, line = self.width - indent, list[str](), ""
        for word in harmless(text).replace("\n", " ").replace("\t", " ").split(" "):
            for part in _parts(word, room):
                if line and columns(line) + 1 + columns(part) > room:
                    lines.append(line)
                    line = part
                else:
                    line = f"{line} {part}" if line else part
        return [*lines, line]


def columns(text: str) -> int:
    """Return how many columns a text takes in a terminal."""
    wide = 0
    for char in COLOR.sub("", text):
        if unicodedata.category(char) not in ("Mn", "Me", "Cf"):
            wide += 2 if unicodedata.east_asian_width(char) in "WF" else 1
    return wide


def seen(text: str) -> str:
    """Make white space visible, and everything else harmless."""
    return harmless(text).replace(" ", "·").replace("\t", "⇥").replace("\n", "⏎")


def _parts(text: str, room: int) -> Iterator[str]:
    """Cut a text so that each part fits, and ends with the line end that it holds."""
    part = ""
    for char in regex.findall(r"\X", text):  # a sign of several characters is not cut
        if part and (columns(part) + columns(char) > room or part.endswith("⏎")):
            yield part
            part = ""
        part += char
    yield part


def _codes(unit: Unit, place: int) -> tuple[str, ...]:
    # Every other token differs a little, so that their borders can be seen
    if unit.special:
        return (Ansi.TURNED, Ansi.GREEN) if unit.trained else (Ansi.MAGENTA,)
    color = Ansi.GREEN if unit.trained else Ansi.PLAIN
    return (color, *[Ansi.ITALIC] * unit.thought, *[Ansi.UNDERLINED] * (place % 2 == 0))


def _padded(text: str, room: int) -> str:
    return text + " " * max(1, room - columns(text))
