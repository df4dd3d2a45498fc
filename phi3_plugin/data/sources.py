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

import jinja2
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.data.formats import check_format, check_length, check_switch, check_text, kind
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

TRAIN = "train"
"""The split that is read where none is chosen."""

UNSET = (
    "Give a .json, .jsonl, .csv, .arrow or .parquet file, a folder of them, a glob or the name of "
    "a data set on the Hugging Face hub, as in dataset.source=data/train.jsonl"
)


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read; :class:`Filtered` if it is not wanted."""


class Filtered(DataError):
    """A row does not pass the filter."""


class FilterFailed(DataError):
    """It cannot be said whether a row passes a filter."""


@dataclass(frozen=True)
class Source:
    """One source of rows, checked. In a configuration ``name`` is called ``source``."""

    name: str
    """A file of one of :data:`SUFFIXES`, a folder of them, a glob, or a name on the Hugging Face
    hub. What exists locally is local."""
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

    def rows(self) -> Iterator[Row]:
        """Read the rows as a stream.

        Raises:
            DataError: The source cannot be read at all or not to its end, or there are no rows,
                or none passes the filter.
        """
        passes = None if self.filter is None else compile_filter(self.filter)
        row, passed, taken = None, 0, 0
        for row in self._hub_rows() if self.files is None else self._file_rows(self.files):
            if passes is not None and isinstance(row.value, dict):
                try:
                    if not passes(row.value):
                        yield Row(row.where, Filtered())
                        continue
                except FilterFailed as error:
                    row = Row(row.where, error)
            yield row
            passed += 1
            taken += isinstance(row.value, dict)  # A row that cannot be read is no sample
            if taken == self.max_samples:
                return
        if row is None:
            raise DataError(f"dataset.source: {self.name} has no rows.")
        if not passed:
            raise DataError(
                f"dataset.source: no row of {self.name} passes the filter {self.filter!r}."
            )

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

    def _file_rows(self, files: Iterable[Path]) -> Iterator[Row]:
        return chain.from_iterable(map(file_rows, files))

    def _hub_rows(self) -> Iterator[Row]:
        try:
            for i, row in enumerate(self._hub):
                yield Row(f"{self.name}[{i}]", _as_row(without_added(row)))
        except DataError:
            raise
        except Exception as error:  # Network, disk, …: each raises its own kind
            raise DataError(self._no_hub("read to its end", error)) from error

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


def read_sources(source: object, **common: Any) -> list[Source]:
    """Check what ``dataset.source`` says, and find the local files.

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
    problems, described = _wrong_options("dataset", common), list[dict[str, Any]]()
    for i, entry in enumerate(entries):
        key = f"dataset.source[{i}]" if listed else "dataset.source"
        if isinstance(entry, Mapping):
            problems += _wrong_name(f"{key}.source", entry.get("source"))
            problems += _wrong_options(key, {k: entry[k] for k in entry if k != "source"})
            own = dict(entry)
        else:
            problems += _wrong_name(key, entry)
            own = {"source": entry}
        # One way to read the rows goes before the other
        way = {"format": None, "columns": None} if own.keys() & {"format", "columns"} else {}
        described.append({**common, **way, **own})
    if problems:
        raise ConfigError("\n".join(problems))
    sources, wrong, missing = list[Source](), list[str](), list[str]()
    for options in described:
        name = str(options.pop("source"))
        if options.get("columns") is not None:
            options["columns"] = dict(options["columns"])
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


def _wrong_name(key: str, name: object) -> list[str]:
    if name and isinstance(name, str | Path):
        return []
    return [f"{key}: {name!r} must be a string. {UNSET}" if name else f"{key} is not set. {UNSET}"]


def _wrong_options(key: str, options: Mapping[str, Any]) -> list[str]:
    problems = []

    def check(problem: Callable[..., object], *values: Any) -> None:
        try:
            problem(*values)
        except ConfigError as error:
            problems.append(str(error))

    check(lambda: check_format(options.get("format"), options.get("columns"), key))
    for name, value in options.items():
        if name in CHECKS:
            check(CHECKS[name], f"{key}.{name}", value)
        elif name not in ("format", "columns"):
            known = ", ".join(["source", "format", "columns", *CHECKS])
            problems.append(f"{key}.{name} is unknown. Known keys: {known}.")
    return problems


