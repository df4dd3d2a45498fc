"""Rows of one local file: JSON lines, CSV, Parquet and Arrow as a stream, a JSON list whole."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.data.json_files import elements, is_spread, lines
from phi3_plugin.data.tables import arrow_rows, csv_rows, parquet_rows, without_added
from phi3_plugin.data.turns import kind
from phi3_plugin.errors import DataError

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
