"""Where rows come from: local files, or data sets of the hub, each with its own options."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from phi3_plugin.data.files import Row, as_row, file_rows
from phi3_plugin.data.local_files import TRAIN, content_hash, local_files
from phi3_plugin.data.sandbox import FilterFailed, compile_filter
from phi3_plugin.data.source_options import UNSET, wrong_options, wrong_source
from phi3_plugin.data.tables import without_added
from phi3_plugin.errors import ConfigError, DataError, MissingFileError


@dataclass(frozen=True)
class Source:
    """One source of rows, checked. In a configuration ``name`` is called ``source``."""

    name: str
    """A file of one of :data:`phi3_plugin.data.files.SUFFIXES`, a folder of them, a glob, or a
    name on the Hugging Face hub. What exists locally is local."""
    files: tuple[Path, ...] | None = None
    """The local files; None is the hub."""
    weight: float = 1.0
    """How often an epoch sees each sample, see :func:`phi3_plugin.data.selection.repeats`."""
    format: str | None = None
    columns: Mapping[str, str] | None = None
    """As :func:`phi3_plugin.data.formats.pick_format` takes them."""
    split: str = TRAIN
    """Which part of a hub data set, or of one that ``datasets`` saved; local files have none."""
    subset: str | None = None
    """The configuration of a hub data set that has several."""
    streaming: bool = False
    """Read a hub data set without downloading it first; local files always are read so."""
    filter: str | None = None
    """Expression over a row's columns; rows for which it is not true are left out."""
    max_samples: int | None = None
    """Take the first so many rows, of those that pass the filter."""

    def rows(self, filtered: Callable[[str], object] | None = None) -> Iterator[Row]:
        """Read the rows as a stream.

        Args:
            filtered: Told the place of each row that the filter leaves out.

        Raises:
            DataError: The source cannot be read at all or not to its end, or there are no rows.
        """
        rows = iter(self._all())
        first = next(rows, None)
        if first is None:
            raise DataError(f"dataset.source: {self.name} has no rows.")
        rows = chain([first], rows)
        passing = rows if self.filter is None else self._passing(rows, self.filter, filtered)
        yield from passing if self.max_samples is None else _first(passing, self.max_samples)

    def fingerprint(self) -> str | None:
        """Return a hash of what is read; None if it cannot be known before reading it.

        Raises:
            DataError: The source cannot be read.
        """
        if self.files is not None:
            return content_hash(self.files)
        known = None if self.streaming else getattr(self._hub, "_fingerprint", None)
        if known is None:
            return None
        described = json.dumps([self.name, self.subset, self.split, known])
        return sha256(described.encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Return all that decides which rows are read, and how, as JSON values."""
        return {k: v for k, v in asdict(self).items() if k not in ("files", "weight")}

    def _all(self) -> Iterator[Row]:
        if self.files is not None:
            return chain.from_iterable(map(file_rows, self.files))
        return self._hub_rows()

    def _hub_rows(self) -> Iterator[Row]:
        rows = enumerate(iter(self._hub))
        while True:
            try:
                i, row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise DataError(self._no_hub("read to its end", error)) from error
            yield Row(f"{self.name}[{i}]", as_row(without_added(row)))

    @cached_property
    def _hub(self) -> Any:
        from datasets import load_dataset  # Takes a second to import, and local files do without

        options = {"streaming": True} if self.streaming else {}
        try:
            return load_dataset(self.name, self.subset, split=self.split, **options)
        except Exception as error:  # Network, permission, name, split: each raises its own kind
            raise DataError(self._no_hub("loaded", error)) from error

    def _no_hub(self, done: str, error: Exception) -> str:
        return (
            f"dataset.source: {self.name!r} is no local file and could not be {done} from the "
            f"Hugging Face hub (split {self.split!r}, subset {self.subset!r}): {error}"
        )

    def _passing(
        self, rows: Iterator[Row], filter: str, filtered: Callable[[str], object] | None
    ) -> Iterator[Row]:
        passes, kept = compile_filter(filter), 0
        for row in rows:
            try:
                passed = isinstance(row.value, DataError) or passes(row.value)
            except FilterFailed as error:
                row, passed = Row(row.where, error), True
            if passed:
                kept += 1
                yield row
            elif filtered is not None:
                filtered(row.where)
        if not kept:
            raise DataError(f"dataset.source: no row of {self.name} passes the filter {filter!r}.")


def read_sources(source: object, **common: Any) -> list[Source]:
    """Check what ``dataset.source`` says.

    Args:
        source: A name as in :class:`Source`, a dictionary of its fields, or a list of either.
        common: Fields of :class:`Source` for all; a dictionary's own go before them.

    Raises:
        ConfigError: No source is given, or options have values that they cannot have: all are
            named; or local sources do not have the split.
        MissingFileError: Sources are local paths and there is nothing.
        DataError: The notes of a saved data set are damaged.
    """
    listed = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
    entries: Sequence[Any] = source if listed else [source]  # type: ignore[assignment]
    problems = wrong_options("dataset", common)
    for i, entry in enumerate(entries):
        problems += wrong_source(f"dataset.source[{i}]" if listed else "dataset.source", entry)
    if problems:
        raise ConfigError("\n".join(problems))
    return _found([_options(entry, common) for entry in entries])


def read_rows(source: str | Path | None, *, split: str, subset: str | None) -> list[Row]:
    """Read all rows of one source; see :class:`Source`.

    Raises:
        ConfigError: No source is given, or an option is not text.
        MissingFileError: The source is a local path and there is nothing.
        DataError: A file or the hub data set cannot be read at all, or there are no rows.
    """
    if source and not isinstance(source, str | Path):
        raise ConfigError(f"dataset.source: {source!r} must be a string. {UNSET}")
    (only,) = read_sources(source, split=split, subset=subset)
    return list(only.rows())


def _first(rows: Iterator[Row], count: int) -> Iterator[Row]:
    for row in rows:
        yield row
        # A row that cannot be read is no sample
        count -= not isinstance(row.value, DataError)
        if not count:
            return


def _options(entry: Any, common: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(entry) if isinstance(entry, Mapping) else {"source": entry}
    # One way to read the rows goes before the other
    way = {"format": None, "columns": None} if own.keys() & {"format", "columns"} else {}
    options = {**common, **way, **own}
    if options.get("columns") is not None:
        options["columns"] = dict(options["columns"])
    return options


def _found(described: Sequence[dict[str, Any]]) -> list[Source]:
    sources, wrong, missing = list[Source](), list[str](), list[str]()
    for options in described:
        name = str(options.pop("source"))
        try:
            sources.append(Source(name, local_files(name, options.get("split", TRAIN)), **options))
        except MissingFileError as error:
            missing.append(f"dataset.source: {error}")
        except ConfigError as error:
            wrong.append(f"dataset.source: {error}")
    if wrong:
        raise ConfigError("\n".join([*wrong, *missing]))
    if missing:
        raise MissingFileError("\n".join(missing))
    return sources