def _check_weight(key: str, weight: object) -> None:
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not 0 < weight < math.inf:  # type: ignore[operator]
        raise ConfigError(
            f"{key}: {weight!r} must be a number above 0: how often an epoch sees each sample."
        )


def _check_filter(key: str, value: object) -> None:
    if value is not None:
        check_text(key, value)
        compile_filter(str(value), key)


CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "weight": _check_weight,
    "split": check_text,
    "subset": lambda key, value: None if value is None else check_text(key, value),
    "streaming": check_switch,
    "filter": _check_filter,
    "max_samples": check_length,
}
"""Options of a source beside how its rows are read."""


# Filters of rows, which run out of reach of everything but the row


def compile_filter(
    expression: str, key: str = "dataset.filter"
) -> Callable[[Mapping[str, Any]], bool]:
    """Read an expression over the columns of a row, such as ``lang == 'en' and rating >= 4``.

    Args:
        expression: Jinja, without braces; ``row`` is the whole row, for columns whose names are
            no words or are ``row``.
        key: Where it stands, for error messages.

    Returns:
        Whether it is true of a row; raises :class:`FilterFailed` where it cannot be said.

    Raises:
        ConfigError: It is no expression.
    """
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, extensions=[_SelfIsAColumn]
    )
    environment.globals.clear()
    try:
        compiled = environment.compile_expression(expression, undefined_to_none=False)
    except Exception as error:
        raise ConfigError(
            f"{key}: {expression!r} is no expression: {error}. Expected one over the columns of a "
            "row, as in lang == 'en' and rating >= 4."
        ) from error

    def passes(row: Mapping[str, Any]) -> bool:
        try:
            return bool(compiled({**row, "row": row}))
        except Exception as error:
            raise FilterFailed(f"{key} {expression!r} failed: {error}") from error

    return passes


class _SelfIsAColumn(Extension):
    """Reads ``self`` as a column; by itself Jinja takes it for the template that is run."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        before = ""
        for token in stream:
            if token.type == "name" and token.value == "self" and before != "dot":
                parts = (("name", "row"), ("dot", "."), ("name", "self"))
                yield from (Token(token.lineno, *part) for part in parts)
            else:
                yield token
            before = token.type


# The local files that a source names

SUFFIXES = (
    *(".json", ".jsonl", ".csv"),
    *(".json.gz", ".jsonl.gz", ".csv.gz"),
    *(".arrow", ".parquet"),
)
"""How a file's name tells what it holds, in upper or lower case."""

SUFFIXES_IN_WORDS = " or ".join([", ".join(SUFFIXES[:-1]), SUFFIXES[-1]])

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

SAVED_FILES = "state.json"
"""Names the files of a data set that ``datasets`` saved; caches beside them are no data."""

SAVED_SPLITS = "dataset_dict.json"
"""Names the splits of a saved data set that has several, each a folder."""


def suffix_of(name: str) -> str:
    """Return which of :data:`SUFFIXES` a name ends in, in whatever case; empty if in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


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
    if (path / SAVED_SPLITS).is_file():
        splits = _noted(path / SAVED_SPLITS, "splits")
        if split not in splits:
            raise ConfigError(
                f"{path} has no split {split!r}. It has: {', '.join(map(str, splits))}. Choose "
                "one with split."
            )
        return _files(str(path / split))
    files = _files(source)
    if files is not None and split != TRAIN:
        raise ConfigError(
            f"{source} is local and has no split {split!r}. Remove split, or set it for the "
            f"sources of the hub alone, as in {{source: gsm8k, split: {split}}}."
        )
    return files


def content_hash(files: Iterable[Path]) -> str:
    """Return a hash of what files hold, and of their names without folders.

    Raises:
        DataError: A file cannot be read.
    """
    whole = sha256()
    for file in files:
        digest = sha256()
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        except OSError as error:
            raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error
        named = f"{file.name}\n{digest.hexdigest()}\n"
        whole.update(named.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _files(source: str) -> tuple[Path, ...] | None:
    path = Path(source).expanduser()
    if path.is_file():
        return (path,)
    if path.is_dir():
        files = [file for file in path.iterdir() if suffix_of(file.name) and file.is_file()]
        files = _without_caches(path, files)
    elif set("*?[") & set(source):
        files = [file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()]
    elif HUB_NAME.fullmatch(source) and not suffix_of(source) and not _is_mistyped(source):
        return None
    else:
        raise MissingFileError(f"there is no file or folder {source}.")
    if not files:
        raise MissingFileError(f"{source} holds no file that ends in {SUFFIXES_IN_WORDS}.")
    return tuple(sorted(files))


def _is_mistyped(name: str) -> bool:
    # "data/train" beside a folder data is a mistyped path, not a user of the hub
    owner, slash, _ = name.partition("/")
    return bool(slash) and Path(owner).is_dir()


def _without_caches(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Leave out caches and notes, where ``datasets`` saved the folder."""
    tables = {file.name for file in files if file.suffix == ".arrow"}
    if not tables:
        return list(files)
    named = tables
    if (note := folder / SAVED_FILES).is_file():
        entries = _noted(note, "_data_files")
        names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
        named = {name for name in names if isinstance(name, str)}
        if len(named) < len(entries):
            raise _damaged(note, "a file has no name of its own")
        if lost := sorted(named - {file.name for file in files}):
            raise MissingFileError(f"{note} names {', '.join(lost)}, which is not there.")
    notes = {"dataset_info.json", SAVED_FILES, SAVED_SPLITS}
    return [file for file in files if file.name not in notes | (tables - named)]


