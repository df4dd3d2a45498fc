"""The chat data set: rows in, tokens and labels out, ready for torchtune's collate functions."""

import gc
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
from filelock import FileLock
from numpy.typing import NDArray
from torch.utils.data import Dataset
from torchtune.utils import log_rank_zero
from tqdm import tqdm

from phi3_plugin.data import formats as f
from phi3_plugin.data.formats import (
    Chat,
    Findings,
    Format,
    Turn,
    Written,
    check_choice,
    check_layout,
    check_share,
    check_switch,
    pick_format,
)
from phi3_plugin.data.order import group_of, held_out, repeats
from phi3_plugin.data.packing import Packs
from phi3_plugin.data.sources import Row, Source, read_sources
from phi3_plugin.data.template import FilterFailed, Rendered
from phi3_plugin.data.tokenizer import (
    NOTHING,
    TRUNCATE,
    Batch,
    Lesson,
    Phi3Tokenizer,
    Tokens,
    cut,
    joined,
    keep_end,
    make_lesson,
)
from phi3_plugin.errors import ConfigError, DataError, OutputError, Phi3Error

# Tokenized conversations on disk: written once, read one by one, never held whole in memory.
#
# tokens.bin    int32   ids of all samples, one after the other
# trained.bin   bool    whether each is trained on
# samples.npy           one entry a sample, see SAMPLE
# lost.npy      int32   tokens of each conversation that was dropped for its length
# places.json           where each sample was read
# meta.json             what was noticed, and a hash of all tokens; written last

SAMPLE = np.dtype(
    [
        ("length", np.int32),  # tokens
        ("labelled", np.int32),  # tokens that are trained on
        ("full", np.int32),  # tokens before it was cut
        ("source", np.int32),  # which of the sources
        ("row", np.int64),  # which of the source's rows
        ("group", np.uint64),  # samples that must stay together
    ]
)
FILES = ("tokens.bin", "trained.bin", "samples.npy", "lost.npy", "places.json", "meta.json")


