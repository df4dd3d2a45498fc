"""Tokenized conversations on disk: written once, read one by one, never held whole in memory.

tokens.bin    int32   ids of all samples, one after the other
trained.bin   bool    whether each is trained on
weights.bin   float32 how much the loss counts each, of samples whose messages have weights
samples.npy           one entry a sample, see SAMPLE
lost.npy      int32   tokens of each conversation that was dropped for its length
places.json           where each sample was read
meta.json             what was noticed, and a hash of all tokens; written last
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import tokenizers
from filelock import FileLock
from numpy.typing import NDArray
from torchtune.utils import log_rank_zero

from phi3_plugin.data.findings import Findings
from phi3_plugin.data.tokenizer import TokenizedChats, Tokens
from phi3_plugin.data.turns import Chat
from phi3_plugin.errors import DataError, OutputError, Phi3Error

logger = logging.getLogger(__name__)


class ChatRow(NamedTuple):
    """A row that was read."""

    where: str
    source: int
    row: int
    group: int
    """Rows of one group stay together; uint64."""
    chat: Chat
    raw: Mapping[str, Any]
    """What the row holds."""
    wanted: bool = True
    """Whether the last answer is a good one."""
    rejected: Chat | None = None
    """The same conversation with a worse answer, of rows that have one."""
    weight: float = 1.0
    """How much the loss counts its tokens, beside what its messages say."""


SAMPLE = np.dtype(
    [
        ("length", np.int32),  # tokens
        ("labelled", np.int32),  # tokens that are trained on
        ("full", np.int32),  # tokens before it was cut
        ("source", np.int32),  # which of the sources
        ("row", np.int64),  # which of the source's rows
        ("group", np.uint64),  # samples that must stay together
        ("wanted", np.bool_),  # whether the answer is a good one; of pairs the second is not
        ("weight", np.float32),  # how much the loss counts its tokens
        ("uneven", np.bool_),  # whether its messages have weights of their own too
    ]
)


class StoreWriter:
    """Writes a store into an empty folder; it is whole when the ``with`` block is left."""

    def __init__(self, folder: Path) -> None:
        """Open the files."""
        self.findings = Findings()
        self.rows = 0
        """Rows that were read."""
        self.lost = list[int]()
        """Tokens of each conversation that is too long to be kept."""
        self._folder = folder
        self._samples = list[NDArray[Any]]()
        self._places = list[str]()
        self._tokens = (folder / "tokens.bin").open("wb")
        self._trained = (folder / "trained.bin").open("wb")
        self._weights = (folder / "weights.bin").open("wb")
        self._digests = [hashlib.sha256() for _ in range(3)]
        self._of_weights = hashlib.sha256()

    def append(
        self, batch: TokenizedChats, full: NDArray[np.int64], rows: Sequence[ChatRow]
    ) -> None:
        """Write tokenized conversations.

        Args:
            batch: N of them.
            full: [N] tokens before they were cut.
            rows: N, where they come from.
        """
        samples = np.zeros(len(rows), SAMPLE)
        samples["length"] = batch.lengths
        samples["labelled"] = batch.labelled
        samples["full"] = full
        samples["source"] = [row.source for row in rows]
        samples["row"] = [row.row for row in rows]
        samples["group"] = np.array([row.group for row in rows], dtype=np.uint64)
        samples["wanted"] = [row.wanted for row in rows]
        samples["weight"] = [row.weight for row in rows]
        if batch.weights is not None:
            for sample, tokens in zip(samples, batch.split(), strict=True):
                own = tokens.weights
                if own is not None and np.any(own != 1):
                    sample["uneven"] = True
                    self._weights.write(own.data)
                    self._of_weights.update(own.data)
        for digest, values in zip(
            self._digests, (batch.ids, batch.trained, samples["length"]), strict=True
        ):
            digest.update(np.ascontiguousarray(values).data)
        self._tokens.write(batch.ids.data)
        self._trained.write(batch.trained.data)
        self._samples.append(samples)
        self._places += [row.where for row in rows]

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in (self._tokens, self._trained, self._weights):
            file.close()
        if kind is None:
            self._finish()

    def _finish(self) -> None:
        samples = np.concatenate([np.zeros(0, SAMPLE), *self._samples])
        np.save(self._folder / "samples.npy", samples)
        np.save(self._folder / "lost.npy", np.array(self.lost, dtype=np.int32))
        whole = _whole_hash([*self._digests, self._of_weights], samples)
        meta = {
            "tokens": int(samples["length"].sum(dtype=np.int64)),
            "rows": self.rows,
            "digest": whole.hexdigest()[:16],
            "findings": self.findings.to_json(),
        }
        (self._folder / "places.json").write_text(json.dumps(self._places), "utf-8")
        (self._folder / "meta.json").write_text(json.dumps(meta), "utf-8")


OF_TOKENS = ("tokens.bin", "trained.bin", "weights.bin")
"""What has a value for each token."""

_INTACT = set[tuple[object, ...]]()
"""Stores whose bytes this process has looked at."""


def _whole_hash(digests: Sequence["hashlib._Hash"], samples: NDArray[Any]) -> "hashlib._Hash":
    """Return the hash of ids, labels, lengths and, where there are any, weights."""
    *digests, of_weights = digests
    if _are_weighted(samples):
        of_rows = hashlib.sha256(np.ascontiguousarray(samples["weight"]).data)
        digests = [*digests, of_weights, of_rows]
    return hashlib.sha256(b"".join(digest.digest() for digest in digests))


def _are_weighted(samples: NDArray[Any]) -> bool:
    return bool((samples["weight"] != 1).any() or samples["uneven"].any())


def _hash_of(file: int) -> "hashlib._Hash":
    digest, at = hashlib.sha256(), 0
    while block := os.pread(file, 1 << 22, at):
        digest.update(block)
        at += len(block)
    return digest


@dataclass(eq=False)
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
    temporary: "tempfile.TemporaryDirectory[str] | None" = None
    """The folder, where it goes with the store."""

    @classmethod
    def open(cls, folder: Path) -> "Store | None":
        """Open a store; None if it is not there or not whole."""
        try:
            meta = json.loads((folder / "meta.json").read_text("utf-8"))
            samples = np.load(folder / "samples.npy", allow_pickle=False)
            lost = np.load(folder / "lost.npy", allow_pickle=False)
            sizes = [(folder / name).stat().st_size for name in OF_TOKENS]
            tokens, rows, digest = meta["tokens"], meta["rows"], meta["digest"]
            findings = Findings.from_json(meta["findings"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if samples.dtype != SAMPLE:
            return None
        uneven = int(samples["length"][samples["uneven"]].sum(dtype=np.int64))
        if sizes != [4 * tokens, tokens, 4 * uneven]:
            return None
        if int(samples["length"].sum(dtype=np.int64)) != tokens:
            return None
        store = cls(folder, samples, rows, digest, findings, lost)
        _ = store._files  # Opened files stay readable if the folder is removed
        return store

    def read(self, index: int) -> Tokens:
        """Read one sample."""
        start = int(self._starts[index])
        length = int(self.samples["length"][index])
        # Not mapped: pages that were read once would count as memory of this process
        tokens, trained, _ = self._files
        ids = np.frombuffer(os.pread(tokens, 4 * length, 4 * start), np.int32)
        is_trained = np.frombuffer(os.pread(trained, length, start), np.bool_)
        return Tokens(ids, is_trained, self._weights_of(index))

    @cached_property
    def is_weighted(self) -> bool:
        """Whether the loss counts some tokens more than others."""
        return _are_weighted(self.samples)

    def _weights_of(self, index: int) -> NDArray[np.float32] | None:
        """Return how much the loss counts each token of a sample; None: nothing has weights."""
        if not self.is_weighted:
            return None
        length, weight = (self.samples[name][index] for name in ("length", "weight"))
        if not self.samples["uneven"][index]:
            return np.full(length, weight, np.float32)
        start = int(self._uneven_starts[index])
        read = os.pread(self._files[2], 4 * int(length), 4 * start)
        weights: NDArray[np.float32] = np.frombuffer(read, np.float32) * weight
        return weights

    def lacking(self, ids: Iterable[int]) -> list[int]:
        """Return which of these tokens no sample has; reads on until all are found."""
        left, at, (tokens, *_) = [*ids], 0, self._files
        while left and (block := os.pread(tokens, 1 << 22, at)):
            some = np.frombuffer(block, np.int32)
            left = [number for number in left if not (some == number).any()]
            at += len(block)
        return left

    def is_intact(self) -> bool:
        """Whether tokens and labels have the hash that they were written with.

        Reads them all at some 1 GB a second, once in a process.
        """
        files = self._files
        state = (self.digest, *(os.fstat(file).st_mtime_ns for file in files))
        if state in _INTACT:
            return True
        lengths = hashlib.sha256(np.ascontiguousarray(self.samples["length"]).data)
        of_ids, of_trained, of_weights = map(_hash_of, files)
        whole = _whole_hash([of_ids, of_trained, lengths, of_weights], self.samples)
        if whole.hexdigest()[:16] != self.digest:
            return False
        _INTACT.add(state)
        return True

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
    def _uneven_starts(self) -> NDArray[np.int64]:
        lengths = np.where(self.samples["uneven"], self.samples["length"], 0).astype(np.int64)
        starts: NDArray[np.int64] = np.cumsum(lengths) - lengths
        return starts

    @cached_property
    def _files(self) -> tuple[int, ...]:
        with self._present():
            return tuple(os.open(self.folder / name, os.O_RDONLY) for name in OF_TOKENS)

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
        state = {name: value for name, value in self.__dict__.items() if name != "_files"}
        return {**state, "temporary": None}

    def __del__(self) -> None:
        with suppress(OSError, TypeError):  # os may be gone when Python ends
            for file in self.__dict__.get("_files", ()):
                os.close(file)


# Stores are kept, by a hash of everything they depend on
#
# Nothing is ever looked up by a name or a date, so an edited file, template or program gives
# another key. A folder is written beside its final name and renamed when it is whole: a killed run
# leaves nothing that would be taken for data, and what it leaves goes when something is written.

CACHE_VARIABLE = "PHI3_PLUGIN_CACHE"
"""Environment variable that names another folder."""

KEPT_DAYS = 30
"""What nobody opened for so long is removed when something new is written."""


def cached(
    cache_dir: str | Path | None,
    settings: Mapping[str, Any] | None,
    write: Callable[[StoreWriter], None],
) -> Store:
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
        # Whole or not there, so read without a lock: in a shared folder that may be another user's
        kept = None if settings is None else Store.open(_folder(cache_dir) / key)
        if kept is None:
            if settings is None or (folder := _writable(cache_dir)) is None:
                temporary = tempfile.TemporaryDirectory(prefix="phi3_plugin-")
                with StoreWriter(Path(temporary.name)) as writer:
                    write(writer)
                store = _reopened(Path(temporary.name))
                store.temporary = temporary
                return store
            with FileLock(folder / f"{key}.lock"):
                kept = Store.open(folder / key)
                if kept is None:
                    return _write_whole(folder / key, write)
        folder = kept.folder.parent
        with suppress(PermissionError):  # another user's, who decides how long it is kept
            os.utime(kept.folder)
        if kept.is_intact():  # others need not wait for it
            return kept
        with FileLock(folder / f"{key}.lock"):
            kept = Store.open(folder / key)
            if kept is None or not kept.is_intact():
                message = f"{folder / key} has changed since it was written: the data is read again"
                log_rank_zero(logger, message, logging.WARNING)
                return _write_whole(folder / key, write)
            return kept
    except Phi3Error:
        raise
    except OSError as error:
        raise OutputError(
            f"The tokenized data cannot be written to {error.filename or folder}: "
            f"{error.strerror or error}. Make room, or name another folder with dataset.cache_dir "
            f"or the environment variable {CACHE_VARIABLE}."
        ) from error


def default_folder() -> Path:
    """Return where stores are kept unless another folder is named."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE_VARIABLE) or Path(home) / "phi3_plugin")


