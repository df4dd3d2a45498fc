"""Where rows come from: local files, or data sets of the hub, each with its own options."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from glob import escape, glob
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from phi3_plugin.data.formats import FORMATS, known_formats, prompt_columns
from phi3_plugin.data.rows import (
    DOCUMENTS,
    Row,
    file_rows,
    join_turns,
    make_row,
    suffix_of,
    suffixes_in_words,
    without_added,
)
from phi3_plugin.data.turns import ROLE, ROLES, key_names
from phi3_plugin.errors import ConfigError, DataError, MissingFileError
from phi3_plugin.options import (
    Advice,
    AnyText,
    Count,
    Kind,
    Name,
    Positive,
    Switch,
    made,
    mistakes,
    option_problems,
    spelled,
)

TRAIN = "train"
"""The split that is read where there are several and none is chosen."""

BUILDERS = (
    *("arrow", "audiofolder", "cache", "csv", "generator", "hdf5", "imagefolder", "json", "lance"),
    *("pandas", "parquet", "pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
)
"""Names that ``datasets`` takes for a kind of file and not for a data set of the hub."""

UNSET = (
    "Give a .json, .jsonl, .csv, .arrow or .parquet file, a folder of them, a glob or the name of "
    "a data set on the Hugging Face hub, as in dataset.source=data/train.jsonl"
)


WAYS = ("format", "columns", "prompt")
"""Options that say which columns are read."""


class Filtered(DataError):
    """A row does not pass the filter."""


class FilterFailed(DataError):
    """It cannot be said whether a row passes a filter."""


def _are_columns(value: Any) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(c, str) for c in value.values()):
        return False
    parts = {*value} - {"weight"}
    if {"chosen", "rejected"} <= parts:
        asked = parts - {"chosen", "rejected", "system", "tools"}
        return asked in ({"prompt"}, {"messages"}, set())
    if "thought" in parts:
        return {"assistant"} <= parts <= {*ROLES, "thought"}
    parts -= {"label"}
    return {"assistant"} <= parts <= {*ROLES} or {"messages"} <= parts <= {*LISTED}


LISTED = ("messages", "system", "tools")
"""What may be read of rows whose messages are in a column of another name."""


def _are_roles(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(role, str) and ROLE.fullmatch(role)
        for name, role in value.items()
    )


_FORMAT = Kind("the name of a format", lambda v: isinstance(v, str) and v in FORMATS)
_COLUMNS = Kind(
    "the name of one column for user, of one for assistant and of at most one for system, as in "
    "{user: question, assistant: answer}, perhaps with one for thought; or of one for messages, as "
    "in {messages: chat}; either perhaps with one for label; or of those for chosen, rejected and "
    "perhaps prompt or messages; and perhaps of one for weight,",
    _are_columns,
    dict,
)
_ROLES = Kind(
    "the meaning of names of roles, as in {human: user, gpt: assistant},", _are_roles, dict
)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """Which rows are read: said for all sources, or in the dictionary of one."""

    split: AnyText | None = None
    """Which part of a hub data set, or of a folder that has parts, see `splits_of`. None is
    ``train``, or the only one that a folder has."""
    subset: AnyText | None = None
    """The configuration of a hub data set that has several."""
    streaming: Switch = False
    """Read a hub data set without downloading it first; local files always are read so."""
    filter: AnyText | None = None
    """Expression over a row's columns; rows for which it is not true are left out."""
    max_samples: Count | None = None
    """Take the first so many rows, of those that pass the filter."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(RowOptions):
    """How conversations are read: said for all sources, or in the dictionary of one."""

    format: Annotated[Annotated[str, _FORMAT] | None, Advice(known_formats())] = None
    """One of `phi3_plugin.data.formats.FORMATS`; by default recognized from the first rows."""
    columns: Annotated[dict[str, str], _COLUMNS] | None = None
    """Role to column name, for rows that no format fits; or where the list of messages is
    (``messages``); or of pairs ``chosen``, ``rejected`` and ``prompt``. Also ``label``, of answers
    that are good or bad ones, ``thought``, what was thought before an answer, and ``weight``."""
    prompt: AnyText | None = None
    """What the user says, with columns in braces, as in ``"{instruction}\\n\\n{context}"``."""
    roles: Annotated[dict[str, str], _ROLES] | None = None
    """What names of roles in lists of messages mean, as in ``{human: user}``."""


@dataclass(frozen=True, kw_only=True)
class DocumentOptions(RowOptions):
    """How documents are read: said for all sources, or in the dictionary of one."""

    column: Name = "text"
    """The column whose text is a document, of files that hold several."""


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
    column: str | None = None
    """The column that is a document; None: rows are conversations."""
    passed_over: tuple[str, ...] = field(default=(), compare=False)
    """Files of a folder that are not read, and are not known to hold no rows."""

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
        recognized = not (self.format or self.columns or self.prompt or self.column)
        rows = join_turns(self._all_rows()) if recognized else self._all_rows()
        for row in rows:
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
        described = json.dumps([self.name, self.subset, self.split or TRAIN, known])
        return sha256(described.encode()).hexdigest()

    def settings(self) -> dict[str, Any]:
        """Return all that decides which rows are read, and how, as JSON values."""
        return {
            k: v for k, v in asdict(self).items() if k not in ("files", "weight", "passed_over")
        }

    def _all_rows(self) -> Iterator[Row]:
        if self.files is not None:
            yield from chain.from_iterable(file_rows(file, self.column) for file in self.files)
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
            return load_dataset(self.name, self.subset, split=self.split or TRAIN, **options)
        except Exception as error:  # Network, permission, name, split: each raises its own kind
            raise DataError(self._no_hub("loaded", error)) from error

    def _no_hub(self, done: str, error: Exception) -> str:
        return (
            f"dataset.source: {self.name!r} is no local file and could not be {done} from the "
            f"Hugging Face hub (split {self.split or TRAIN!r}, subset {self.subset!r}): {error}"
        )


def read_sources(source: object, common: RowOptions | None = None) -> list[Source]:
    """Check what ``dataset.source`` says, and find the local files.

    Args:
        source: A name as in `Source`; or a dictionary of ``source``, perhaps ``weight``, and of
            options; or a list of either.
        common: Options of those that do not say otherwise, `SourceOptions` or `DocumentOptions`,
            and which of the two a dictionary may have.

    Raises:
        ConfigError: No source is given, or options have values that they cannot have: all are
            named; or local sources do not have the split.
        MissingFileError: Sources are local paths and there is nothing.
        DataError: The notes of a saved data set are damaged.
    """
    common = common or SourceOptions()
    kind = DocumentOptions if isinstance(common, DocumentOptions) else SourceOptions
    listed = isinstance(source, Sequence) and not isinstance(source, str) and len(source) > 0
    entries: Sequence[Any] = source if listed else [source]  # type: ignore[assignment]
    problems = list[str]()
    described = list[dict[str, Any]]()
    for i, entry in enumerate(entries):
        key = f"dataset.source[{i}]" if listed else "dataset.source"
        if isinstance(entry, Mapping):
            described.append(dict(entry))
            problems += _wrong_name(f"{key}.source", entry.get("source"))
            problems += _wrong_options(key, described[-1], kind)
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
            sources.append(_source(own, common, kind))
        except MissingFileError as error:
            missing.append(f"dataset.source: {error}")
        except ConfigError as error:
            wrong.append(f"dataset.source: {error}")
    if wrong:
        raise ConfigError("\n".join([*wrong, *missing]))
    if missing:
        raise MissingFileError("\n".join(missing))
    return sources


def _source(own: Mapping[str, Any], common: RowOptions, kind: type[RowOptions]) -> Source:
    checked = made(kind, own)
    options = {}
    for option in fields(kind):
        options[option.name] = getattr(checked if option.name in own else common, option.name)
    # One way to read the rows goes before the other
    if own.keys() & {*WAYS}:
        options |= {way: getattr(checked, way) for way in WAYS}
    name = str(own["source"])
    if name in BUILDERS and not Path(name).exists():
        raise ConfigError(
            f"{name!r} is a kind of file and names no data. Name the files themselves, as in "
            f"dataset.source=my_chats.{name if name in ('csv', 'parquet', 'arrow') else 'jsonl'}."
        )
    documents = kind is DocumentOptions
    found = local_files(name, options["split"], options["subset"], documents=documents)
    files, passed_over = (None, ()) if found is None else found
    return Source(name, files, own.get("weight", 1.0), passed_over=passed_over, **options)


def _wrong_name(key: str, name: object) -> list[str]:
    if name and isinstance(name, str | Path):
        return []
    return [f"{key}: {name!r} must be a string. {UNSET}" if name else f"{key} is not set. {UNSET}"]


def _wrong_options(key: str, own: Mapping[str, Any], kind: type[RowOptions]) -> list[str]:
    others = ("source", "weight")
    problems = option_problems(kind, own, "a source", section=f"{key}.", others=others)
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
    columns = options.get("columns")
    prompt = options.get("prompt")
    if isinstance(prompt, str):
        try:
            prompt_columns(prompt)
        except ValueError as error:
            yield f"{key}.prompt: {spelled(prompt)} is no prompt: {error}."
        if options.get("format") is not None:
            yield f"{key}.format and {key}.prompt are both set. Remove one of them."
        if isinstance(columns, Mapping) and {*columns} & {"user", "messages", "prompt"}:
            yield f"{key}.prompt is what the user says: of {key}.columns it leaves the others."
    elif isinstance(columns, Mapping) and "assistant" in columns and "user" not in columns:
        yield f"{key}.columns names no column for user. Name it, or set {key}.prompt."
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

NOT_DATA = {
    *("config.json", "dataset_info.json", "dataset_infos.json", "dummy_data.zip"),
    *(SAVED_SPLITS, "license", "makefile"),
}
"""Files that lie beside the data of a clone of the hub, in small letters."""

NOT_DATA_SUFFIXES = (".md", ".rst", ".py", ".yaml", ".yml", ".lock", ".sh", ".png", ".jpg", ".pdf")

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the names of files and folders, and the split they stand for; as in ``datasets``."""

