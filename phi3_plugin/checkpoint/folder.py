"""Write a folder so that it is either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phi3_plugin.errors import OutputError

PARTIAL = ".partial-"
"""Marks folders that a killed run left half-written."""


@contextmanager
def whole_folder(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``final`` and rename it into place when the block ends well.

    Args:
        final: The folder to create.
        replace: Whether it may exist; it is then removed once the new one is in its place.

    Yields:
        The folder to write into.

    Raises:
        OutputError: ``final`` exists, or writing fails (disk full, no permission).
    """
    if final.exists() and not replace:
        raise OutputError(f"{final} exists and would be overwritten. Move it or choose another.")
    partial = final.with_name(f"{PARTIAL}{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        _swap(partial, final)
        _sync(final.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{final} could not be written: {error}. Earlier checkpoints are untouched."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(folder: Path, key: str) -> None:
    """Check that a folder can be created and written, leaving nothing behind.

    Args:
        folder: The folder, which may not exist yet.
        key: How the user calls it.

    Raises:
        OutputError: It cannot be written.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    probe = existing / f"{PARTIAL}probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise OutputError(
            f"{key}: {folder} cannot be written: {error.strerror or error}. "
            "Choose a folder that you may write to."
        ) from error


def _swap(new: Path, final: Path) -> None:
    old = final.with_name(f"{PARTIAL}old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    # A rename may reach the disk before the data does; a crash would leave empty files.
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
