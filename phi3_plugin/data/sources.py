"""Where rows come from: local files, or data sets of the hub, each with its own options."""

import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from glob import glob
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.data.formats import check_format, check_length, check_switch, check_text, kind
from phi3_plugin.data.template import FilterFailed, compile_filter
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

# Values of a JSON text: one a line, or the elements of one list.

SPACE = re.compile(r"[ \t\n\r]*")


def is_spread(text: str) -> bool:
    """Whether the first value is written over several lines, as by a pretty-printer.

    Args:
        text: The beginning of a file, without space before it.
    """
    try:
        _, end = SKIPPER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def lines(stream: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Return each line that is not blank: its number, and its value or why there is none."""
    # The stream breaks lines at \n, \r\n and \r. str.splitlines would break at U+2028 and the
    # like, which JSON may hold as they are
    return ((n, _value(line)) for n, line in enumerate(stream, 1) if not line.isspace())


def elements(text: str) -> Iterator[Any]:
    """Return the elements of a list: each its value, or why there is none.

    Raises:
        json.JSONDecodeError: The list is broken.
    """
    at = _after(text, text.index("[") + 1)
    if not text.startswith("]", at):
        value, at = _element(text, at)
        yield value
        while text.startswith(",", at):
            value, at = _element(text, _after(text, at + 1))
            yield value
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ','", text, at)
    if (at := _after(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, at)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)

SKIPPER = json.JSONDecoder(parse_int=len)
"""Finds where a value ends, also one that JSON allows and :data:`DECODER` does not."""


def _value(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except ValueError as error:
        return DataError(f"broken JSON: {error}")
    except RecursionError:
        return DataError("broken JSON: nested too deeply")


def _element(text: str, at: int) -> tuple[Any, int]:
    """Return the value at a place, or why there is none, and the place of what comes next."""
    try:
        _, end = SKIPPER.raw_decode(text, at)
    except RecursionError as error:
        raise json.JSONDecodeError("nested too deeply", text, at) from error
    # By itself, so that a key that is there twice is an error of this row and not of the file
    return _value(text[at:end]), _after(text, end)


def _after(text: str, at: int) -> int:
    """Return the next place that is no space."""
    space = SPACE.match(text, at)
    assert space is not None  # It matches the empty text too
    return space.end()


# Rows of tables, a batch at a time: CSV, Parquet and the Arrow files of ``datasets``.

BATCH = 256
"""Rows read at once."""

LONGEST = 2**31 - 1
"""Characters that a cell may have; by itself Python allows less than a long conversation takes."""

ARROW = b"ARROW1"
"""How the file form of Arrow begins; the stream form, which ``datasets`` writes, does not."""


OTHERS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""What some programs put between cells instead of commas, and how to call it."""

LOOSE = frozenset({"tools", "tool_calls", "arguments"})
"""Fields within which each row has keys of its own."""


def csv_rows(stream: IO[str], file: Path) -> Iterator[tuple[int, dict[str, Any] | DataError]]:
    """Return each row that is not blank, and the line it starts in.

    Raises:
        DataError: The header or the quotes are broken, or no commas are between cells.
    """
    rows = _csv_cells(stream, file)
    _, header = next(rows, (1, []))
    _check_header(header, file)
    _check_commas(header, file)
    return ((line, _csv_row(header, cells)) for line, cells in rows)


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of a Parquet file.

    Raises:
        DataError: The file is damaged, or names a column twice.
    """
    with _reading(file, "Parquet"):
        # Heavy, and only these files need it
        from pyarrow import parquet  # type: ignore[import-untyped]

        with parquet.ParquetFile(file) as opened:
            _check_header(opened.schema_arrow.names, file)
            for batch in opened.iter_batches(batch_size=BATCH):
                yield from batch.to_pylist()


def arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Return the rows of an Arrow file, in its file form or its stream form.

    Raises:
        DataError: The file is damaged, or names a column twice.
    """
    with _reading(file, "Arrow"):
        import pyarrow

        with file.open("rb") as opened:
            is_file = opened.read(len(ARROW)) == ARROW
        with pyarrow.memory_map(str(file)) as mapped:
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped)
            _check_header(reader.schema.names, file)
            count = reader.num_record_batches if is_file else 0
            for batch in map(reader.get_batch, range(count)) if is_file else reader:
                yield from _slices(batch)