SHARD = re.compile(r"(?:.*/)?data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
"""How the hub names the files of a split, from the data set's folder on."""

Found = tuple[tuple[Path, ...], tuple[str, ...]]
"""The files to read, and those that are passed over."""


def local_files(
    source: str,
    split: str | None = None,
    subset: str | None = None,
    *,
    documents: bool = False,
) -> Found | None:
    """Return the files a source names, or None if it is the name of a hub data set.

    Args:
        source: A file, a folder, a glob or a name on the hub.
        split: Which part of it, see :attr:`SourceOptions.split`.
        subset: Which configuration, of a clone of the hub whose README.md lists some.
        documents: Whether files that are one document each count.

    Raises:
        ConfigError: The source is local and has no such split or subset, or several and no
            ``train`` or default.
        MissingFileError: The source is a local path and there is nothing.
        DataError: The notes of a saved data set are damaged.
    """
    path = Path(source).expanduser()
    if (path / SAVED_SPLITS).is_file():
        splits = _noted(path / SAVED_SPLITS, "splits")
        name = split or TRAIN
        if name not in splits:
            raise _no_split(str(path), name, map(str, splits))
        path = path / name
        split = None
    if path.is_file():
        files, passed_over = [path], list[str]()
    elif path.is_dir():
        files, passed_over = _folder_files(path, documents)
        splits_found = splits_of(path, files)
        if subsets := _subsets(path):
            splits_found = _subset_splits(path, files, subsets, subset)
            files = [file for found in splits_found.values() for file in found]
            subset = None
        if splits_found:
            only = next(iter(splits_found)) if len(splits_found) == 1 else TRAIN
            name = split if split in splits_found else SPLIT_WORDS.get(split or only, split or only)
            if name not in splits_found:
                raise _no_split(source, name, splits_found)
            chosen = splits_found[name]
            known = {file for found in splits_found.values() for file in found}
            passed_over += [str(file.relative_to(path)) for file in files if file not in known]
            files = chosen
            split = None
    elif set("*?[") & set(source):
        there = next(folder for folder in path.parents if folder.is_dir())  # a name, whatever in it
        pattern = os.path.join(escape(str(there)), path.relative_to(there))
        files = [file for file in map(Path, glob(pattern, recursive=True)) if file.is_file()]
        passed_over = []
    elif _is_hub_name(source, documents):
        return None
    else:
        raise MissingFileError(f"there is no file or folder {path}.")
    if not files:
        also = f" It has: {key_names(passed_over)}." if passed_over else ""
        ends = suffixes_in_words(documents)
        raise MissingFileError(f"{source} holds no file that ends in {ends}.{also}")
    if split not in (None, TRAIN):
        raise ConfigError(
            f"{source} is local and has no split {split!r}. Remove split, or set it for the "
            f"sources of the hub alone, as in {{source: gsm8k, split: {split}}}."
        )
    if subset is not None:
        raise ConfigError(
            f"{source} is local and has no subset {subset!r}. Name the subset's folder or files in "
            "dataset.source, and remove subset."
        )
    return tuple(sorted(files)), tuple(sorted(passed_over))


def _subsets(folder: Path) -> dict[str, Any]:
    """Return the configurations that the README.md of a clone of the hub lists, by name."""
    import yaml  # not earlier: few folders need it

    try:
        text = (folder / "README.md").read_text("utf-8")
        _, head, _ = re.split(r"^---[ \t]*$", text, maxsplit=2, flags=re.MULTILINE)
        listed = (yaml.safe_load(head) or {}).get("configs") or []
        return {str(config.get("config_name", "default")): config for config in listed}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError, yaml.YAMLError):
        return {}  # no README.md, or one without such a list


