"""The rows of a file: JSON, JSON lines, CSV and TSV, Parquet and the Arrow files of ``datasets``.

`READERS`, at the end, says how each kind of file is read, by what its name ends in.
"""

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from phi3_plugin.data.turns import TRAIN_FLAGS, kind
from phi3_plugin.errors import DataError


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read."""


Placed = Iterator[tuple[str, Any]]
"""What a reader yields: ``:line`` or ``[index]``, and the row, or why it cannot be read."""


def file_rows(file: Path, column: str | None = None) -> Iterator[Row]:
    """Read the rows of a file; one that is broken by itself becomes an error in its place.

    Little more than one row is held at a time, however long the file is; only the text of a JSON
    list, or of a document, is held whole.

    Args:
        file: Where they are.
        column: Where the text of a file stands that is one document, see `DOCUMENTS`. None: such
            files hold no rows.

    Raises:
        DataError: The file cannot be read at all, or not from some place on.
    """
    documents = column is not None
    suffix = suffix_of(file.name, documents=documents)
    if not suffix:
        raise DataError(f"dataset.source: {file} must end in {suffixes_in_words(documents)}.")
    _refuse_other_content(file, suffix)
    if column is not None and suffix in DOCUMENTS:
        return iter([Row(str(file), _document(file, column))])
    return (make_row(f"{file}{place}", value) for place, value in READERS[suffix](file))


def make_row(where: str, value: Any) -> Row:
    """Return a row, or that it is none: an object of JSON, or why there is none."""
    if not isinstance(value, dict | DataError):
        value = DataError(f"the row is {kind(value)}, expected an object")
    return Row(where, value)


def suffix_of(name: str, *, documents: bool = False) -> str:
    """Return which of `SUFFIXES` a name ends in, in whatever case; empty if in none.

    Args:
        name: Of a file.
        documents: Whether those of `DOCUMENTS` count too.
    """
    lower = name.lower()
    known = (*SUFFIXES, *DOCUMENTS) if documents else SUFFIXES
    return next((suffix for suffix in known if lower.endswith(suffix)), "")


def suffixes_in_words(documents: bool) -> str:
    """Return what the name of a file must end in."""
    return f".txt, .md, {SUFFIXES_IN_WORDS}" if documents else SUFFIXES_IN_WORDS


OTHER_CONTENT = {
    b"\x1f\x8b": ("gzip data", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", ".zst"),
    b"\xfd7zXZ\0": ("xz data", ".xz"),
    b"PAR1": ("a Parquet table", ".parquet"),
    b"ARROW1": ("an Arrow table", ".arrow"),
}
"""How files begin that often have another name: what they hold, and what their name must end in."""

UNREADABLE_CONTENT = {
    b"version https://git-lfs": "is a pointer of Git LFS, not the data. Fetch it: git lfs pull",
    b"<!doctype html": "is a web page, not the data. Download the file itself",
    b"<html": "is a web page, not the data. Download the file itself",
    b"PK\x03\x04": "is a zip archive or a spreadsheet. Unpack it, or save it as CSV",
    b"BZh": "holds bzip2 data. Decompress it",
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "is UTF-16 text. Save it as UTF-8"),
    **dict.fromkeys((b"{\0", b"[\0", b"\0{", b"\0["), "is UTF-16 text. Save it as UTF-8"),
}
"""How files begin that are something else, in whatever case, and what to do."""


def _refuse_other_content(file: Path, suffix: str) -> None:
    """Call a file by name that holds something else than its own name says."""
    try:
        with file.open("rb") as stream:
            head = stream.read(64)
    except OSError:
        return  # said where it is read
    for start, (content, right) in OTHER_CONTENT.items():
        if head.startswith(start) and not suffix.endswith(right):
            raise DataError(
                f"dataset.source: {file} holds {content}. Rename it so that it ends in {right}."
            )
    for start, problem in UNREADABLE_CONTENT.items():
        if suffix in DOCUMENTS and start.startswith(b"<"):
            continue  # a document may be one of markup
        if head.lower().lstrip(b" \t\r\n\xef\xbb\xbf").startswith(start.lower()):
            raise DataError(f"dataset.source: {file} {problem}.")


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open a text; a byte that is not UTF-8 becomes half a surrogate pair, see `_check_utf8`."""
    packing = file.suffix.lower()
    form = PACKED.get(packing, "")
    try:
        with (
            _unpacked(file, packing) as stream,
            io.TextIOWrapper(
                stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline
            ) as text,
        ):
            yield text
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error) as error:
        raise DataError(
            f"dataset.source: {file} is not a whole {form} file: {error}. Compress it again."
        ) from error
    except OSError as error:
        if form == "zstd" and error.errno is None:  # of pyarrow's decoder
            raise DataError(
                f"dataset.source: {file} is not a whole zstd file: {error}. Compress it again."
            ) from error
        raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error


