"""One process at a time writes into a folder; who comes second learns who is there."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from typing_extensions import Self

from phi3_plugin.errors import OutputError

LOCK, HOLDER = ".lock", ".lock.json"
WAIT = 0.3
"""Seconds for a holder that is just letting go."""


class FolderLock:
    """A folder that is this process's until it ends, however it ends, or releases it.

    The operating system keeps the lock and drops it with the process, so that a killed run leaves
    none behind; on network file systems too where they pass locks on (NFS 4, Lustre with flock).
    Where they do not, ``filelock`` keeps a file that names host and process: one whose process is
    gone is seen to be stale from the same host, and is for the user to remove from another.
    A process may take a folder again that it has.

    Who lets go removes the file of the lock. Whoever has opened it by then has locked a file that
    has no name any more; ``filelock`` notices (from 3.21 on), and tries again.
    """

    def __init__(self, folder: Path, key: str) -> None:
        """Take the folder, which is made if it is not there.

        Args:
            folder: What nobody else may write into.
            key: How the user calls it.

        Raises:
            OutputError: Another process has it, or it cannot be written.
        """
        self._folder = folder
        self._holder = folder / HOLDER
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        file = folder.resolve() / LOCK
        self._lock = FileLock(file, timeout=WAIT, is_singleton=True, thread_local=False)
        try:
            self._take()
            self._holder.write_text(json.dumps(_this_process()), encoding="utf-8")
        except Timeout:
            raise OutputError(
                f"{key}: another process writes into {folder}: {_described(self._holder)}. Wait "
                "until it has ended, stop it, or choose another folder. If you know that it is "
                f"gone, remove {folder / LOCK}."
            ) from None
        except OSError as error:
            raise OutputError(
                f"{key}: {folder} cannot be written: {error.strerror or error}. Choose a folder "
                "that you may write to."
            ) from error

    def _take(self) -> None:
        for tries_left in reversed(range(100)):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock.acquire()
                return
            except FileNotFoundError:  # whoever had made the folder for nothing has removed it
                if not tries_left:
                    raise

    def release(self) -> None:
        """Let others have the folder, and leave no trace of the lock."""
        if self._lock.lock_counter == 1:
            self._holder.unlink(missing_ok=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
            with suppress(OSError):  # there is something in it
                for path in self._made:
                    path.rmdir()
        self._lock.release()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Let others have the folder, however the block ended."""
        self.release()


def _this_process() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _described(holder: Path) -> str:
    """Say who has a folder, as far as its file tells."""
    try:
        facts = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {int(facts['pid'])} on host {facts['host']!r}, since {facts['since']!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{HOLDER} does not say which"
