"""Tokenized conversations on disk: written once, read one by one, never held whole in memory.

tokens.bin    int32   ids of all samples, one after the other
trained.bin   bool    whether each is trained on
samples.npy           one entry a sample, see SAMPLE
lost.npy      int32   tokens of each conversation that was dropped for its length
places.json           where each sample was read
meta.json             what was noticed, and a hash of all tokens; written last
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phi3_plugin.data.encoder import Batch, Tokens
from phi3_plugin.data.findings import Findings
from phi3_plugin.errors import OutputError

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