def _unpacked(file: Path, packing: str) -> Any:
    if packing == ".gz":
        return gzip.open(file, "rb")
    if packing == ".xz":
        return lzma.open(file, "rb")
    if packing == ".zst":
        import pyarrow  # type: ignore[import-untyped]  # heavy, and few files need it

        return pyarrow.input_stream(str(file), compression="zstd")
    return file.open("rb")


def _check_utf8(text: str) -> None:
    """Raise a ValueError if a byte was not UTF-8."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        raise ValueError(
            f"it is not UTF-8 text: byte 0x{byte:02x} after {error.start} characters"
        ) from None


# Documents: a file is one


def _document(file: Path, column: str) -> dict[str, Any] | DataError:
    r"""Return the whole text as one row. Its lines end in ``\n``, whatever the file has."""
    with _opened(file) as stream:
        text, more = stream.read(LONGEST_LINE), stream.read(1)
    if more:
        return DataError(f"the text has more than {LONGEST_LINE:,} characters")
    if "\0" in text:
        return DataError("it is no text: it holds a byte 0, as binary files do")
    try:
        _check_utf8(text)
    except ValueError as error:
        return DataError(str(error))
    return {column: text}


# JSON: one value a line, or the elements of one list

HEAD_CHARACTERS = 1 << 16
"""Characters of a JSON file that are read at once."""

EXPECTED_JSON = "Expected one list of objects, or one object a line."

LONGEST_LINE = 100_000_000
"""Characters of a line or document at most: a small packed file can hold one that fills memory."""

SPACE = re.compile(r"[ \t\n\r]*")


LIST_KEYS = ("data", "rows", "train", "examples", "samples", "instances", "items", "records")
"""Keys of a file that is one object, under which its rows may be listed."""

WRAPPED = re.compile(rf'"({"|".join(LIST_KEYS)})"\s*:\s*\[\s*\{{')


def _json_rows(file: Path) -> Placed:
    # A list is told from lines by its bracket: many .json files are JSON lines
    with _opened(file) as stream:
        head = stream.read(HEAD_CHARACTERS).lstrip()
    listed = head.startswith("[")
    if head.startswith("{") and WRAPPED.search(head):
        with _opened(file) as stream:
            wrapped = _wrapped_rows(stream.read(), file)
        if wrapped is not None:
            for i, value in enumerate(wrapped):
                yield f"[{i}]", value
            return
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


def _wrapped_rows(text: str, file: Path) -> list[Any] | None:
    """Return the rows of a text that is one object such as ``{"data": [...]}``; None if not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # several objects, or none
    listed = [key for key in value if isinstance(value[key], list)]
    if len(listed) != 1 or listed[0] not in LIST_KEYS:
        return None
    strict = _value(text)  # what it refuses cannot be told from the rows beside it
    if isinstance(strict, DataError):
        raise DataError(f"dataset.source: {file}: {strict}.")
    rows: list[Any] = strict[listed[0]]
    return rows


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


def lines(stream: IO[str]) -> Iterator[tuple[int, Any]]:
    """Return each line that is not blank: its number, and its value or why there is none."""
    # The stream breaks lines at \n, \r\n and \r. str.splitlines would break at U+2028 and the
    # like, which JSON may hold as they are
    read = partial(stream.readline, LONGEST_LINE)
    for number, line in enumerate(iter(read, ""), 1):
        if len(line) == LONGEST_LINE and not line.endswith("\n"):
            while line and not line.endswith("\n"):
                line = read()
            yield number, DataError(f"the line has more than {LONGEST_LINE:,} characters")
        elif not line.isspace():
            yield number, _value(line)


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
        _check_utf8(text)
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

SEPARATORS = (";", "\t", "|")
"""What some programs put between cells instead of commas."""

SEPARATOR_TOLD = re.compile(r"sep=(.)\r?\n?", re.IGNORECASE)

LOOSE = frozenset({"tools", "tool_calls", "arguments"})
"""Fields within which each row has keys of its own."""


