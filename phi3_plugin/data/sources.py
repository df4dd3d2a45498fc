"""Find and read rows of data: local files, or a data set of the hub."""

import re
from collections.abc import Iterator
from glob import glob
from pathlib import Path

from phi3_plugin.data.files import KINDS, SUFFIXES, Row, as_row, file_rows
from phi3_plugin.data.options import check_text
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def read_rows(source: str | Path | None, *, split: str, subset: str | None) -> list[Row]:
    """Read all rows of a source.

    Args:
        source: A file of one of :data:`phi3_plugin.data.files.SUFFIXES`, a folder of them, a
            glob, or a name on the Hugging Face hub. What exists locally is local.
        split: Which part of a hub data set; local files have no parts.
        subset: The configuration of a hub data set that has several.

    Raises:
        ConfigError: No source is given, or an option is not text.
        MissingFileError: The source is a local path and there is nothing.
        DataError: A file or the hub data set cannot be read at all, or there are no rows.
    """
    if not source or not isinstance(source, str | Path):
        problem = f"{source!r} must be a string" if source else "is not set"
        raise ConfigError(
            f"dataset.source{':' if source else ''} {problem}. Give a .json, .jsonl, .csv or "
            ".parquet file, a folder of them, a glob or the name of a data set on the Hugging Face "
            "hub, as in dataset.source=data/train.jsonl"
        )
    check_text("dataset.split", split)
    if subset is not None:
        check_text("dataset.subset", subset)
    files = _local_files(str(source))
    if files is None:
        rows = list(_hub_rows(str(source), split, subset))
    else:
        rows = [row for file in files for row in file_rows(file)]
    if not rows:
        raise DataError(f"dataset.source: {source} has no rows.")
    return rows


def _local_files(source: str) -> list[Path] | None:
    """Return the files a source names, or None if it is the name of a hub data set."""
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    elif set("*?[") & set(source):
        found = sorted(
            file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()
        )
    elif _is_hub_name(source):
        return None
    else:
        raise MissingFileError(f"dataset.source: there is no file or folder {source}.")
    if not found:
        raise MissingFileError(f"dataset.source: {source} holds no file that ends in {KINDS}.")
    return found


def _is_hub_name(source: str) -> bool:
    # "data/train" beside a folder data is a mistyped path, not a user of the hub
    owner, slash, _ = source.partition("/")
    is_name = HUB_NAME.fullmatch(source) and not source.endswith(SUFFIXES)
    return bool(is_name) and not (slash and Path(owner).is_dir())


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[Row]:
    from datasets import load_dataset  # Takes a second to import, and local files do without

    try:
        rows = load_dataset(name, subset, split=split)
    except Exception as error:  # Network, permission, name, split: each raises its own kind
        raise DataError(
            f"dataset.source: {name!r} is no local file and could not be loaded from the "
            f"Hugging Face hub (split {split!r}, subset {subset!r}): {error}"
        ) from error
    return (Row(f"{name}[{i}]", as_row(row)) for i, row in enumerate(rows))
