"""The numbers and first samples of a data set, as one page that needs no other file."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.data.inspection.advice import count, loss, percent, problems
from phi3_plugin.data.inspection.overview import facts, limits_title, short, span, title_of
from phi3_plugin.data.inspection.shown import Shown, Unit, harmless
from phi3_plugin.data.inspection.statistics import Statistics
from phi3_plugin.errors import OutputError

NAME = "data.html"
TEMPLATE = Path(__file__).with_name("page.html.j2")

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