def _folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else default_folder()


def _writable(cache_dir: str | Path | None) -> Path | None:
    folder = _folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if cache_dir:
            raise
        message = f"tokenized data is not kept: {folder} cannot be written to ({error.strerror})"
        log_rank_zero(logger, message, logging.WARNING)
        return None
    return folder


def _write_whole(folder: Path, write: Callable[[StoreWriter], None]) -> Store:
    """Write a store beside its folder, and give it that name when it is whole."""
    shutil.rmtree(folder, ignore_errors=True)  # broken, or it would have been opened
    _remove_unfinished(folder)
    _remove_old(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}-unfinished")
    unfinished.mkdir()
    try:
        with StoreWriter(unfinished) as writer:
            write(writer)
        return _reopened(unfinished.rename(folder))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _reopened(folder: Path) -> Store:
    store = Store.open(folder)
    if store is None:
        raise DataError(f"{folder} was changed while it was written. Run the command again.")
    return store


def _remove_unfinished(mine: Path) -> None:
    """Remove what killed runs left: who holds the lock of a key is the only one that writes it."""
    for left in mine.parent.glob("*-unfinished"):
        key = left.name.partition(".")[0]
        if key == mine.name:  # this process holds the lock
            shutil.rmtree(left, ignore_errors=True)
            continue
        with suppress(OSError), FileLock(mine.with_name(f"{key}.lock"), timeout=0):
            shutil.rmtree(left, ignore_errors=True)  # a lock that others hold raises an OSError


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
