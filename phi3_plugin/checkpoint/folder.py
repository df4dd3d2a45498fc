"""Write a folder so that it is either whole or not there.

best -> .partial-old-best       replacing is two renames; a kill between them leaves no ``best``,
.partial-best -> best           and `restore` puts the old one back
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from phi3_plugin.errors import OutputError

PARTIAL = ".partial-"
"""Marks folders that a killed run left half-written."""
_OLD = f"{PARTIAL}old-"


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
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{final} could not be written: {error}. Earlier checkpoints are untouched."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def restore(parent: Path) -> None:
    """Put back every folder whose replacement was killed before the new one had its name.

    Every process may call this at once: one of them renames, the others find it done.

    Args:
        parent: Where :func:`whole_folder` wrote; need not exist.
    """
    for old in parent.glob(f"{_OLD}*"):
        final = parent / old.name.removeprefix(_OLD)
        if not final.exists():
            with suppress(FileNotFoundError):
                old.rename(final)


def sweep(parent: Path) -> None:
    """Remove what killed runs left half-written.

    Args:
        parent: Where :func:`whole_folder` wrote; nothing may be writing there now.
    """
    restore(parent)
    for folder in parent.glob(f"{PARTIAL}*"):
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def check_output(output_dir: Path, checkpoint_dir: Path) -> None:
    """Check that results can be written, and not into the base model.

    Raises:
        OutputError: They cannot.
    """
    inside = checkpoint_dir.resolve()
    if inside in (output_dir.resolve(), *output_dir.resolve().parents):
        raise OutputError(
            f"output_dir: {output_dir} is inside checkpoint_dir {checkpoint_dir}. Choose a folder "
            "elsewhere, so that the base model stays as it was downloaded."
        )
    check_writable(output_dir, "output_dir")


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
    old = final.with_name(f"{_OLD}{final.name}")
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