def without_added(row: Any) -> Any:
    """Return a row without the nulls that Arrow puts into calls and descriptions of tools.

    In a table the structs of all rows have the same keys: ``{"a": 1}`` becomes
    ``{"a": 1, "b": None}`` where another row has a ``b``. Nulls that were there before cannot be
    told from those.
    """
    if isinstance(row, list):
        return [without_added(value) for value in row]
    if not isinstance(row, dict):
        return row
    return {k: _filled(v) if k in LOOSE else without_added(v) for k, v in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, list):
        return [_filled(element) for element in value]
    if not isinstance(value, dict):
        return value
    return {key: _filled(found) for key, found in value.items() if found is not None}


def _slices(batch: Any) -> Iterator[dict[str, Any]]:
    # What a damaged file says about its own lengths would be believed
    batch.validate(full=True)
    for start in range(0, batch.num_rows, BATCH):
        yield from batch.slice(start, BATCH).to_pylist()


@contextmanager
def _reading(file: Path, form: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"dataset.source: {file} cannot be read as {form}: {error}. Write it again."
        ) from error


def _check_header(names: Sequence[str], file: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"dataset.source: {file}: the header names {', '.join(twice)} more than once. Rename "
            "the columns."
        )


def _check_commas(names: Sequence[str], file: Path) -> None:
    found = [OTHERS[mark] for mark in OTHERS if len(names) == 1 and mark in names[0]]
    if found:
        raise DataError(
            f"dataset.source: {file}: cells must be separated by commas, not by {found[0]}. Write "
            "it again with commas."
        )


def _csv_cells(stream: IO[str], file: Path) -> Iterator[tuple[int, list[str]]]:
    # Not pyarrow's reader: it guesses types, and the answer 007 would be learned as 7
    reader = csv.reader(stream, strict=True)
    line = 1
    while True:
        rows = list[tuple[int, list[str]]]()
        usual = csv.field_size_limit(LONGEST)  # Of the whole process, so not for longer
        try:
            for cells in islice(reader, BATCH):
                rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise _broken_csv(file, line, error) from error
        finally:
            csv.field_size_limit(usual)
        if not rows:
            return
        yield from ((line, cells) for line, cells in rows if cells)


def _broken_csv(file: Path, line: int, error: csv.Error) -> DataError:
    return DataError(
        f"dataset.source: {file}:{line} is broken CSV: {error}. Expected commas between "
        'cells, and quotes around a cell that holds commas, quotes (as "") or line ends.'
    )


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError(f"the row has {len(cells)} cells, the header has {len(header)}")


# Folders that ``datasets`` saved: which of their files hold rows.

STATE = "state.json"
"""Names the files of a saved data set; caches that lie beside them are no data."""

PARTS = "dataset_dict.json"
"""Names the splits of a data set that has several, each a folder."""

NOTES = {"dataset_info.json", STATE, PARTS}
"""What ``datasets`` writes beside the rows."""


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of one split of a data set that was saved with all its splits.

    Raises:
        ConfigError: It has no such split.
        DataError: The note that names the splits is damaged.
    """
    splits = _noted(folder / PARTS, "splits")
    if split not in splits:
        raise ConfigError(
            f"{folder} has no split {split!r}. It has: {', '.join(map(str, splits))}. Choose one "
            "with split."
        )
    return folder / split


def without_caches(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return those files of a folder that hold rows.

    Args:
        folder: Of any kind.
        files: All in it that end as files of rows do.

    Raises:
        MissingFileError: A file of a saved data set is not there.
        DataError: The note that names them is damaged.
    """
    tables = {file.name for file in files if file.suffix == ".arrow"}
    if not tables:
        return list(files)
    named = _named(folder / STATE) if (folder / STATE).is_file() else tables
    lost = sorted(named - {file.name for file in files})
    if lost:
        raise MissingFileError(f"{folder / STATE} names {', '.join(lost)}, which is not there.")
    passed_over = NOTES | (tables - named)
    return [file for file in files if file.name not in passed_over]


