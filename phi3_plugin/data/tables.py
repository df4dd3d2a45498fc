"""Rows of tables, a batch at a time: CSV, Parquet and the Arrow files of ``datasets``."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any

from phi3_plugin.errors import DataError

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
