"""The rows of a file: JSON, JSON lines, CSV, Parquet and the Arrow files of ``datasets``.

`READERS`, at the end, says how each kind of file is read, by what its name ends in.
"""

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.data.formats import kind
from phi3_plugin.errors import DataError


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read."""


Placed = Iterator[tuple[str, Any]]
"""What a reader yields: ``:line`` or ``[index]``, and the row, or why it cannot be read."""


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
    return (make_row(f"{file}{place}", value) for place, value in READERS[suffix](file))


def make_row(where: str, value: Any) -> Row:
    """Return a row, or that it is none: an object of JSON, or why there is none."""
    if not isinstance(value, dict | DataError):
        value = DataError(f"the row is {kind(value)}, expected an object")
    return Row(where, value)


def suffix_of(name: str) -> str:
    """Return which of `SUFFIXES` a name ends in, in whatever case; empty if in none."""
    lower = name.lower()
    return next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), "")


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
"""Characters of a JSON file that are read at once."""

EXPECTED_JSON = "Expected one list of objects, or one object a line."

SPACE = re.compile(r"[ \t\n\r]*")


def _json_rows(file: Path) -> Placed:
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
                yield f":{line}", value
            return
        text = stream.read()
    try:
        for i, value in enumerate(elements(text)):
            yield f"[{i}]", value
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
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
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
"""Rows of a table that are read at once."""

LONGEST_CELL = 2**31 - 1
"""Characters that a cell may have; by itself Python allows less than a long conversation takes."""

SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}
"""What some programs put between cells instead of commas, and how to call it."""

LOOSE = frozenset({"tools", "tool_calls", "arguments"})
"""Fields within which each row has keys of its own."""


def _csv_rows(file: Path) -> Placed:
    """Yield the line that each row starts in, and the row, unless it is blank."""
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
            yield f":{line}", row


def _csv_cells(stream: IO[str], file: Path) -> Iterator[tuple[int, list[str]]]:
    # Not pyarrow's reader: it guesses types, and the answer 007 would be learned as 7
    reader = csv.reader(stream, strict=True)
    line = 1
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
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        named = ", ".join(twice[:5]) + (f" and {len(twice) - 5} others" if len(twice) > 5 else "")
        raise DataError(
            f"dataset.source: {file}: the header names {named} more than once. Rename the columns."
        )


def _parquet_rows(file: Path) -> Placed:
    with _reading(file, "Parquet"):
        # Heavy, and only these files need it
        from pyarrow import parquet  # type: ignore[import-untyped]

        with parquet.ParquetFile(file) as table:
            _check_header(table.schema_arrow.names, file)
            yield from _table_rows(table.iter_batches(batch_size=ROWS_AT_ONCE))


def _arrow_rows(file: Path) -> Placed:
    """Read an Arrow file, in its file form or the stream form, which ``datasets`` writes."""
    with _reading(file, "Arrow"):
        import pyarrow

        with file.open("rb") as opened:
            is_file = opened.read(6) == b"ARROW1"
        with pyarrow.memory_map(str(file)) as mapped:
            reader = (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(mapped)
            _check_header(reader.schema.names, file)
            count = reader.num_record_batches if is_file else 0
            batches = map(reader.get_batch, range(count)) if is_file else reader
            yield from _table_rows(chain.from_iterable(map(_slices, batches)))


def _slices(batch: Any) -> Iterator[Any]:
    # What a damaged file says about its own lengths would be believed
    batch.validate(full=True)
    return (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))


def _table_rows(batches: Iterable[Any]) -> Placed:
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((f"[{i}]", without_added(row)) for i, row in enumerate(rows))


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
    return {k: _without_nulls(v) if k in LOOSE else without_added(v) for k, v in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(element) for element in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(field) for key, field in value.items() if field is not None}


READERS: Mapping[str, Callable[[Path], Placed]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".json.gz": _json_rows,
    ".jsonl.gz": _json_rows,
    ".csv.gz": _csv_rows,
    ".arrow": _arrow_rows,
    ".parquet": _parquet_rows,
}
"""What reads a file, by what its name ends in, in upper or lower case."""

SUFFIXES = tuple(READERS)
SUFFIXES_IN_WORDS = " or ".join([", ".join(SUFFIXES[:-1]), SUFFIXES[-1]])
