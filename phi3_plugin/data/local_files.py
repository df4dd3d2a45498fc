"""Finds the local files that a source names."""

import re
from collections.abc import Iterable
from glob import glob
from hashlib import sha256
from pathlib import Path

from phi3_plugin.data.files import KINDS, suffix_of
from phi3_plugin.data.saved import PARTS, split_folder, without_caches
from phi3_plugin.errors import ConfigError, DataError, MissingFileError

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

TRAIN = "train"
"""The split that is read where none is chosen."""

BLOCK = 1 << 20
"""Bytes read at once."""


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
    if (path / PARTS).is_file():
        return _files(str(split_folder(path, split)))
    files = _files(source)
    if files is not None and split != TRAIN:
        raise ConfigError(
            f"{source} is local and has no split {split!r}. Remove split, or set it for the "
            f"sources of the hub alone, as in {{source: gsm8k, split: {split}}}."
        )
    return files


def _files(source: str) -> tuple[Path, ...] | None:
    path = Path(source).expanduser()
    if path.is_file():
        return (path,)
    if path.is_dir():
        found = _in_folder(path)
    elif set("*?[") & set(source):
        found = [file for file in map(Path, glob(str(path), recursive=True)) if file.is_file()]
    elif _is_hub_name(source):
        return None
    else:
        raise MissingFileError(f"there is no file or folder {source}.")
    if not found:
        raise MissingFileError(f"{source} holds no file that ends in {KINDS}.")
    return tuple(sorted(found))


def content_hash(files: Iterable[Path]) -> str:
    """Return a hash of what files hold, and of their names without folders.

    Raises:
        DataError: A file cannot be read.
    """
    whole = sha256()
    for file in files:
        try:
            name = f"{file.name}\n{_hash_of(file)}\n"
        except OSError as error:
            raise DataError(f"dataset.source: {file} cannot be read: {error}.") from error
        whole.update(name.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _hash_of(file: Path) -> str:
    found = sha256()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _in_folder(folder: Path) -> list[Path]:
    found = [file for file in folder.iterdir() if suffix_of(file.name) and file.is_file()]
    return without_caches(folder, found)


def _is_hub_name(source: str) -> bool:
    # "data/train" beside a folder data is a mistyped path, not a user of the hub
    owner, slash, _ = source.partition("/")
    is_name = HUB_NAME.fullmatch(source) and not suffix_of(source)
    return bool(is_name) and not (slash and Path(owner).is_dir())
