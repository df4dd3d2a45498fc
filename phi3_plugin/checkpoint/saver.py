"""Saves one checkpoint after the other, while training waits or goes on."""

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phi3_plugin.checkpoint import run


class Saver:
    """Writes a run's checkpoints on the main process and removes those beyond the limit."""

    def __init__(
        self,
        output_dir: Path,
        limit: int | None,
        saved: Callable[[str, int], None],
        *,
        background: bool,
    ) -> None:
        """Start nothing yet.

        Args:
            output_dir: Folder of the run.
            limit: Step folders to keep; None keeps all.
            saved: Told name and step of each checkpoint that is whole, in the caller's thread.
            background: Return from :meth:`save` while the folder is being written.
        """
        self._output_dir, self._limit, self._saved = output_dir, limit, saved
        self._pool = ThreadPoolExecutor(1) if background else None
        self._writing: tuple[Future[None], str, int] | None = None

    def save(
        self, name: str, step: int, write: Callable[[Path], None], state: dict[str, Any]
    ) -> None:
        """Write a checkpoint as :func:`phi3_plugin.checkpoint.run.save` does.

        Args:
            name: Of its folder.
            step: Optimizer steps made.
            write: Writes what serves; it owns its tensors.
            state: What training goes on from; copied if training goes on before it is written.

        Raises:
            OutputError: This one or, in the background, the one before it cannot be written.
        """
        self.wait()
        if self._pool is None:
            self._write(name, step, write, state)
            self._saved(name, step)
            return
        # That of the optimizer is a copy, and 8-bit ones hold tensors that deepcopy cannot copy.
        own = {key: v if key == "optimizer" else copy.deepcopy(v) for key, v in state.items()}
        job = self._pool.submit(self._write, name, step, write, own)
        self._writing = job, name, step

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            OutputError: The last checkpoint could not be written.
        """
        if self._writing:
            (job, name, step), self._writing = self._writing, None
            job.result()
            self._saved(name, step)

    def _write(
        self, name: str, step: int, write: Callable[[Path], None], state: dict[str, Any]
    ) -> None:
        run.save(self._output_dir, name, step, write, state)
        run.prune(self._output_dir, self._limit)