def _named(state: Path) -> set[str]:
    entries = _noted(state, "_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    found = {name for name in names if isinstance(name, str)}
    if len(found) < len(entries):
        raise _damaged(state, "a file has no name of its own")
    return found


def _noted(note: Path, key: str) -> list[Any]:
    try:
        found = json.loads(note.read_text("utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(note, repr(error)) from error
    if not isinstance(found, list):
        raise _damaged(note, f"{key} is no list")
    return found


def _damaged(note: Path, problem: str) -> DataError:
    return DataError(
        f"dataset.source: {note} cannot be read as datasets writes it: {problem}. Save the data "
        "again, or name its files in dataset.source."
    )


# Rows of one local file: JSON lines, CSV, Parquet and Arrow as a stream, a JSON list whole.

SUFFIXES = (
    *(".json", ".jsonl", ".csv"),
    *(".json.gz", ".jsonl.gz", ".csv.gz"),
    *(".arrow", ".parquet"),
)
"""How a file's name tells what it holds, in upper or lower case."""

EXPECTED_JSON = "Expected one list of objects, or one object a line."

BLOCK = 1 << 16
"""Characters read at once."""

KINDS = " or ".join([", ".join(SUFFIXES[:-1]), SUFFIXES[-1]])


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read."""


def suffix_of(name: str) -> str:
    """Return which of :data:`SUFFIXES` a name ends in, in whatever case; empty if in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


def file_rows(file: Path) -> Iterator[Row]:
    """Read the rows of a file; one that is broken by itself becomes an error in its place.

    Little more than one row is held at a time, however long the file is; only the text of a JSON
    list is held whole.

    Raises:
        DataError: The file cannot be read at all, or not from some place on.
    """
    suffix = suffix_of(file.name)
    if not suffix:
        raise DataError(f"dataset.source: {file} must end in {KINDS}.")
    if suffix == ".parquet":
        return _indexed(file, map(without_added, parquet_rows(file)))
    if suffix == ".arrow":
        return _indexed(file, map(without_added, arrow_rows(file)))
    if suffix.startswith(".csv"):
        return _csv(file)
    return _json(file)


def as_row(value: Any) -> dict[str, Any] | DataError:
    """Return the value, or an error if it is no object."""
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"the row is {kind(value)}, expected an object")


def _indexed(file: Path, values: Iterator[Any]) -> Iterator[Row]:
    return (Row(f"{file}[{i}]", as_row(value)) for i, value in enumerate(values))


def _csv(file: Path) -> Iterator[Row]:
    with _opened(file, newline="") as stream:
        for line, value in csv_rows(stream, file):
            yield Row(f"{file}:{line}", value)


def _json(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        head = stream.read(BLOCK).lstrip()
    # A list is told from lines by its bracket: many .json files are JSON lines
    if head.startswith("["):
        yield from _listed(file)
    elif is_spread(head):
        raise DataError(
            f"dataset.source: {file}: an object is written over several lines. {EXPECTED_JSON}"
        )
    else:
        yield from _lines(file)


def _listed(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        text = stream.read()
    try:
        yield from _indexed(file, elements(text))
    except json.JSONDecodeError as error:
        raise DataError(
            f"dataset.source: {file} is broken JSON: {error.msg} (line {error.lineno}). "
            f"{EXPECTED_JSON}"
        ) from error


def _lines(file: Path) -> Iterator[Row]:
    with _opened(file) as stream:
        for line, value in lines(stream):
            yield Row(f"{file}:{line}", as_row(value))


@contextmanager
def _opened(
    file: Path, newline: str | None = None, encoding: str = "utf-8-sig"
) -> Iterator[IO[str]]:
    opened = gzip.open if _is_packed(file) else open
    try:
        with opened(file, "rt", encoding=encoding, newline=newline) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise _not_text(file, error) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"dataset.source: {file} is not a whole gzip file: {error}. Compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error


def _is_packed(file: Path) -> bool:
    return suffix_of(file.name).endswith(".gz")


def _not_text(file: Path, error: UnicodeDecodeError) -> DataError:
    if _is_packed(file):
        # Damage shows only at the end, and may have made the bytes that are no text
        with _opened(file, encoding="latin-1") as stream:
            while stream.read(BLOCK):
                pass
    wrong = f"{error.reason}, byte 0x{error.object[error.start]:02x}"
    return DataError(f"dataset.source: {file} is not UTF-8 text: {wrong}. Save it as UTF-8.")


# Finds the local files that a source names.

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

TRAIN = "train"
"""The split that is read where none is chosen."""

HASHED_BLOCK = 1 << 20
"""Bytes read at once."""


def local_files(source: str, split: str = TRAIN) -> tuple[Path, ...] | None:
    """Return the files a source names, or None if it is the name of a hub data set.

    Args:
        source: A file, a folder, a glob or a name on the hub.
        split: Which folder of a data set that ``datasets`` saved with all its splits.

    Raises:
        ConfigError: The source is local and has no such split.
        MissingFileError: The source is a local path and there is nothing.
        DataError: The notes of a saved data set are damaged.
    """
    path = Path(source).expanduser()
    if (path / PARTS).is_file():
        return _files(str(split_folder(path, split)))
    files = _files(source)
    if files is not None and split != TRAIN:
        raise ConfigError(
            f"{source} is local and has no split {split!r}. Remove split, or set it for the "
            f"sources of the hub alone, as in {{source: gsm8k, split: {split}}}."
        )
    return files


def _files(source: str) -> tuple[Path, ...] | None:
    path = Path(source).expanduser()
    if path.is_file():
        return (path,)
    if path.is_dir():
        found = _in_folder(path)
    elif set("*?[") & set(source):
        found = [file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()]
    elif _is_hub_name(source):
        return None
    else:
        raise MissingFileError(f"there is no file or folder {source}.")
    if not found:
        raise MissingFileError(f"{source} holds no file that ends in {KINDS}.")
    return tuple(sorted(found))


def content_hash(files: Iterable[Path]) -> str:
    """Return a hash of what files hold, and of their names without folders.

    Raises:
        DataError: A file cannot be read.
    """
    whole = sha256()
    for file in files:
        try:
            name = f"{file.name}\n{_hash_of(file)}\n"
        except OSError as error:
            raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error
        whole.update(name.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _hash_of(file: Path) -> str:
    found = sha256()
    with file.open("rb") as stream:
        while block := stream.read(HASHED_BLOCK):
            found.update(block)
    return found.hexdigest()


def _in_folder(folder: Path) -> list[Path]:
    found = [file for file in folder.iterdir() if suffix_of(file.name) and file.is_file()]
    return without_caches(folder, found)


def _is_hub_name(source: str) -> bool:
    # "data/train" beside a folder data is a mistyped path, not a user of the hub
    owner, slash, _ = source.partition("/")
    is_name = HUB_NAME.fullmatch(source) and not suffix_of(source)
    return bool(is_name) and not (slash and Path(owner).is_dir())


# Checks of what a configuration says about one source of rows.

UNSET = (
    "Give a .json, .jsonl, .csv, .arrow or .parquet file, a folder of them, a glob or the name of "
    "a data set on the Hugging Face hub, as in dataset.source=data/train.jsonl"
)


def wrong_source(key: str, source: object) -> list[str]:
    """Return what is wrong with a source: a name, or a dictionary of options."""
    if not isinstance(source, Mapping):
        return _wrong_name(key, source)
    named = [] if "source" not in source else _wrong_name(f"{key}.source", source["source"])
    missing = [] if "source" in source else [f"{key}.source is not set. {UNSET}"]
    return [*missing, *named, *wrong_options(key, {k: source[k] for k in source if k != "source"})]


def wrong_options(key: str, options: Mapping[Any, Any]) -> list[str]:
    """Return what is wrong with options; ``key`` is where they stand."""
    problems = []
    if options.keys() & {"format", "columns"}:
        options = {**options, "format": (options.get("format"), options.get("columns"))}
    for name, value in options.items():
        try:
            _check(key, name, value)
        except ConfigError as error:
            problems.append(str(error))
    return problems


def _check(key: str, name: Any, value: Any) -> None:
    known = ("weight", "format", "columns", "split", "subset", "streaming", "filter", "max_samples")
    if name not in known:
        raise ConfigError(f"{key}.{name} is unknown. Known keys: source, {', '.join(known)}.")
    key_of_value = f"{key}.{name}"
    if name == "format":
        check_format(value[0], value[1], key)
    elif name == "weight":
        _check_weight(key_of_value, value)
    elif name == "max_samples":
        check_length(key_of_value, value)
    elif name == "streaming":
        check_switch(key_of_value, value)
    elif name == "split" or (name in ("subset", "filter") and value is not None):
        check_text(key_of_value, value)
        if name == "filter":
            compile_filter(value, key_of_value)


def _check_weight(key: str, weight: object) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"{key}: {weight!r} must be a number above 0: how often an epoch sees each sample."
        )


def _wrong_name(key: str, name: object) -> list[str]:
    if name and isinstance(name, str | Path):
        return []
    return [f"{key}: {name!r} must be a string. {UNSET}" if name else f"{key} is not set. {UNSET}"]


# Where rows come from: local files, or data sets of the hub, each with its own options.


@dataclass(frozen=True)
class Source:
    """One source of rows, checked. In a configuration ``name`` is called ``source``."""

    name: str
    """A file of one of :data:`phi3_plugin.data.sources.SUFFIXES`, a folder of them, a glob, or a
    name on the Hugging Face hub. What exists locally is local."""
    files: tuple[Path, ...] | None = None
    """The local files; None is the hub."""
    weight: float = 1.0
    """How often an epoch sees each sample, see :func:`phi3_plugin.data.order.repeats`."""
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
