"""Where rows come from: local files, or data sets of the hub, each with its own options."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from glob import glob
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.data.formats import FORMATS, ROLES, known_formats
from phi3_plugin.data.rows import (
    SUFFIXES_IN_WORDS,
    Row,
    file_rows,
    make_row,
    suffix_of,
    without_added,
)
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from phi3_plugin.options import (
    Advice,
    AnyText,
    Count,
    Kind,
    Positive,
    Switch,
    made,
    mistakes,
    option_problems,
)

TRAIN = "train"
"""The split that is read where none is chosen."""

UNSET = (
    "Give a .json, .jsonl, .csv, .arrow or .parquet file, a folder of them, a glob or the name of "
    "a data set on the Hugging Face hub, as in dataset.source=data/train.jsonl"
)


class Filtered(DataError):
    """A row does not pass the filter."""


class FilterFailed(DataError):
    """It cannot be said whether a row passes a filter."""


def _are_columns(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(c, str) for c in value.values()):
        return False
    return {"user", "assistant"} <= {*value} <= {*ROLES}


_FORMAT = Kind("the name of a format", lambda v: isinstance(v, str) and v in FORMATS)
_COLUMNS = Kind(
    "the name of one column for user, of one for assistant and of at most one for system, as in "
    "{user: question, assistant: answer},",
    _are_columns,
    dict,
)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How rows are read: said for all sources, or in the dictionary of one."""

    format: Annotated[Annotated[str, _FORMAT] | None, Advice(known_formats())] = None
    """One of `phi3_plugin.data.formats.FORMATS`; by default recognized from the first rows."""
    columns: Annotated[dict[str, str], _COLUMNS] | None = None
    """Role to column name, for rows that no format fits."""
    split: AnyText = TRAIN
    """Which part of a hub data set, or of one that ``datasets`` saved; local files have none."""
    subset: AnyText | None = None
    """The configuration of a hub data set that has several."""
    streaming: Switch = False
    """Read a hub data set without downloading it first; local files always are read so."""
    filter: AnyText | None = None
    """Expression over a row's columns; rows for which it is not true are left out."""
    max_samples: Count | None = None
    """Take the first so many rows, of those that pass the filter."""


@dataclass(frozen=True)
class Source(SourceOptions):
    """One source of rows, checked. In a configuration ``name`` is called ``source``."""

    name: str
    """A file of one of `SUFFIXES`, a folder of them, a glob, or a name on the Hugging Face hub.
    What exists locally is local."""
    files: tuple[Path, ...] | None = None
    """The local files; None is the hub."""
    weight: float = 1.0
    """How often an epoch sees each sample, see :func:`phi3_plugin.data.order.repeats`."""

    def rows(self) -> Iterator[Row]:
        """Read the rows as a stream.

        Raises:
            DataError: The source cannot be read at all or not to its end, or there are no rows,
                or none passes the filter.
        """
        passes = None if self.filter is None else compile_filter(self.filter)
        row = None
        passed = 0
        taken = 0
        for row in self._all_rows():
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

    def _all_rows(self) -> Iterator[Row]:
        if self.files is not None:
            yield from chain.from_iterable(map(file_rows, self.files))
            return
        try:
            for i, row in enumerate(self._hub):
                yield make_row(f"{self.name}[{i}]", without_added(row))
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


def read_sources(source: object, common: SourceOptions | None = None) -> list[Source]:
    """Check what ``dataset.source`` says, and find the local files.

    Args:
        source: A name as in `Source`; or a dictionary of ``source``, perhaps ``weight``, and of
            `SourceOptions`; or a list of either.
        common: Options of those that do not say otherwise.

    Raises:
        ConfigError: No source is given, or options have values that they cannot have: all are
            named; or local sources do not have the split.
        MissingFileError: Sources are local paths and there is nothing.
        DataError: The notes of a saved data set are damaged.
    """
    common = common or SourceOptions()
    listed = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
    entries: Sequence[Any] = source if listed else [source]  # type: ignore[assignment]
    problems = list[str]()
    described = list[dict[str, Any]]()
    for i, entry in enumerate(entries):
        key = f"dataset.source[{i}]" if listed else "dataset.source"
        if isinstance(entry, Mapping):
            described.append(dict(entry))
            problems += _wrong_name(f"{key}.source", entry.get("source"))
            problems += _wrong_options(key, described[-1])
        else:
            described.append({"source": entry})
            problems += _wrong_name(key, entry)
    if problems:
        raise ConfigError("\n".join(problems))
    sources = list[Source]()
    wrong = list[str]()
    missing = list[str]()
    for own in described:
        try:
            sources.append(_source(own, common))
        except MissingFileError as error:
            missing.append(f"dataset.source: {error}")
        except ConfigError as error:
            wrong.append(f"dataset.source: {error}")
    if wrong:
        raise ConfigError("\n".join([*wrong, *missing]))
    if missing:
        raise MissingFileError("\n".join(missing))
    return sources


def _source(own: Mapping[str, Any], common: SourceOptions) -> Source:
    checked = made(SourceOptions, own)
    options = {}
    for field in fields(SourceOptions):
        options[field.name] = getattr(checked if field.name in own else common, field.name)
    # One way to read the rows goes before the other
    if own.keys() & {"format", "columns"}:
        options |= {"format": checked.format, "columns": checked.columns}
    name = str(own["source"])
    files = local_files(name, options["split"])
    return Source(name, files, own.get("weight", 1.0), **options)


def _wrong_name(key: str, name: object) -> list[str]:
    if name and isinstance(name, str | Path):
        return []
    return [f"{key}: {name!r} must be a string. {UNSET}" if name else f"{key} is not set. {UNSET}"]


def _wrong_options(key: str, own: Mapping[str, Any]) -> list[str]:
    others = ("source", "weight")
    problems = option_problems(SourceOptions, own, "a source", section=f"{key}.", others=others)
    if "weight" in own:
        problems += mistakes(f"{key}.weight", own["weight"], Positive)
    return [*problems, *source_conflicts(own, key)]


def source_conflicts(options: Mapping[str, Any], key: str = "dataset") -> Iterator[str]:
    """Say what is wrong with options of a source beside the kinds of their values.

    Args:
        options: Some of `SourceOptions`, whatever their values.
        key: Where they stand.
    """
    if options.get("format") is not None and options.get("columns") is not None:
        yield f"{key}.format and {key}.columns are both set. Remove one of them."
    if isinstance(options.get("filter"), str):
        try:
            compile_filter(options["filter"], f"{key}.filter")
        except ConfigError as error:
            yield str(error)


# Filters of rows, which run out of reach of everything but the row


def compile_filter(
    expression: str, key: str = "dataset.filter"
) -> Callable[[Mapping[str, Any]], bool]:
    """Read an expression over the columns of a row, such as ``lang == 'en' and rating >= 4``.

    Args:
        expression: Jinja, without braces; ``row`` is the whole row, for columns whose names are
            no words, or are ``row`` or ``self``.
        key: Where it stands, for error messages.

    Returns:
        Whether it is true of a row; raises `FilterFailed` where it cannot be said.

    Raises:
        ConfigError: It is no expression.
    """
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
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


# The local files that a source names

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

SAVED_FILES = "state.json"
"""Names the files of a data set that ``datasets`` saved; caches beside them are no data."""

SAVED_SPLITS = "dataset_dict.json"
"""Names the splits of a saved data set that has several, each a folder."""


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