class StoreWriter:
    """Writes a store into an empty folder; it is whole when the ``with`` block is left."""

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        self.findings, self.rows = Findings(), 0
        self._folder, self._samples = folder, list[NDArray[Any]]()
        self._places, self._lost = list[str](), list[int]()
        self._files = [(folder / name).open("wb") for name in FILES[:2]]
        self._digests = [hashlib.sha256() for _ in range(3)]

    def append(
        self, batch: Batch, places: Sequence[str], columns: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write tokenized conversations.

        Args:
            batch: N of them.
            places: N, where each was read.
            columns: ``full``, ``source``, ``row`` and ``group`` of :data:`SAMPLE`, each [N].
        """
        samples = np.zeros(len(batch.lengths), SAMPLE)
        samples["length"] = batch.lengths
        counts, ends = np.concatenate([[0], np.cumsum(batch.trained)]), np.cumsum(batch.lengths)
        samples["labelled"] = counts[ends] - counts[ends - batch.lengths]
        for name, values in columns.items():
            samples[name] = values
        parts = (batch.ids, batch.trained, samples["length"])
        for digest, values in zip(self._digests, parts, strict=True):
            digest.update(np.ascontiguousarray(values).data)
        for file, values in zip(self._files, parts, strict=False):
            file.write(values.data)
        self._samples.append(samples)
        self._places += places

    def lose(self, lengths: Iterable[int]) -> None:
        """Take note of conversations that are too long to be kept."""
        self._lost += lengths

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        samples = np.concatenate([np.zeros(0, SAMPLE), *self._samples])
        np.save(self._folder / "samples.npy", samples)
        np.save(self._folder / "lost.npy", np.array(self._lost, dtype=np.int32))
        whole = hashlib.sha256(b"".join(digest.digest() for digest in self._digests))
        meta = {
            "tokens": int(samples["length"].sum(dtype=np.int64)),
            "rows": self.rows,
            "digest": whole.hexdigest()[:16],
            "findings": self.findings.to_json(),
        }
        (self._folder / "places.json").write_text(json.dumps(self._places), "utf-8")
        (self._folder / "meta.json").write_text(json.dumps(meta), "utf-8")


@dataclass(frozen=True)
class Store:
    """Samples of a folder that :class:`StoreWriter` wrote."""

    folder: Path
    samples: NDArray[Any]
    """[N] of :data:`SAMPLE`"""
    rows: int
    """Rows that were read."""
    digest: str
    """Hash of all tokens and labels in their order."""
    findings: Findings
    lost: NDArray[np.int32]
    """Tokens of each conversation that was dropped for its length."""

    def read(self, index: int) -> Tokens:
        """Read one sample."""
        start, length = int(self._starts[index]), int(self.samples["length"][index])
        # Not mapped: pages that were read once would count as memory of this process
        tokens, trained = self._open
        ids = np.frombuffer(os.pread(tokens, 4 * length, 4 * start), np.int32)
        return Tokens(ids, np.frombuffer(os.pread(trained, length, start), np.bool_))

    @cached_property
    def places(self) -> list[str]:
        """Where each sample was read."""
        with self._present():
            places: list[str] = json.loads((self.folder / "places.json").read_text("utf-8"))
            return places

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        lengths = self.samples["length"].astype(np.int64)
        starts: NDArray[np.int64] = np.cumsum(lengths) - lengths
        return starts

    @cached_property
    def _open(self) -> tuple[int, int]:
        with self._present():
            tokens, trained = (os.open(self.folder / name, os.O_RDONLY) for name in FILES[:2])
            return tokens, trained

    @contextmanager
    def _present(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise OutputError(
                f"{self.folder} was removed while it was used. Run the command again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself, and does not remove them when it ends
        own = ("_open", "_keeps")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __del__(self) -> None:
        with suppress(OSError, TypeError):  # os may be gone when Python ends
            for file in self.__dict__.get("_open", ()):
                os.close(file)


def open_store(folder: Path) -> Store | None:
    """Open a store; None if it is not there or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        samples = np.load(folder / "samples.npy", allow_pickle=False)
        sizes = [(folder / name).stat().st_size for name in FILES[:2]]
        findings = Findings.from_json(meta["findings"])
        lost = np.load(folder / "lost.npy", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if samples.dtype != SAMPLE or sizes != [4 * meta["tokens"], meta["tokens"]]:
        return None
    if int(samples["length"].sum(dtype=np.int64)) != meta["tokens"]:
        return None
    store = Store(folder, samples, meta["rows"], meta["digest"], findings, lost)
    _ = store._open  # Opened files stay readable if the folder is removed
    return store


# From conversations to a store of tokens: rendered here, encoded on all cores beside it.
#
# Only a few batches are held at once, so memory does not grow with the data.

BATCH = 1024, 1_000_000
"""Conversations, or characters, that are encoded at once: enough for all cores, little to hold."""

WAITING = 2
"""Batches that are being encoded while the next is rendered."""


class Read(NamedTuple):
    """A row that was read."""

    where: str
    source: int
    row: int
    group: int
    """Rows of one group stay together; uint64."""
    chat: Chat


class _Chat(NamedTuple):
    """A row that was rendered."""

    read: Read
    rendered: Rendered


@dataclass(frozen=True)
class Preparation:
    """How conversations become tokens."""

    tokenizer: Phi3Tokenizer
    lesson: Lesson
    truncate: str
    """One of :data:`phi3_plugin.data.tokenizer.TRUNCATE`."""
    writes_calls: bool = False
    """Whether special tokens in messages may be those of ``dataset.tool_calls``."""

    def write(self, rows: Iterable[Read | tuple[str, str, str]], writer: StoreWriter) -> None:
        """Tokenize rows into a store.

        Args:
            rows: Rows that were read, or kind, place and reason of one that gives no sample.
            writer: Takes samples and findings.
        """
        waiting = deque[tuple[list[_Chat], Future[Batch]]]()
        gc.freeze()  # Or each collection would walk over all that was imported
        with ThreadPoolExecutor(WAITING) as pool:
            try:
                for chats in self._batches(rows, writer):
                    rendered = [chat.rendered for chat in chats]
                    waiting.append((chats, pool.submit(self.tokenizer.encode_chats, rendered)))
                    if len(waiting) > WAITING:
                        self._append(*_finished(waiting), writer)
                while waiting:
                    self._append(*_finished(waiting), writer)
            finally:
                for _, future in waiting:
                    future.cancel()
                gc.unfreeze()

    def _batches(
        self, rows: Iterable[Read | tuple[str, str, str]], writer: StoreWriter
    ) -> Iterator[list[_Chat]]:
        chats, size = list[_Chat](), 0
        for row in tqdm(rows, desc="Tokenizing", unit=" rows", disable=None, leave=False):
            writer.rows += 1
            chat = self._render(row, writer.findings)
            if chat is None:
                continue
            chats.append(chat)
            size += len(chat.rendered.text)
            if len(chats) == BATCH[0] or size > BATCH[1]:
                yield chats
                chats, size = [], 0
        if chats:
            yield chats

    def _render(self, row: Read | tuple[str, str, str], findings: f.Findings) -> _Chat | None:
        if not isinstance(row, Read):
            findings.add(*row)
            return None
        try:
            rendered = self.lesson.render(row.chat, self.tokenizer)
        except DataError as error:
            findings.add(f.UNUSABLE, row.where, str(error))
            return None
        if rendered.dropped:
            findings.add(f.DROPPED_MESSAGE, row.where, ", ".join(rendered.dropped))
        if not isinstance(row.chat, Written) and row.chat[-1].role != "assistant":
            findings.add(f.NO_FINAL_ANSWER, row.where, f"the last turn is {row.chat[-1].role}'s")
        if any(turn.trained and not turn.content.strip() for turn in rendered.turns):
            findings.add(f.BLANK_ANSWER, row.where)
        if self.lesson.passes_over(row.chat):
            findings.add(f.PASSED_OVER, row.where)
        return _Chat(row, rendered)

    def _append(self, chats: Sequence[_Chat], batch: Batch, writer: StoreWriter) -> None:
        for n in np.flatnonzero(batch.special & (not self.writes_calls)).tolist():
            writer.findings.add(f.SPECIAL_IN_TEXT, chats[n].read.where)
        full, batch = batch.lengths, self._fitted(self.lesson.mark(batch), chats)
        counts, ends = np.concatenate([[0], np.cumsum(batch.trained)]), np.cumsum(batch.lengths)
        kept = counts[ends] > counts[ends - batch.lengths]
        for n in np.flatnonzero((full > batch.lengths) | ~kept).tolist():
            self._notice(chats[n].read.where, int(full[n]), bool(kept[n]), writer)
        if not kept.all():
            chats = [chat for chat, keep in zip(chats, kept, strict=True) if keep]
            batch, full = _chosen(batch, kept), full[kept]
        reads = [chat.read for chat in chats]
        columns = {
            "full": full,
            "source": np.array([read.source for read in reads]),
            "row": np.array([read.row for read in reads]),
            "group": np.array([read.group for read in reads], dtype=np.uint64),
        }
        writer.append(batch, [read.where for read in reads], columns)

    def _fitted(self, batch: Batch, chats: Sequence[_Chat]) -> Batch:
        limit = self.tokenizer.max_seq_len
        if limit is None or not (batch.lengths > limit).any():
            return batch
        if self.truncate == "drop":
            parts = batch.split()
            kept = [part.first(0 if len(part.ids) > limit else None) for part in parts]
            return joined(kept, batch.special)
        if self.truncate == "right":
            return cut(batch, limit)
        parts = [
            self._end(chat.rendered, limit) if len(part.ids) > limit else part
            for chat, part in zip(chats, batch.split(), strict=True)
        ]
        return joined(parts, batch.special)

    def _end(self, chat: Rendered, limit: int) -> Tokens:
        def encode(chats: Sequence[Rendered]) -> Batch:
            return self.lesson.mark(self.tokenizer.encode_chats(chats))

        def render(turns: Sequence[Turn]) -> Rendered:
            return self.lesson.write(turns, self.tokenizer)

        try:
            return keep_end(chat, limit, render, encode)
        except DataError:  # The template fails on what is left; nothing of it is trained
            return encode([chat]).split()[0].first(0)

    def _notice(self, where: str, full: int, kept: bool, writer: StoreWriter) -> None:
        limit = self.tokenizer.max_seq_len
        if kept:
            writer.findings.add(f.TRUNCATED, where, f"{full} tokens")
            return
        writer.lose([full])
        if self.truncate == "drop" and limit is not None and full > limit:
            writer.findings.add(f.TOO_LONG, where, f"{full} tokens")
        else:
            writer.findings.add(f.CUT_AWAY, where, f"{full} tokens")


def _finished(
    waiting: deque[tuple[list[_Chat], Future[Batch]]],
) -> tuple[list[_Chat], Batch]:
    chats, future = waiting.popleft()
    return chats, future.result()


def _chosen(batch: Batch, kept: NDArray[np.bool_]) -> Batch:
    tokens = np.repeat(kept, batch.lengths)
    return Batch(batch.ids[tokens], batch.trained[tokens], batch.lengths[kept], batch.special[kept])


# From sources to conversations, and what is said of rows that are none.

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
    """Check the options of a data set; see :func:`phi3_plugin.data.dataset.chat_dataset`.

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


# Tokenized data is kept, by a hash of everything it depends on.
#
# Nothing is ever looked up by a name or a date, so an edited file, template or program gives another
# key. A folder is written beside its final name and renamed when it is whole: a killed run leaves
# nothing that would be taken for data, and what it leaves is removed when the key is next written.

FOLDER = "PHI3_PLUGIN_CACHE"
"""Environment variable that names another folder."""

KEPT_DAYS = 30
"""What nobody opened for so long is removed when something new is written."""

Write = Callable[[StoreWriter], None]

logger = logging.getLogger(__name__)


def cached(cache_dir: str | Path | None, settings: Mapping[str, Any] | None, write: Write) -> Store:
    """Open the store of these settings, or write it first.

    One process writes; others that want the same store meanwhile wait for it.

    Args:
        cache_dir: Where stores are kept; None is the user's cache folder.
        settings: All that decides what is in the store, as JSON values. None: it is not known, so
            the store is for this process alone.
        write: Fills a store.

    Raises:
        DataError: The data cannot be used; nothing is kept.
        OutputError: The store cannot be written.
    """
    key = hashlib.sha256(json.dumps([_code(), settings], sort_keys=True).encode()).hexdigest()[:32]
    folder: str | Path | None = tempfile.gettempdir()
    try:
        if settings is None or (folder := _writable(cache_dir)) is None:
            return _private(write)
        with FileLock(folder / f"{key}.lock"):
            return _open(folder / key) or _written(folder / key, write)
    except Phi3Error:
        raise
    except OSError as error:
        raise OutputError(
            f"The tokenized data cannot be written to {error.filename or folder}: "
            f"{error.strerror or error}. Make room, or name another folder with dataset.cache_dir "
            f"or the environment variable {FOLDER}."
        ) from error


def default_folder() -> Path:
    """Return where stores are kept unless another folder is named."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(home) / "phi3_plugin")


def _writable(cache_dir: str | Path | None) -> Path | None:
    folder = Path(cache_dir).expanduser() if cache_dir else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if cache_dir:
            raise
        said = f"tokenized data is not kept: {folder} cannot be written to ({error.strerror})"
        log_rank_zero(logger, said, logging.WARNING)
        return None
    return folder


def _open(folder: Path) -> Store | None:
    store = open_store(folder)
    if store is not None:
        os.utime(folder)
    return store


def _written(folder: Path, write: Write) -> Store:
    shutil.rmtree(folder, ignore_errors=True)  # broken, or it would have been opened
    _remove_unfinished(folder)
    _remove_old(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}-unfinished")
    unfinished.mkdir()
    try:
        with StoreWriter(unfinished) as writer:
            write(writer)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    store = open_store(folder)
    if store is None:
        raise DataError(f"{folder} was changed while it was written. Run the command again.")
    return store


def _private(write: Write) -> Store:
    folder = tempfile.TemporaryDirectory(prefix="phi3_plugin-")
    with StoreWriter(Path(folder.name)) as writer:
        write(writer)
    store = open_store(Path(folder.name))
    if store is None:
        raise DataError(f"{folder.name} was changed while it was written. Run the command again.")
    store.__dict__["_keeps"] = folder  # removed with the store
    return store


def _remove_unfinished(mine: Path) -> None:
    """Remove what killed runs left: who holds the lock of a key is the only one that writes it."""
    for left in mine.parent.glob("*-unfinished"):
        key = left.name.partition(".")[0]
        lock = FileLock(mine.with_name(f"{key}.lock"), timeout=0)
        with suppress(OSError), nullcontext() if key == mine.name else lock:  # Timeout is OSError
            shutil.rmtree(left, ignore_errors=True)


def _remove_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for entry in folder.glob(f"{'[0-9a-f]' * 32}*"):
        with suppress(OSError):  # Another process may be removing it too
            if entry.stat().st_mtime >= oldest:
                continue
            if (entry / "meta.json").is_file():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".lock" and not entry.with_suffix("").exists():
                entry.unlink()


def _code() -> str:
    """Return a hash of the program that makes the data."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {jinja2.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


# Tokenized conversations of a store: all of them, some, some several times.

IGNORED = -100
"""Label of a token that the loss does not count."""


class ChatDataset(Dataset[dict[str, list[int]]]):
    """Tokenized conversations, read from a store one by one."""

    def __init__(self, store: Store, chosen: NDArray[np.int64]) -> None:
        """Choose samples of a store, [N]; see :func:`chat_dataset`."""
        self.store, self.chosen = store, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """Return ``tokens`` and ``labels``, each [S].

        Labels stand at their own token's position (the recipe shifts them), and are -100 where
        not trained. The first is always -100, so in a pack nothing is predicted across the
        border of two conversations.
        """
        tokens, labels = self.arrays(index)
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}

    def arrays(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return tokens and labels as arrays, each [S]."""
        tokens = self.store.read(int(self.chosen[index]))
        return tokens.ids, np.where(tokens.trained, tokens.ids, np.int32(IGNORED))

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sample, [N]."""
        return self._column("length")

    @property
    def labelled(self) -> NDArray[np.int32]:
        """Tokens of each sample that are trained on, [N]."""
        return self._column("labelled")

    @property
    def full(self) -> NDArray[np.int32]:
        """Tokens of each sample before it was cut, [N]."""
        return self._column("full")

    @property
    def groups(self) -> NDArray[np.uint64]:
        """Samples of equal value must not be split between training and validation, [N]."""
        return self._column("group")

    @property
    def lost(self) -> NDArray[np.int32]:
        """Tokens of each conversation that was dropped because of its length."""
        return self.store.lost

    @property
    def findings(self) -> Findings:
        """What was noticed about the rows, also about those that gave no sample."""
        return self.store.findings

    @property
    def rows(self) -> int:
        """Rows that were read."""
        return self.store.rows

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels in their order."""
        digest = hashlib.sha256(self.store.digest.encode())
        digest.update(self.chosen.tobytes())
        return str(digest.hexdigest()[:16])

    def places(self, index: int) -> str:
        """Return where a sample was read, as in ``chats.jsonl:7``."""
        return self.store.places[int(self.chosen[index])]

    def select(self, indices: NDArray[np.int64]) -> "ChatDataset":
        """Return the data set of some of the samples, in the given order."""
        return ChatDataset(self.store, self.chosen[indices])

    def hold_out(self, share: float, seed: int) -> tuple["ChatDataset", "ChatDataset"]:
        """Split into what is trained on and what is held out, groups whole.

        Args:
            share: Of the samples that is held out.
            seed: Decides which.

        Raises:
            DataError: Nothing would be left to train on.
        """
        # Once each: a weight is how often a sample is trained on
        samples = np.unique(self.chosen)
        held = samples[held_out(self.store.samples["group"][samples], share, seed)]
        kept = self.select(np.flatnonzero(~np.isin(self.chosen, held)))
        return kept, ChatDataset(self.store, held)

    def _column(self, name: str) -> NDArray[Any]:
        values: NDArray[Any] = self.store.samples[name][self.chosen]
        return values


# The chat data set: rows in, tokens and labels out, ready for torchtune's collate functions.

PARTS = ("train", "held_out")
BAD_ROWS = ("error", "drop")
COMMON = ("format", "columns", "split", "subset", "streaming", "filter", "max_samples")
"""Options of every source, which one in a list may have for itself."""


def chat_dataset(
    tokenizer: Phi3Tokenizer,
    source: Any = None,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    streaming: bool = False,
    filter: str | None = None,
    max_samples: int | None = None,
    tool_calls: str | None = None,
    system_prompt: str | None = None,
    train_on: str = "assistant",
    truncate: str = "right",
    add_eos: bool = False,
    bad_rows: str = "error",
    group_by: str | None = None,
    held_out: float = 0.0,
    part: str = "train",
    seed: int = 0,
    packed: bool = False,
    split_documents: bool = False,
    cache_dir: str | Path | None = None,
) -> ChatDataset | Packs:
    """Read, check and tokenize conversations.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        source: A .json, .jsonl, .csv (each also as .gz), .parquet or .arrow file, a folder of
            them, a glob, or a name on the hub; or a list of these, or of dictionaries with the
            keys of :class:`phi3_plugin.data.sources.Source`.
        format: How rows are read, see :data:`phi3_plugin.data.formats.FORMATS`; by default
            recognized from the first rows.
        columns: Role to column name, for rows that no format fits.
        split: Which part of a hub data set, or of one that ``datasets`` saved.
        subset: The configuration of a hub data set that has several.
        streaming: Read a hub data set without downloading it first.
        filter: Expression over a row's columns; rows for which it is not true are left out.
        max_samples: Take the first so many rows.
        tool_calls: How a message's ``tool_calls`` are written: a text with one ``{}`` for them.
        system_prompt: Put in front of every conversation that has no system message; one that
            has any keeps its own. An empty text is an empty system message, which the template
            may leave out; None adds none.
        train_on: "assistant": what the assistant says and the token that ends it, unless the
            message has a weight of 0 or ``train: false``. "last": the last such turn only.
            "marked": the messages with a weight of 1 or ``train: true``. "all": every token but
            the first, user text, roles and whatever the template ends with among them;
            conversations need no assistant turn then.
        truncate: What becomes of conversations longer than ``tokenizer.max_seq_len``, see
            :mod:`phi3_plugin.data.tokenizer`.
        add_eos: Put the end-of-text token at the end of conversations whose template does not.
            It is trained on as the template's own is: only with ``train_on: all``.
        bad_rows: "error": rows that cannot be used stop the run. "drop": they are counted.
        group_by: A column; rows with the same value stay together when data is held out. By
            default rows do whose conversations start alike.
        held_out: Share of the samples that is held out.
        part: "train", or "held_out" for the other part.
        seed: Decides what is held out, what weights take, and the packs.
        packed: Fill rows of ``tokenizer.max_seq_len`` tokens with several conversations.
        split_documents: Cut conversations where a pack is full, instead of keeping them whole.
        cache_dir: Where tokenized data is kept, see :func:`phi3_plugin.data.dataset.cached`.

    Raises:
        ConfigError: An option is missing or does not fit the others.
        MissingFileError: A local source is not there.
        DataError: Rows are broken (all are counted, the first ones listed), their format is
            not known, or nothing is left to train on.
        OutputError: The tokenized data cannot be written.
    """
    given = locals()
    _check(given)
    common = {name: given[name] for name in COMMON}
    reading = make_reading(
        tokenizer,
        source,
        common,
        tool_calls=tool_calls,
        group_by=group_by,
        lesson=(train_on, system_prompt, add_eos),
        truncate=truncate,
    )
    store = cached(cache_dir, reading.settings, reading.write)
    judge(store, reading, drop=bad_rows == "drop")
    dataset = ChatDataset(store, _weighted(store, reading, seed))
    if held_out:
        dataset = dataset.hold_out(held_out, seed)[PARTS.index(part)]
    if not packed or tokenizer.max_seq_len is None:
        return dataset
    size, pad = tokenizer.max_seq_len, tokenizer.pad_id
    return Packs(dataset, size, pad, seed=seed, split_documents=split_documents)


def _check(given: Mapping[str, Any]) -> None:
    for name in ("packed", "split_documents", "streaming"):
        check_switch(f"dataset.{name}", given[name])
    check_choice("dataset.bad_rows", given["bad_rows"], BAD_ROWS)
    check_choice("dataset.part", given["part"], PARTS)
    check_share("dataset.held_out", given["held_out"])
    if given["cache_dir"] is not None and not isinstance(given["cache_dir"], str | Path):
        raise ConfigError(f"dataset.cache_dir: {given['cache_dir']!r} must be a folder.")
    if given["tool_calls"] is not None and given["tokenizer"].special_in_text == "text":
        raise ConfigError(
            "dataset.tool_calls: special tokens that it writes into messages would become text "
            "with tokenizer.special_in_text=text. Set that to parse."
        )
    if type(given["seed"]) is not int or given["seed"] < 0:
        raise ConfigError(f"dataset.seed: {given['seed']!r} must be a whole number from 0.")
    if given["packed"] and given["tokenizer"].max_seq_len is None:
        raise ConfigError(
            "dataset.packed: True needs the length of a pack. Set tokenizer.max_seq_len."
        )
    if given["part"] == "held_out" and not given["held_out"]:
        raise ConfigError("dataset.part: held_out needs dataset.held_out, a share above 0.")
    if given["split_documents"] and not given["packed"]:
        raise ConfigError("dataset.split_documents: True needs dataset.packed=True.")


def _weighted(store: Store, reading: Reading, seed: int) -> NDArray[np.int64]:
    counts = np.ones(len(store.samples), dtype=np.int64)
    for number, source in enumerate(reading.sources):
        if source.weight != 1:
            mine = np.flatnonzero(store.samples["source"] == number)
            counts[mine] = repeats(source.weight, store.samples["row"][mine], seed + number)
    if not counts.any():
        raise DataError("dataset.source: the weights leave no sample. Raise them.")
    return np.repeat(np.arange(len(counts)), counts)
