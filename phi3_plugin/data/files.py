"""Rows of one local file: JSON, JSON lines, CSV or Parquet."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phi3_plugin.data.turns import kind
from phi3_plugin.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
"""How a file's name tells what it holds."""

KINDS = " or ".join([", ".join(SUFFIXES[:-1]), SUFFIXES[-1]])


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read."""


def file_rows(file: Path) -> Iterable[Row]:
    """Read the rows of a file; one that is broken by itself becomes an error in its place.

    Raises:
        DataError: The file cannot be read at all.
    """
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"dataset.source: {file} must end in {KINDS}.")
    if file.suffix == ".parquet":
        return _indexed(file, _parquet_rows(file))
    text = _read_text(file)
    if file.name.removesuffix(".gz").endswith(".csv"):
        return _csv_rows(text, file)
    # A list is told from lines by its bracket: many .json files are JSON lines
    return _indexed(file, _list(text, file)) if re.match(r"\s*\[", text) else _lines(text, file)


def as_row(value: Any) -> dict[str, Any] | DataError:
    """Return the value, or an error if it is no object."""
    if isinstance(value, dict):
        return value
    return DataError(f"the row is {kind(value)}, expected an object")


def _indexed(file: Path, values: Iterable[Any]) -> Iterator[Row]:
    return (Row(f"{file}[{i}]", as_row(value)) for i, value in enumerate(values))


def _read_text(file: Path) -> str:
    content = file.read_bytes()
    try:
        return (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.source: {file} is not UTF-8 text: {error}.") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"dataset.source: {file} is not a whole gzip file: {error}. Compress it again."
        ) from error


def _list(text: str, file: Path) -> list[Any]:
    try:
        values: list[Any] = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"dataset.source: {file} is broken JSON: {error}. Expected one list of objects, "
            "or one object a line."
        ) from error
    return values


def _lines(text: str, file: Path) -> Iterator[Row]:
    # str.splitlines would break at U+2028 and the like, which JSON may hold as they are
    lines = enumerate(io.StringIO(text, newline=None), 1)
    return (Row(f"{file}:{n}", _line(line)) for n, line in lines if line.strip())


def _line(line: str) -> dict[str, Any] | DataError:
    try:
        return as_row(json.loads(line))
    except ValueError as error:
        return DataError(f"broken JSON: {error}")


def _csv_rows(text: str, file: Path) -> Iterator[Row]:
    (_, header), *rows = _csv_cells(text, file) or [(1, [])]
    _check_header(header, file)
    return (Row(f"{file}:{line}", _csv_row(header, cells)) for line, cells in rows)


def _check_header(names: Sequence[str], file: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"dataset.source: {file}: the header names {', '.join(twice)} more than once. Rename "
            "the columns."
        )


def _csv_cells(text: str, file: Path) -> list[tuple[int, list[str]]]:
    """Return the cells of each row that is not blank, and the line it starts in."""
    # Not pyarrow's reader: it guesses types, and the answer 007 would be learned as 7
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(len(text) + 1)  # Less than a long conversation takes
    rows, line = [], 1
    try:
        for cells in reader:
            rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"dataset.source: {file}:{line} is broken CSV: {error}. Expected commas between "
            'cells, and quotes around a cell that holds commas, quotes (as "") or line ends.'
        ) from error
    finally:
        csv.field_size_limit(usual)
    return [(line, cells) for line, cells in rows if cells]


def _csv_row(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | DataError:
    if len(cells) == len(header):
        return dict(zip(header, cells, strict=True))
    return DataError(f"the row has {len(cells)} cells, the header has {len(header)}")


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    # Heavy, and only these files need it
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            table = opened.read()
        rows: list[dict[str, Any]] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"dataset.source: {file} cannot be read as Parquet: {error}. Write it again."
        ) from error
    _check_header(table.column_names, file)
    return rows
