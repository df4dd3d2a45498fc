"""The numbers and first samples of a data set: a page, and a terminal."""

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.errors import OutputError
from phi3_plugin.inspect import (
    Bin,
    Shown,
    Statistics,
    Unit,
    count,
    facts,
    harmless,
    limits_title,
    loss,
    percent,
    problems,
    short,
    span,
    title_of,
)

# The numbers and first samples of a data set, as one page that needs no other file.

NAME = "data.html"
TEMPLATE = Path(__file__).with_name("inspection.html.j2")

HEAD, TAIL = 2500, 500
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


def write_page(folder: str | Path, found: Statistics, samples: Sequence[Shown]) -> Path:
    """Write ``data.html``, whole or not at all.

    Args:
        folder: Where to; created if missing.
        found: The numbers.
        samples: The first samples.

    Returns:
        The page.

    Raises:
        OutputError: It cannot be written.
    """
    page = Path(folder) / NAME
    aside = page.with_name(f".partial-{os.getpid()}-{NAME}")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(render(found, samples), "utf-8")
        os.replace(aside, page)
    except OSError as error:
        raise OutputError(
            f"{page} could not be written: {error}. Choose a folder with output_dir=DIR."
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
    return page


def render(found: Statistics, samples: Sequence[Shown]) -> str:
    """Return the page."""
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_harmless
    )
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=title_of(found),
        found=found,
        problems=problems(found),
        tiles=list(_tiles(found)),
        facts=list(facts(found)),
        most=max(bin.samples for bin in found.lengths.bins),
        samples=samples,
        percent=percent,
        loss=loss,
        count=count,
        limits_title=limits_title(found),
        short=short,
        span=span,
        tokens=tokens,
    )


def tokens(units: Sequence[Unit]) -> Iterator[Token | str]:
    """Yield what the page shows of a sample, and a text in place of what it leaves out."""
    hidden = len(units) - HEAD - TAIL
    if hidden <= 0:
        yield from map(_token, units)
        return
    yield from map(_token, units[:HEAD])
    yield f"… {hidden:,} more …"
    yield from map(_token, units[-TAIL:])


def _token(unit: Unit) -> Token:
    kind = f"u{' trained' * unit.trained}{' special' * unit.special}"
    note = f"{'ids' if len(unit.ids) > 1 else 'id'} {', '.join(map(str, unit.ids))}"
    parts = [part for part in SPACES.split(unit.text) if part]
    pieces = [(part.translate(SIGNS), part.isspace() and part[0] in " \t\n") for part in parts]
    return Token(kind, f"{note}{', trained' * unit.trained}", pieces)


def _tiles(found: Statistics) -> Iterator[tuple[str, str]]:
    yield "Samples", f"{found.samples:,}"
    yield "Tokens an epoch", f"{found.tokens:,}"
    yield "Trained on", percent(found.labelled / found.tokens)
    yield "Padding", percent(found.batching.padding)
    yield "Tokens lost", percent(found.cut.tokens)
    yield "Steps", f"{found.steps:,}"


def _harmless(value: Any) -> Any:
    return harmless(value) if isinstance(value, str) else value


# The numbers and first samples of a data set, for a terminal.

PLAIN, BOLD, DIM, UNDERLINED, TURNED = "0", "1", "2", "4", "7"
RED, GREEN, YELLOW, BLUE, MAGENTA = "31", "32", "33", "34", "35"
CODE = re.compile(r"\x1b\[[\d;]*m")

LEAST = 60
"""Columns that are used even of a narrower terminal: what the tables take."""

LABEL = 24
"""Columns of what stands on the left."""

HEAD_LINES, TAIL_LINES = 9, 3
"""Lines that are shown of a long sample."""

SAMPLES = 3
"""Samples that are shown; the page has more."""


