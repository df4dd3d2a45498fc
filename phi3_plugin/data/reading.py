"""From sources to conversations, and what is said of rows that are none."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torchtune.utils import log_rank_zero

from phi3_plugin.data import findings as f
from phi3_plugin.data.fields import check_layout
from phi3_plugin.data.files import Row
from phi3_plugin.data.formats import Format, pick_format
from phi3_plugin.data.lessons import NOTHING, make_lesson
from phi3_plugin.data.options import check_choice
from phi3_plugin.data.preparation import Preparation, Read
from phi3_plugin.data.sandbox import FilterFailed
from phi3_plugin.data.selection import group_of
from phi3_plugin.data.sources import Source, read_sources
from phi3_plugin.data.store import Store, StoreWriter
from phi3_plugin.data.tokenizer import Phi3Tokenizer
from phi3_plugin.data.truncation import TRUNCATE
from phi3_plugin.data.turns import Chat, Written
from phi3_plugin.errors import DataError

LISTED = 10
"""How many broken rows an error lists, and how many first rows tell the format."""

TOLD = (f.BROKEN, f.UNUSABLE, f.CUT_AWAY, f.TOO_LONG, f.TRUNCATED, f.DROPPED_MESSAGE, f.PASSED_OVER)
"""What is logged of rows that were read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How sources become a store."""

    sources: Sequence[Source]
    group_by: str | None
    tool_calls: str | None
    preparation: Preparation
    settings: Mapping[str, Any] | None
    """All that decides what is in the store; None if that cannot be known."""

    def write(self, writer: StoreWriter) -> None:
        """Read all sources, and tokenize them into a store."""
        rows = chain.from_iterable(self.rows(n, source) for n, source in enumerate(self.sources))
        self.preparation.write(rows, writer)
        if self.settings and self.settings["content"] != [s.fingerprint() for s in self.sources]:
            raise DataError(
                "dataset.source: files were changed while they were read. Run the command again."
            )

    def rows(self, number: int, source: Source) -> Iterator[Read | tuple[str, str, str]]:
        """Yield the rows of one source, or kind, place and reason of those that are none."""
        filtered = list[str]()
        rows = enumerate(source.rows(filtered.append))
        first = list[tuple[int, Row]]()
        while len(first) < LISTED and (found := next(rows, None)) is not None:
            if isinstance(found[1].value, DataError):
                yield _unread(found[1].where, found[1].value)
            else:
                first.append(found)
        format = _format([row for _, row in first], source, self.tool_calls)
        for index, row in chain(first, rows):
            yield from ((f.FILTERED, where, "") for where in filtered)
            filtered.clear()
            yield self._read(number, index, row, format)
        yield from ((f.FILTERED, where, "") for where in filtered)

    def _read(
        self, number: int, index: int, row: Row, format: Format | None
    ) -> Read | tuple[str, str, str]:
        if isinstance(row.value, DataError):
            return _unread(row.where, row.value)
        assert format is not None  # There is one as soon as a row could be read
        try:
            chat = self._split(format.read(row.value))
            group = group_of(row.value, chat, self.group_by)
        except DataError as error:
            return f.UNUSABLE, row.where, str(error)
        return Read(row.where, number, index, group, chat)

    def _split(self, chat: Chat) -> Chat:
        """Find what the assistant says in a text, as far as it can be found."""
        if isinstance(chat, Written) and chat.said is None:
            with suppress(DataError):
                return self.preparation.tokenizer.template.split(chat)
        return chat


def make_reading(
    tokenizer: Phi3Tokenizer,
    source: Any,
    common: Mapping[str, Any],
    *,
    tool_calls: str | None,
    group_by: str | None,
    lesson: tuple[str, str | None, bool],
    truncate: str,
) -> Reading:
    """Check the options of a data set; see :func:`phi3_plugin.data.chat.chat_dataset`.

    Raises:
        ConfigError: An option has a value that it cannot have.
        MissingFileError: A local source is not there.
    """
    check_choice("dataset.truncate", truncate, TRUNCATE)
    check_layout(tool_calls)
    taught = make_lesson(*lesson)
    sources = read_sources(source, **common)
    prints = [source.fingerprint() for source in sources]
    settings = {
        "content": prints,
        "sources": [[*map(str, s.files or ()), s.settings()] for s in sources],
        "tokenizer": tokenizer.fingerprint,
        "max_seq_len": tokenizer.max_seq_len,
        "lesson": lesson,
        "truncate": truncate,
        "group_by": group_by,
        "tool_calls": tool_calls,
    }
    known = None if None in prints else settings
    preparation = Preparation(tokenizer, taught, truncate, writes_calls=tool_calls is not None)
    return Reading(sources, group_by, tool_calls, preparation, known)


def judge(store: Store, reading: Reading, *, drop: bool) -> None:
    """Check what was read, and log what a user should know of it.

    Args:
        store: What the reading wrote.
        reading: How it was read.
        drop: Whether rows that cannot be used are left out.

    Raises:
        DataError: Rows cannot be used and are not to be dropped, or no sample is left.
    """
    places, counts = store.findings.places, store.findings.counts
    bad = [place for kind in (f.BROKEN, f.UNUSABLE) for place in places.get(kind, [])]
    count = counts[f.BROKEN] + counts[f.UNUSABLE]
    if count and not drop:
        raise DataError(_problems(bad, count, store.rows))
    if not len(store.samples):
        raise DataError(f"dataset.source: {_nothing_left(store, reading)}")
    for kind in TOLD:
        if counts[kind]:
            where, detail = places[kind][0]
            first = f"{where}: {detail}" if detail else where
            said = f"{counts[kind]} of {store.rows} rows {kind}. The first: {first}"
            log_rank_zero(logger, said, logging.WARNING)


def _unread(where: str, problem: DataError) -> tuple[str, str, str]:
    kind = f.UNUSABLE if isinstance(problem, FilterFailed) else f.BROKEN
    return kind, where, str(problem)


def _format(first: Sequence[Row], source: Source, tool_calls: str | None) -> Format | None:
    readable = [row.value for row in first if not isinstance(row.value, DataError)]
    if not readable:
        return None
    try:
        return pick_format(source.format, source.columns, readable, tool_calls=tool_calls)
    except DataError as error:
        usual = _usual(readable, tool_calls)
        if usual is None:
            raise DataError(f"dataset.source: {source.name}: {error}") from error
        return usual


def _usual(rows: Sequence[Mapping[str, Any]], tool_calls: str | None) -> Format | None:
    """Return the format of most rows, so that the others are bad rows; None if none has any."""
    found = dict[str, list[Format]]()
    for row in rows:
        with suppress(DataError):
            format = pick_format(None, None, [row], tool_calls=tool_calls)
            found.setdefault(str(format), []).append(format)
    return max(found.values(), key=len)[0] if found else None


def _problems(bad: Sequence[tuple[str, str]], count: int, total: int) -> str:
    listed = [f"{where}: {reason}" for where, reason in bad[:LISTED]]
    more = [f"and {count - LISTED} more"] if count > LISTED else []
    return (
        f"dataset.source: {count} of {total} rows cannot be used. Correct or remove them, or go "
        "on without them with dataset.bad_rows=drop:\n  " + "\n  ".join([*listed, *more])
    )


def _nothing_left(store: Store, reading: Reading) -> str:
    counts, tokenizer = store.findings.counts, reading.preparation.tokenizer
    names = ", ".join(source.name for source in reading.sources)
    if not store.rows:
        return f"{names} has no rows."
    dropped = ", ".join(f"{count} {kind}" for kind, count in counts.items() if kind in f.DROPPED)
    advice = ""
    if counts[f.CUT_AWAY] or counts[f.TOO_LONG]:
        nothing = NOTHING[reading.preparation.lesson.train_on]
        advice = f" Raise tokenizer.max_seq_len: {nothing} within {tokenizer.max_seq_len} tokens."
    return f"{names}: no sample is left of {store.rows} rows: {dropped}.{advice}"
