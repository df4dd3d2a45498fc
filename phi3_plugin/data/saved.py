"""Folders that ``datasets`` saved: which of their files hold rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_plugin.errors import ConfigError, DataError, MissingFileError

STATE = "state.json"
"""Names the files of a saved data set; caches that lie beside them are no data."""

PARTS = "dataset_dict.json"
"""Names the splits of a data set that has several, each a folder."""

NOTES = {"dataset_info.json", STATE, PARTS}
"""What ``datasets`` writes beside the rows."""


def split_folder(folder: Path, split: str) -> Path:
    """Return the folder of one split of a data set that was saved with all its splits.

    Raises:
        ConfigError: It has no such split.
        DataError: The note that names the splits is damaged.
    """
    splits = _noted(folder / PARTS, "splits")
    if split not in splits:
        raise ConfigError(
            f"{folder} has no split {split!r}. It has: {', '.join(map(str, splits))}. Choose one "
            "with split."
        )
    return folder / split


def without_caches(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return those files of a folder that hold rows.

    Args:
        folder: Of any kind.
        files: All in it that end as files of rows do.

    Raises:
        MissingFileError: A file of a saved data set is not there.
        DataError: The note that names them is damaged.
    """
    tables = {file.name for file in files if file.suffix == ".arrow"}
    if not tables:
        return list(files)
    named = _named(folder / STATE) if (folder / STATE).is_file() else tables
    lost = sorted(named - {file.name for file in files})
    if lost:
        raise MissingFileError(f"{folder / STATE} names {', '.join(lost)}, which is not there.")
    passed_over = NOTES | (tables - named)
    return [file for file in files if file.name not in passed_over]


def _named(state: Path) -> set[str]:
    entries = _noted(state, "_data_files")
    names = [entry.get("filename") for entry in entries if isinstance(entry, dict)]
    found = {name for name in names if isinstance(name, str)}
    if len(found) < len(entries):
        raise _damaged(state, "a file has no name of its own")
    return found


def _noted(note: Path, key: str) -> list[Any]:
    try:
        found = json.loads(note.read_text("utf-8"))[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise _damaged(note, repr(error)) from error
    if not isinstance(found, list):
        raise _damaged(note, f"{key} is no list")
    return found


def _damaged(note: Path, problem: str) -> DataError:
    return DataError(
        f"dataset.source: {note} cannot be read as datasets writes it: {problem}. Save the data "
        "again, or name its files in dataset.source."
    )