class Terminal:
    """Writes for one terminal."""

    def __init__(self, width: int, *, color: bool) -> None:
        """Take the columns, and whether it has colors; marks say the same without."""
        self.width, self.color = max(LEAST, width), color

    def report(self, found: Statistics, samples: Sequence[Shown], page: str) -> str:
        """Return the whole report.

        Args:
            found: The numbers.
            samples: The first samples.
            page: Where the page with all of it lies.
        """
        parts = [
            self._title(found),
            self._problems(found),
            self._facts(found),
            self._lengths(found),
            self._batches(found),
            self._cuts(found),
            self._samples(samples, found),
        ]
        text = "\n\n".join("\n".join(part) for part in parts)
        return f"{text}\n\n{self._paint('All of it: ', BOLD)}{harmless(page)}\n"

    def _paint(self, text: str, *codes: str) -> str:
        return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if self.color and text else text

    def _title(self, found: Statistics) -> Iterator[str]:
        for line in self._wrapped(f"Training data: {title_of(found)}"):
            yield self._paint(line, BOLD)

    def _problems(self, found: Statistics) -> Iterator[str]:
        listed = problems(found)
        if not listed:
            yield self._paint("No problem was found.", GREEN)
        for problem in listed:
            sign, code = ("x", RED) if problem.stops else ("!", YELLOW)
            text, advice = self._wrapped(problem.text, 2), self._wrapped(problem.advice, 2)
            yield f"{self._paint(sign, BOLD, code)} {self._paint(text[0], BOLD)}"
            yield from (f"  {self._paint(line, BOLD)}" for line in text[1:])
            yield from (f"  {line}" for line in advice)

    def _facts(self, found: Statistics) -> Iterator[str]:
        for fact in facts(found):
            first, *rest = self._wrapped(fact.value, LABEL)
            yield f"{_left(fact.label, LABEL)}{first}"
            yield from (" " * LABEL + line for line in rest)
            for place in fact.places:
                lines = self._wrapped(short(place, found), LABEL + 2)
                yield from (self._paint(" " * (LABEL + 2) + line, DIM) for line in lines)

    def _lengths(self, found: Statistics) -> Iterator[str]:
        lengths = found.lengths
        yield self._heading("Tokens of a sample", "before it is cut" if found.fate == "cut" else "")
        yield (
            f"  median {lengths.median:,.0f}   95 % have up to {lengths.p95:,.0f}   "
            f"longest {lengths.longest:,}"
        )
        yield from self._bars(lengths.bins, found.limit, found.fate)

    def _bars(self, bins: Sequence[Bin], limit: int | None, fate: str) -> Iterator[str]:
        names = [span(bin) for bin in bins]
        counts = [f"{bin.samples:,}" for bin in bins]
        left, right = max(map(len, names)), max(map(len, counts))
        room = max(8, self.width - left - right - 5 - len(fate))
        most = max(bin.samples for bin in bins)
        for bin, name, number in zip(bins, names, counts, strict=True):
            # A bar that holds anything can be seen
            bar = "█" * max(bool(bin.samples), round(room * bin.samples / most))
            over = limit is not None and bin.low > limit
            line = f"  {name:>{left}} {number:>{right}} " + self._paint(bar, (BLUE, YELLOW)[over])
            yield f"{line.rstrip()} {fate}" if over else line.rstrip()

    def _batches(self, found: Statistics) -> Iterator[str]:
        yield self._heading("Batches", "> is yours")
        rows = [(b.chosen, b.name, (percent(b.padding), f"{b.steps:,}")) for b in found.batchings]
        yield from self._table(("padding", "steps an epoch"), rows)

    def _cuts(self, found: Statistics) -> Iterator[str]:
        yield self._heading(limits_title(found), "> is yours")
        rows = [
            (
                cut.limit == found.limit,
                f"{cut.limit:,}{f' ({cut.name})' if cut.name else ''}",
                (percent(cut.samples), loss(cut)),
            )
            for cut in found.cuts
        ]
        yield from self._table((f"samples {found.fate}", "tokens lost"), rows)

    def _table(
        self, heads: Sequence[str], rows: Iterable[tuple[bool, str, Sequence[str]]]
    ) -> Iterator[str]:
        yield " " * (LABEL + 4) + "".join(f"{head:>16}" for head in heads)
        for chosen, name, cells in rows:
            line = f"{_left(name, LABEL + 2)}" + "".join(f"{cell:>16}" for cell in cells)
            yield f"{'>' if chosen else ' '} " + self._paint(line, BOLD if chosen else PLAIN)

    def _heading(self, text: str, note: str = "") -> str:
        return self._paint(text, BOLD) + (self._paint(f"  ({note})", DIM) if note else "")

    def _samples(self, samples: Sequence[Shown], found: Statistics) -> Iterator[str]:
        yield self._heading("Samples")
        legend = (
            ("+ trained", GREEN),
            ("| only read", PLAIN),
            ("<|special|>", MAGENTA),
            ("<|special, trained|>", TURNED, GREEN),
        )
        yield "  " + "  ".join(self._paint(text, *codes) for text, *codes in legend)
        for number, sample in enumerate(samples[:SAMPLES], 1):
            said = f"{count(sample.tokens, 'token')}, {sample.trained:,} trained"
            yield ""
            yield from self._wrapped(f"{number}. {short(sample.where, found)}: {said}")
            lines = list(self._sample(sample))
            hidden = len(lines) - HEAD_LINES - TAIL_LINES
            if hidden > 1:
                note = self._paint(f"  … {hidden} more lines in the page", DIM)
                lines = [*lines[:HEAD_LINES], note, *lines[-TAIL_LINES:]]
            yield from lines

    def _sample(self, sample: Shown) -> Iterator[str]:
        """Yield lines that are trained on as a whole or not at all, which the first sign tells."""
        line, used, trained = "", 0, None
        if sample.border and sample.from_start:
            yield self._paint(sample.border, YELLOW)
        for number, unit in enumerate(sample.units):
            text = seen(unit.text)
            for part in _parts(text, self.width - 2):
                if used and (unit.trained != trained or used + columns(part) > self.width - 2):
                    yield self._line(line, trained)
                    line, used = "", 0
                trained = unit.trained
                line += self._paint(part, *_codes(unit, number))
                used += columns(part)
                if part.endswith("⏎"):
                    yield self._line(line, trained)
                    line, used = "", 0
        if used:
            yield self._line(line, trained)
        if sample.border and not sample.from_start:
            yield self._paint(sample.border, YELLOW)

    def _line(self, line: str, trained: bool | None) -> str:
        return (self._paint("+", GREEN) if trained else self._paint("|", DIM)) + f" {line}"

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
    return sum(_columns(char) for char in CODE.sub("", text))


def seen(text: str) -> str:
    """Make white space visible, and everything else harmless."""
    return harmless(text).replace(" ", "·").replace("\t", "⇥").replace("\n", "⏎")


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _parts(text: str, room: int) -> Iterator[str]:
    """Cut a text so that each part fits, and ends with the line end that it holds."""
    part = ""
    for char in text:
        if part and (columns(part) + _columns(char) > room or part.endswith("⏎")):
            yield part
            part = ""
        part += char
    yield part


def _codes(unit: Unit, number: int) -> tuple[str, ...]:
    # Every other token differs a little, so that their borders can be seen
    if unit.special:
        return (TURNED, GREEN) if unit.trained else (MAGENTA,)
    if unit.trained:
        return (GREEN,) if number % 2 else (GREEN, UNDERLINED)
    return (PLAIN,) if number % 2 else (PLAIN, UNDERLINED)


def _left(text: str, room: int) -> str:
    return text + " " * max(1, room - columns(text))


def for_stdout(text: str) -> str:
    """Return a text that the terminal's encoding can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