def _subset_splits(
    folder: Path, files: Sequence[Path], subsets: Mapping[str, Any], subset: str | None
) -> dict[str, list[Path]]:
    """Return the files of each split of a configuration, as its README.md says."""
    defaults = [name for name, config in subsets.items() if config.get("default") is True]
    defaults += [name for name in subsets if name == "default" or len(subsets) == 1]
    name = subset or next(iter(defaults), None)
    if name is None or name not in subsets:
        has = f"has no subset {name!r}. It has" if name else "has several subsets"
        raise ConfigError(f"{folder} {has}: {key_names(subsets)}. Choose one with subset.")
    config = subsets[name]
    patterns = config.get("data_files")
    if patterns is None:
        within = folder / str(config.get("data_dir") or "")
        files = [file for file in files if file.is_relative_to(within)]
        return splits_of(within, files) or {TRAIN: files}
    if isinstance(patterns, Mapping):
        patterns = [{"split": split, "path": path} for split, path in patterns.items()]
    splits = dict[str, list[Path]]()
    for entry in patterns if isinstance(patterns, list) else [patterns]:
        split, paths = TRAIN, entry
        if isinstance(entry, Mapping):
            split, paths = str(entry.get("split", TRAIN)), entry.get("path")
        for path in paths if isinstance(paths, list) else [paths]:
            if path and ".." not in Path(str(path)).parts and not Path(str(path)).is_absolute():
                known = {*folder.glob(str(path))}
                splits.setdefault(split, []).extend(file for file in files if file in known)
    return splits


