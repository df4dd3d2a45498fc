"""Find and read rows of data: local JSON and JSONL files, or a data set of the hub."""

import json
import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from phi3_plugin.data.template import kind
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

SUFFIXES = (".json", ".jsonl")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Row(NamedTuple):
    """One row and where it stands."""

    where: str
    """``file:line``, ``file[index]`` or ``name[index]``."""
    value: dict[str, Any] | DataError
    """The row, or why it cannot be read."""


def read_rows(source: str | Path | None, *, split: str, subset: str | None) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: A .json file (a list) or .jsonl file (an object a line), a folder of them, a
            glob, or a name on the Hugging Face hub. What exists locally is local.
        split: Which part of a hub data set; local files have no parts.
        subset: The configuration of a hub data set that has several.

    Raises:
        ConfigError: No source is given.
        MissingFileError: The source is a local path and there is nothing.
        DataError: A file or the hub data set cannot be read at all, or there are no rows.
    """
    if not source or not isinstance(source, str | Path):
        problem = f"{source!r} must be a string" if source else "is not set"
        raise ConfigError(
            f"dataset.source{':' if source else ''} {problem}. Give a .json or .jsonl file, a "
            "folder of them, a glob or the name of a data set on the Hugging Face hub, as in "
            "dataset.source=data/train.jsonl"
        )
    files = _local_files(str(source))
    if files is None:
        rows = list(_hub_rows(str(source), split, subset))
    else:
        rows = [row for file in files for row in _file_rows(file)]
    if not rows:
        raise DataError(f"dataset.source: {source} has no rows.")
    return rows


def _local_files(source: str) -> list[Path] | None:
    """Return the files a source names, or None if it is the name of a hub data set."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    elif set("*?[") & set(source):
        found = sorted(
            file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()
        )
    elif _is_hub_name(source):
        return None
    else:
        raise MissingFileError(f"dataset.source: there is no file or folder {source}.")
    if not found:
        raise MissingFileError(f"dataset.source: {source} holds no .json or .jsonl file.")
    return found


def _is_hub_name(source: str) -> bool:
    # "data/train" beside a folder data is a mistyped path, not a user of the hub
    owner, slash, _ = source.partition("/")
    is_name = HUB_NAME.fullmatch(source) and Path(source).suffix not in SUFFIXES
    return bool(is_name) and not (slash and Path(owner).is_dir())


def _file_rows(file: Path) -> Iterator[Row]:
    if file.suffix not in SUFFIXES:
        raise DataError(f"dataset.source: {file} must end in .json or .jsonl.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"dataset.source: {file} is not UTF-8 text: {error}.") from error
    # A list is told from lines by its bracket: many .json files are JSON lines
    if re.match(r"\s*\[", text):
        yield from (Row(f"{file}[{i}]", _object(v)) for i, v in enumerate(_list(text, file)))
    else:
        lines = enumerate(text.split("\n"), 1)
        yield from (Row(f"{file}:{n}", _line(line)) for n, line in lines if line.strip())


def _list(text: str, file: Path) -> list[Any]:
    try:
        values: list[Any] = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"dataset.source: {file} is broken JSON: {error}. Expected one list of objects, "
            "or one object a line."
        ) from error
    return values


def _line(line: str) -> dict[str, Any] | DataError:
    try:
        return _object(json.loads(line))
    except ValueError as error:
        return DataError(f"broken JSON: {error}")


def _object(value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(f"the row is {kind(value)}, expected an object")


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[Row]:
    from datasets import load_dataset  # Takes a second to import, and local files do without

    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # Network, permission, name, split: each raises its own kind
        raise DataError(
            f"dataset.source: {name!r} is no local file and could not be loaded from the "
            f"Hugging Face hub (split {split!r}, subset {subset!r}): {error}"
        ) from error
    return (Row(f"{name}[{i}]", _object(row)) for i, row in enumerate(rows))
