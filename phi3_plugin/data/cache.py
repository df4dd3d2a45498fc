"""Tokenized data is kept, by a hash of everything it depends on.

Nothing is ever looked up by a name or a date, so an edited file, template or program gives another
key. A folder is written beside its final name and renamed when it is whole: a killed run leaves
nothing that would be taken for data, and what it leaves is removed when the key is next written.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from filelock import FileLock
from torchtune.utils import log_rank_zero

from phi3_plugin.data.store import Store, StoreWriter, open_store
from phi3_plugin.errors import DataError, OutputError, Phi3Error

FOLDER = "PHI3_PLUGIN_CACHE"
"""Environment variable that names another folder."""

KEPT_DAYS = 30
"""What nobody opened for so long is removed when something new is written."""

Write = Callable[[StoreWriter], None]

logger = logging.getLogger(__name__)


def cached(cache_dir: str | Path | None, settings: Mapping[str, Any] | None, write: Write) -> Store:
    """Open the store of these settings, or write it first.

    One process writes; others that want the same store meanwhile wait for it.

    Args:
        cache_dir: Where stores are kept; None is the user's cache folder.
        settings: All that decides what is in the store, as JSON values. None: it is not known, so
            the store is for this process alone.
        write: Fills a store.

    Raises:
        DataError: The data cannot be used; nothing is kept.
        OutputError: The store cannot be written.
    """
    key = hashlib.sha256(json.dumps([_code(), settings], sort_keys=True).encode()).hexdigest()[:32]
    folder: str | Path | None = tempfile.gettempdir()
    try:
        if settings is None or (folder := _writable(cache_dir)) is None:
            return _private(write)
        with FileLock(folder / f"{key}.lock"):
            return _open(folder / key) or _written(folder / key, write)
    except Phi3Error:
        raise
    except OSError as error:
        raise OutputError(
            f"The tokenized data cannot be written to {error.filename or folder}: "
            f"{error.strerror or error}. Make room, or name another folder with dataset.cache_dir "
            f"or the environment variable {FOLDER}."
        ) from error


def default_folder() -> Path:
    """Return where stores are kept unless another folder is named."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER) or Path(home) / "phi3_plugin")


def _writable(cache_dir: str | Path | None) -> Path | None:
    folder = Path(cache_dir).expanduser() if cache_dir else default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if cache_dir:
            raise
        said = f"tokenized data is not kept: {folder} cannot be written to ({error.strerror})"
        log_rank_zero(logger, said, logging.WARNING)
        return None
    return folder


def _open(folder: Path) -> Store | None:
    store = open_store(folder)
    if store is not None:
        os.utime(folder)
    return store


def _written(folder: Path, write: Write) -> Store:
    shutil.rmtree(folder, ignore_errors=True)  # broken, or it would have been opened
    _remove_unfinished(folder)
    _remove_old(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}-unfinished")
    unfinished.mkdir()
    try:
        with StoreWriter(unfinished) as writer:
            write(writer)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    store = open_store(folder)
    if store is None:
        raise DataError(f"{folder} was changed while it was written. Run the command again.")
    return store


def _private(write: Write) -> Store:
    folder = tempfile.TemporaryDirectory(prefix="phi3_plugin-")
    with StoreWriter(Path(folder.name)) as writer:
        write(writer)
    store = open_store(Path(folder.name))
    if store is None:
        raise DataError(f"{folder.name} was changed while it was written. Run the command again.")
    store.__dict__["_keeps"] = folder  # removed with the store
    return store


def _remove_unfinished(mine: Path) -> None:
    """Remove what killed runs left: who holds the lock of a key is the only one that writes it."""
    for left in mine.parent.glob("*-unfinished"):
        key = left.name.partition(".")[0]
        lock = FileLock(mine.with_name(f"{key}.lock"), timeout=0)
        with suppress(OSError), nullcontext() if key == mine.name else lock:  # Timeout is OSError
            shutil.rmtree(left, ignore_errors=True)


def _remove_old(folder: Path) -> None:
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for entry in folder.glob(f"{'[0-9a-f]' * 32}*"):
        with suppress(OSError):  # Another process may be removing it too
            if entry.stat().st_mtime >= oldest:
                continue
            if (entry / "meta.json").is_file():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".lock" and not entry.with_suffix("").exists():
                entry.unlink()


def _code() -> str:
    """Return a hash of the program that makes the data."""
    digest = hashlib.sha256(f"{tokenizers.__version__} {jinja2.__version__}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