def _csv_rows(file: Path) -> Placed:
    """Yield the line that each row starts in, and the row, unless it is blank."""
    with _opened(file, newline="") as stream:
        separator, is_told = _separator(stream)
    with _opened(file, newline="") as stream:
        if is_told:
            stream.readline()
        rows = _csv_cells(stream, file, separator)
        _, header = next(rows, (1, []))
        _check_header(header, file)
        for line, cells in rows:
            row: dict[str, Any] | DataError = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                row = DataError(f"the row has {len(cells)} cells, the header has {len(header)}")
            try:
                _check_utf8("".join(cells))
            except ValueError as error:
                row = DataError(str(error))
            yield f":{line}", row


def _separator(stream: IO[str]) -> tuple[str, bool]:
    """Return what stands between the names of a header, and whether a first line tells it.

    A comma, unless there is none in the header; Excel writes ``sep=;``.
    """
    first = stream.readline()
    if told := SEPARATOR_TOLD.fullmatch(first):
        return told.group(1), True
    try:
        header = next(filter(None, csv.reader(chain([first], stream))), [])
    except csv.Error:  # said where it is read
        return ",", False
    if len(header) != 1:
        return ",", False
    return max((",", *SEPARATORS), key=header[0].count), False


def _csv_cells(stream: IO[str], file: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    # Not pyarrow's reader: it guesses types, and the answer 007 would be learned as 7
    reader = csv.reader(stream, delimiter=separator, strict=True)
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
                f"dataset.source: {file}:{line} is broken CSV: {error}. Expected {separator!r} "
                'between cells, and quotes around a cell with it, quotes (as "") or line ends.'
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
        from pyarrow import parquet

        with parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            _check_header(schema.names, file)
            repeated = _repeated_columns(table.metadata, file)
        # Of those each value is held once, and rows are made of it one by one
        with parquet.ParquetFile(file, read_dictionary=sorted(repeated)) as table:
            batches = table.iter_batches(batch_size=ROWS_AT_ONCE)
            if repeated:
                batches = (b.slice(i, 1) for b in batches for i in range(b.num_rows))
            yield from _table_rows(batches, schema)


LARGE = 8_000_000
"""Bytes of a column beyond which it is looked at how they are stored."""

DENSE = 100
"""Times that texts are smaller when stored, at most: they shrink to a half or a tenth."""

LARGEST = 1 << 30
"""Bytes that a column may take so."""


def _repeated_columns(metadata: Any, file: Path) -> set[str]:
    """Return the columns of a Parquet file that name long texts by number: few bytes for many.

    Raises:
        DataError: A column is stored in far fewer bytes than any text takes.
    """
    repeated = set[str]()
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            size, stored = column.total_uncompressed_size, column.total_compressed_size
            is_dense = size > DENSE * stored
            if is_dense and size > LARGEST:
                raise DataError(
                    f"dataset.source: {file}: the column {column.path_in_schema} takes {size} "
                    f"bytes, which are stored in {stored}: that is no text. Write the file again."
                )
            if size > LARGE and column.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
                named = column.data_page_offset - (column.dictionary_page_offset or 0)
                if is_dense or named > LARGE // 2:
                    repeated.add(column.path_in_schema)
    return repeated


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
            yield from _table_rows(chain.from_iterable(map(_slices, batches)), reader.schema)


def _slices(batch: Any) -> Iterator[Any]:
    # What a damaged file says about its own lengths would be believed
    batch.validate(full=True)
    return (batch.slice(start, ROWS_AT_ONCE) for start in range(0, batch.num_rows, ROWS_AT_ONCE))


def _table_rows(batches: Iterable[Any], schema: Any) -> Placed:
    parsed = {field.name: parse for field in schema if (parse := _json_parser(field.type))}
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for i, row in enumerate(rows):
        value = without_added(row)
        try:
            for name, parse in parsed.items():
                value[name] = parse(value[name])
        except (ValueError, RecursionError) as error:
            value = DataError(f"broken JSON in the column {name!r}: {error}")
        yield f"[{i}]", value


Parser = Callable[[Any], Any]


def _json_parser(arrow_type: Any) -> Parser | None:
    """Return what parses the JSON texts within values of a type; None if it holds none.

    ``datasets`` writes values of differing types so: the type ``arrow.json``, at any depth.
    """
    from pyarrow import types

    if getattr(arrow_type, "extension_name", None) == "arrow.json":
        return lambda text: None if text is None else DECODER.decode(text)
    if types.is_struct(arrow_type):
        named = {field.name: parse for field in arrow_type if (parse := _json_parser(field.type))}
        return _parsing_fields(named) if named else None
    if types.is_list(arrow_type) or types.is_large_list(arrow_type):
        inner = _json_parser(arrow_type.value_type)
        return _parsing_elements(inner) if inner else None
    return None


def _parsing_fields(named: Mapping[str, Parser]) -> Parser:
    def parse(value: Any) -> Any:
        if value is None:
            return None
        return value | {key: named[key](value[key]) for key in named if key in value}

    return parse


def _parsing_elements(inner: Parser) -> Parser:
    return lambda values: None if values is None else [inner(value) for value in values]


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


# Rows that hold one turn each

CONVERSATION = (
    *("conversation_id", "conv_id", "c_id", "chat_id", "dialog_id", "dialogue_id", "session_id"),
    *("thread_id", "conversation", "dialog", "dialogue", "chat", "session", "thread", "id"),
)
"""Columns that may tell which conversation a turn belongs to, in small letters."""

SPEAKER = {"role": "role", "from": "from", "speaker": "role", "sender": "role", "author": "role"}
"""Columns that may tell who speaks, and the field of a message that they become."""

SPOKEN = ("content", "message", "text", "value", "utterance")
"""Columns that may hold what is said."""


def join_turns(rows: Iterable[Row]) -> Iterator[Row]:
    """Make conversations of rows that hold one turn each; other rows come as they are.

    The rows of a conversation follow each other. It stands where its first row does, and has the
    columns that are the same in all of its rows, for filters.
    """
    rows = iter(rows)
    first = list[Row]()
    names = None
    for row in rows:
        first.append(row)
        if isinstance(row.value, dict):
            names = _turn_columns(row.value)
            break
    rows = chain(first, rows)
    if names is None:
        yield from rows
        return
    conversation, speaker, spoken = names
    field = SPEAKER[speaker.strip().lower()]
    seen = set[str]()
    turns = list[Row]()
    current = None

    def whole() -> Row:
        broken = next((turn for turn in turns if isinstance(turn.value, DataError)), None)
        if broken is not None:
            return Row(turns[0].where, DataError(f"{broken.where}: {broken.value}"))
        values = [turn.value for turn in turns if isinstance(turn.value, dict)]
        same = {k: v for k, v in values[0].items() if all(row.get(k) == v for row in values)}
        same = {k: v for k, v in same.items() if k not in (speaker, spoken)}
        said = "value" if field == "from" else "content"
        own = [name for name in TRAIN_FLAGS if name in values[0] and name not in same]
        messages = [
            {
                field: row.get(speaker),
                said: row.get(spoken),
                **{name: row.get(name) for name in own},
            }
            for row in values
        ]
        return Row(turns[0].where, {**same, "messages": messages})

    for row in rows:
        if isinstance(row.value, DataError):
            turns.append(row)  # of the conversation that it stands in
            continue
        key = json.dumps(row.value.get(conversation), default=str)
        if turns and key != current and current is not None:
            yield whole()
            turns = []
        if key != current and key in seen:
            problem = f"{conversation} {key} was there before; put the rows of each together"
            row = Row(row.where, DataError(problem))
        seen.add(key)
        current = key
        turns.append(row)
    if turns:
        yield whole()


def _turn_columns(row: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the columns of the conversation, who speaks and what is said, if rows are turns."""
    small = {name.strip().lower(): name for name in row}
    found = [
        next((small[name] for name in known if name in small), None)
        for known in (CONVERSATION, SPEAKER, SPOKEN)
    ]
    conversation, speaker, spoken = found
    if conversation is None or speaker is None or spoken is None:
        return None
    if not isinstance(row[speaker], str) or not isinstance(row[spoken], str | None):
        return None
    return conversation, speaker, spoken


PACKED = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}
"""How a text may be compressed, by what its name ends in."""

TEXTS: Mapping[str, Callable[[Path], Placed]] = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), _json_rows),
    **dict.fromkeys((".csv", ".tsv"), _csv_rows),
}

READERS: Mapping[str, Callable[[Path], Placed]] = {
    **TEXTS,
    **{text + packing: read for packing in PACKED for text, read in TEXTS.items()},
    ".arrow": _arrow_rows,
    ".parquet": _parquet_rows,
}
"""What reads a file, by what its name ends in, in upper or lower case."""

DOCUMENTS = tuple(text + packing for packing in ("", *PACKED) for text in (".txt", ".md"))
"""How the names of files end that are one document each; conversations are in none."""

SUFFIXES = tuple(READERS)
SUFFIXES_IN_WORDS = f"{', '.join(TEXTS)} (each also with {', '.join(PACKED)}), .arrow or .parquet"