def _noted(note: Path, key: str) -> list[Any]:
    try:
        value = json.loads(note.read_text("utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(note, repr(error)) from error
    if not isinstance(value, list):
        raise _damaged(note, f"{key} is no list")
    return value


def _damaged(note: Path, problem: str) -> DataError:
    return DataError(
        f"dataset.source: {note} cannot be read as datasets writes it: {problem}. Save the data "
        "again, or name its files in dataset.source."
    )


# The rows of one file


def file_rows(file: Path) -> Iterator[Row]:
    """Read the rows of a file; one that is broken by itself becomes an error in its place.

    Little more than one row is held at a time, however long the file is; only the text of a JSON
    list is held whole.

    Raises:
        DataError: The file cannot be read at all, or not from some place on.
    """
    suffix = suffix_of(file.name)
    if not suffix:
        raise DataError(f"dataset.source: {file} must end in {SUFFIXES_IN_WORDS}.")
    if suffix in (".parquet", ".arrow"):
        tables = _parquet_rows(file) if suffix == ".parquet" else _arrow_rows(file)
        return _indexed(file, map(without_added, tables))
    return _csv_rows(file) if suffix.startswith(".csv") else _json_rows(file)


def _as_row(value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict | DataError):
        return value
    return DataError(f"the row is {kind(value)}, expected an object")


def _indexed(file: Path, values: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"{file}[{i}]", _as_row(value)) for i, value in enumerate(values))


@contextmanager
def _opened(
    file: Path, newline: str | None = None, encoding: str = "utf-8-sig"
) -> Iterator[IO[str]]:
    packed = suffix_of(file.name).endswith(".gz")
    try:
        with (gzip.open if packed else open)(
            file, "rt", encoding=encoding, newline=newline
        ) as stream:
            yield stream
    except UnicodeDecodeError as error:
        if packed:
            # Damage shows only at the end, and may have made the bytes that are no text
            with _opened(file, encoding="latin-1") as stream:
                while stream.read(CHARACTERS_AT_ONCE):
                    pass
        wrong = f"{error.reason}, byte 0x{error.object[error.start]:02x}"
        raise DataError(
            f"dataset.source: {file} is not UTF-8 text: {wrong}. Save it as UTF-8."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"dataset.source: {file} is not a whole gzip file: {error}. Compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error


# JSON: one value a line, or the elements of one list

CHARACTERS_AT_ONCE = 1 << 16
"""Characters of a JSON file."""

EXPECTED_JSON = "Expected one list of objects, or one object a line."

SPACE = re.compile(r"[ \t\n\r]*")


def _json_rows(file: Path) -> Iterator[Row]:
    # A list is told from lines by its bracket: many .json files are JSON lines
    with _opened(file) as stream:
        head = stream.read(CHARACTERS_AT_ONCE).lstrip()
    listed = head.startswith("[")
    if not listed and is_spread(head):
        raise DataError(
            f"dataset.source: {file}: an object is written over several lines. {EXPECTED_JSON}"
        )
    with _opened(file) as stream:
        if not listed:
            for line, value in lines(stream):
                yield Row(f"{file}:{line}", _as_row(value))
            return
        text = stream.read()
    try:
        yield from _indexed(file, elements(text))
    except json.JSONDecodeError as error:
        raise DataError(
            f"dataset.source: {file} is broken JSON: {error.msg} (line {error.lineno}). "
            f"{EXPECTED_JSON}"
        ) from error


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
    at = _after_space(text, text.index("[") + 1)
    more = not text.startswith("]", at)
    while more:
        try:
            _, end = SKIPPER.raw_decode(text, at)
        except RecursionError as error:
            raise json.JSONDecodeError("nested too deeply", text, at) from error
        # By itself, so that a key that is there twice is an error of this row and not of the file
        yield _value(text[at:end])
        at = _after_space(text, end)
        more = text.startswith(",", at)
        at = _after_space(text, at + 1) if more else at
    if not text.startswith("]", at):
        raise json.JSONDecodeError("Expecting ','", text, at)
    if (at := _after_space(text, at + 1)) < len(text):
        raise json.JSONDecodeError("Extra data after the list", text, at)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return values


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


def _after_space(text: str, at: int) -> int:
    space = SPACE.match(text, at)
    assert space is not None  # It matches the empty text too
    return space.end()


# Tables: CSV, Parquet and the Arrow files of ``datasets``

ROWS_AT_ONCE = 256
"""Rows of a table."""

LONGEST_CELL = 2**31 - 1
"""Characters that a cell may have; by itself Python allows less than a long conversation takes."""

SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""What some programs put between cells instead of commas, and how to call it."""

LOOSE = frozenset({"tools", "tool_calls", "arguments"})
"""Fields within which each row has keys of its own."""


def _csv_rows(file: Path) -> Iterator[Row]:
    """Return each row that is not blank, and the line it starts in."""
    with _opened(file, newline="") as stream:
        rows = _csv_cells(stream, file)
        _, header = next(rows, (1, []))
        _check_header(header, file)
        if len(header) == 1 and (marks := [mark for mark in SEPARATORS if mark in header[0]]):
            raise DataError(
                f"dataset.source: {file}: cells must be separated by commas, not by "
                f"{SEPARATORS[marks[0]]}. Write it again with commas."
            )
        for line, cells in rows:
            row: dict[str, Any] | DataError = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                row = DataError(f"the row has {len(cells)} cells, the header has {len(header)}")
            yield Row(f"{file}:{line}", row)


def _csv_cells(stream: IO[str], file: Path) -> Iterator[tuple[int, list[str]]]:
    # Not pyarrow's reader: it guesses types, and the answer 007 would be learned as 7
    reader, line = csv.reader(stream, strict=True), 1
    while True:
        rows = list[tuple[int, list[str]]]()
        usual = csv.field_size_limit(LONGEST_CELL)  # Of the whole process, so not for longer
        try:
            for cells in islice(reader, ROWS_AT_ONCE):
                rows.append((line, cells))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"dataset.source: {file}:{line} is broken CSV: {error}. Expected commas between "
                'cells, and quotes around a cell that holds commas, quotes (as "") or line ends.'
            ) from error
        finally:
            csv.field_size_limit(usual)
        if not rows:
            return
        yield from ((line, cells) for line, cells in rows if cells)


def _check_header(names: Sequence[str], file: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"dataset.source: {file}: the header names {', '.join(twice)} more than once. Rename "
            "the columns."
        )


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    with _reading(file, "Parquet"):
        # Heavy, and only these files need it
        from pyarrow import parquet  # type: ignore[import-untyped]

        with parquet.ParquetFile(file) as table:
            _check_header(table.schema_arrow.names, file)
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from batch.to_pylist()


def _arrow_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read an Arrow file, in its file form or the stream form, which ``datasets`` writes."""
    with _reading(file, "Arrow"):
        import pyarrow

        with file.open("rb") as opened:
            is_file = opened.read(6) == b"ARROW1"
        with pyarrow.memory_map(str(file)) as mapped:
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped)
            _check_header(reader.schema.names, file)
            count = reader.num_record_batches if is_file else 0
            for batch in map(reader.get_batch, range(count)) if is_file else reader:
                # What a damaged file says about its own lengths would be believed
                batch.validate(full=True)
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield from batch.slice(start, ROWS_AT_ONCE).to_pylist()


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
    return {key: _filled(field) for key, field in value.items() if field is not None}