def _no_split(source: str, split: str, splits: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{source} has no split {split!r}. It has: {key_names(splits)}. Choose one with split."
    )


def splits_of(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of each split of a folder, as ``datasets`` tells them by their names.

    By ``data/NAME-00000-of-00001``; or else by folders whose name has one of `SPLIT_WORDS`; or
    else by files of such names. Files that match nothing are of ``train``, if no other is.
    Documents are named by what they are about: their names count only where they are nothing but
    such a word, and where one says ``train``.

    Args:
        folder: What was named as the source.
        files: Within it.

    Returns:
        Nothing where no name says so: all files are of one split then.
    """
    names = [file.relative_to(folder).as_posix() for file in files]
    for split_of in (_of_shard, _of_folder, _of_name):
        found = [split_of(name) for name in names]
        naming = [name for name, split in zip(names, found, strict=True) if split]
        if TRAIN not in found and all(name.lower().endswith(DOCUMENTS) for name in naming):
            continue  # a note called test.md holds nothing out
        rest = None if TRAIN in found else TRAIN
        splits = dict[str, list[Path]]()
        for file, split in zip(files, found, strict=True):
            if split or rest:
                splits.setdefault(split or TRAIN, []).append(file)
        return splits
    return {}


def _of_shard(name: str) -> str | None:
    shard = SHARD.fullmatch(name)
    return shard.group(1) if shard else None


def _of_folder(name: str) -> str | None:
    return next(filter(None, map(_of_name, reversed(name.split("/")[:-1]))), None)


def _of_name(name: str) -> str | None:
    name = name.rpartition("/")[2]
    if name.lower().endswith(DOCUMENTS):
        return SPLIT_WORDS.get(name.partition(".")[0])
    words = re.split(r"[-._ 0-9]+", name)
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _folder_files(folder: Path, documents: bool) -> tuple[list[Path], list[str]]:
    """Return the files of a folder that hold rows, with those of its folders; and what others.

    Hidden files are no data, nor is what accompanies a clone of the hub.
    """
    files = list[Path]()
    others = list[str]()
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if parent != str(folder) and (Path(parent) / SAVED_SPLITS).is_file():
            folders[:] = []  # a saved data set with splits of its own
            others.append(str(Path(parent).relative_to(folder)))
            continue
        data = list[Path]()
        for name in sorted(names):
            file = Path(parent) / name
            if name.startswith(".") or name.lower() in NOT_DATA:
                continue
            if suffix_of(name, documents=documents):
                data += [file] if file.is_file() else []
            elif not name.lower().endswith(NOT_DATA_SUFFIXES):
                others.append(str(file.relative_to(folder)))
        files += _without_caches(Path(parent), data)
    if any(suffix_of(file.name) for file in files):  # the card of a data set is none of its rows
        files = [file for file in files if file != folder / "README.md"]
    return files, others


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


def _is_hub_name(name: str, documents: bool) -> bool:
    if suffix_of(name, documents=documents) or _is_mistyped(name):
        return False
    return HUB_NAME.fullmatch(name) is not None


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
